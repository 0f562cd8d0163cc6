//! The settings of a training.

use serde::{Deserialize, Serialize};

use super::schedule::Schedule;
use crate::error::ModelError;

/// How to train. The defaults suit a small model and some thousand short rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over all rows.
    pub epochs: usize,
    /// Rows per step.
    pub batch_size: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of all steps over which the learning rate rises to its peak.
    pub warmup: f64,
    /// How the learning rate falls afterwards.
    pub schedule: Schedule,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Gradients are scaled down to this global norm; 0 leaves them.
    pub clip: f64,
    /// Seed of the first adapter, the order of the rows, and dropout.
    pub seed: u64,
    /// Tokens computed at once; larger batches are split and their gradients added up, with the
    /// same result up to rounding. A token needs about 0.7 MB in a model of 135 M parameters.
    /// Where that computes less (a long start that all rows share, a single long row), only the
    /// layers' inputs are kept of as many tokens as the same memory holds (0.07 MB a token), and
    /// the rest is computed twice. Of a row that is longer than that, its length bounds the memory.
    pub max_tokens: usize,
    /// Whether the common start of a batch's rows is computed once. Exact either way.
    pub share_prefix: bool,
    /// Stops after this many epochs in a row without a better validation loss. Needs rows to
    /// validate on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 1,
            batch_size: 8,
            learning_rate: 2e-3,
            warmup: 0.1,
            schedule: Schedule::Linear,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            clip: 1.0,
            seed: 0,
            max_tokens: 2048,
            share_prefix: true,
            patience: None,
        }
    }
}

impl TrainConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the setting and what is allowed.
    pub fn check(&self) -> Result<(), ModelError> {
        let refuse = |name, reason: &str| {
            let reason = reason.to_owned();
            Err(ModelError::Config { name, reason })
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let counts = [
            ("epochs", self.epochs),
            ("batch_size", self.batch_size),
            ("max_tokens", self.max_tokens),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return refuse(name, "must be at least 1");
        }
        for (name, value) in [
            ("learning_rate", self.learning_rate),
            ("epsilon", self.epsilon),
        ] {
            if !positive(value) {
                return refuse(name, "must be a positive number");
            }
        }
        for (name, value) in [("weight_decay", self.weight_decay), ("clip", self.clip)] {
            if !positive(value) && value != 0.0 {
                return refuse(name, "must be 0 or a positive number");
            }
        }
        for (name, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return refuse(name, "must be from 0 to below 1");
            }
        }
        if self.patience == Some(0) {
            return refuse("patience", "must be at least 1");
        }
        if !(0.0..=1.0).contains(&self.warmup) {
            return refuse("warmup", "must be from 0 to 1: it is a share of all steps");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges_are_checked_and_unknown_settings_refused() {
        TrainConfig::default().check().unwrap();
        let read = |text: &str| serde_json::from_str::<TrainConfig>(text);
        for bad in [
            r#"{"epochs": 0}"#,
            r#"{"learning_rate": -1}"#,
            r#"{"beta2": 1}"#,
            r#"{"clip": -1}"#,
            r#"{"warmup": 2}"#,
        ] {
            assert!(read(bad).unwrap().check().is_err(), "{bad}");
        }
        assert!(read(r#"{"learning_rates": 1}"#).is_err());
    }
}
