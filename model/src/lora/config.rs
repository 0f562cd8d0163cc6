//! The shape of an adapter: PEFT's `LoraConfig`, the part that this crate uses.

use serde::{Deserialize, Serialize};

use super::Module;
use crate::error::ModelError;

/// How an adapter is shaped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank `r` of every pair.
    pub rank: usize,
    /// The delta is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout on the adapter's input while training, from 0 to below 1.
    pub dropout: f64,
    /// Adapted modules, such as `q_proj`.
    pub target_modules: Vec<String>,
    /// Makes it an activated adapter (aLoRA, Greenewald et al. 2025): it takes effect from the
    /// last place in the prompt where these tokens stand, and the base model alone computes what
    /// comes before, so that keys and values of that part serve all adapters. A prompt without
    /// them is answered by the base model. PEFT's `alora_invocation_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invocation_tokens: Option<Vec<u32>>,
}

impl Default for LoraConfig {
    /// Rank 16, alpha 32, no dropout, every linear layer.
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: Module::ALL.map(|m| m.name().to_owned()).to_vec(),
            invocation_tokens: None,
        }
    }
}

/// Ranks beyond this give no adapter of low rank any more, only tensors that do not fit.
const MOST_RANK: usize = 1024;

/// Where `invocation` begins in `prompt` for the last time.
pub(crate) fn activation(prompt: &[u32], invocation: &[u32]) -> Option<usize> {
    let places = 0..(prompt.len() + 1).saturating_sub(invocation.len());
    places
        .rev()
        .find(|at| prompt[*at..].starts_with(invocation))
}

impl LoraConfig {
    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// The adapted modules in the order of the computation, each once.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the setting that is out of range and what is allowed.
    pub fn check(&self) -> Result<Vec<Module>, ModelError> {
        let refuse = |name, reason: String| Err(ModelError::Config { name, reason });
        if !(1..=MOST_RANK).contains(&self.rank) {
            return refuse(
                "rank",
                format!("{} is not from 1 to {MOST_RANK}", self.rank),
            );
        }
        if !self.alpha.is_finite() {
            return refuse("alpha", format!("{} is not a number", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(
                "dropout",
                format!("{} is not from 0 to below 1", self.dropout),
            );
        }
        if self.target_modules.is_empty() {
            return refuse("target_modules", "names no module".to_owned());
        }
        if self.invocation_tokens.as_ref().is_some_and(Vec::is_empty) {
            return refuse("invocation_tokens", "names no token".to_owned());
        }
        let known = || Module::ALL.map(|m| format!("`{}`", m.name())).join(", ");
        let modules = self.target_modules.iter().map(|name| {
            Module::from_name(name).ok_or_else(|| ModelError::Config {
                name: "target_modules",
                reason: format!("`{name}` is not one of {}", known()),
            })
        });
        let mut modules = modules.collect::<Result<Vec<_>, _>>()?;
        modules.sort_unstable();
        modules.dedup();
        Ok(modules)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_default_is_a_rank_16_adapter_on_every_linear_layer() {
        let config = LoraConfig::default();
        assert_eq!(config.scale(), 2.0);
        assert_eq!(config.check().unwrap(), Module::ALL);
    }

    #[test]
    fn modules_are_ordered_and_unknown_ones_are_named() {
        let with = |names: &[&str]| LoraConfig {
            target_modules: names.iter().map(|n| (*n).to_owned()).collect(),
            ..LoraConfig::default()
        };
        let modules = with(&["v_proj", "q_proj", "v_proj"]).check().unwrap();
        assert_eq!(modules, [Module::Q, Module::V]);
        let error = with(&["lm_head"]).check().unwrap_err().to_string();
        assert!(error.starts_with("`target_modules`: `lm_head` is not one of `q_proj`"));
        assert!(with(&[]).check().is_err());
    }

    #[test]
    fn the_last_invocation_counts() {
        assert_eq!(activation(&[1, 2, 3, 1, 2, 4], &[1, 2]), Some(3));
        assert_eq!(activation(&[1, 1, 1], &[1, 1]), Some(1));
        assert_eq!(activation(&[1, 2], &[1, 2]), Some(0));
        assert_eq!(activation(&[1, 2], &[2, 1]), None);
        assert_eq!(activation(&[1], &[1, 2]), None);
    }

    #[test]
    fn ranges_are_checked() {
        let bad = [
            LoraConfig {
                rank: 0,
                ..LoraConfig::default()
            },
            LoraConfig {
                dropout: 1.0,
                ..LoraConfig::default()
            },
            LoraConfig {
                alpha: f64::NAN,
                ..LoraConfig::default()
            },
        ];
        assert!(bad.iter().all(|config| config.check().is_err()));
    }
}
