//! The learning rate of each step.

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// In a straight line, to 0 just after the last step.
    Linear,
    /// Along half a cosine, to 0 just after the last step.
    Cosine,
    /// Not at all.
    Constant,
}

/// The learning rate of `step` (from 0) of `steps`. The warm-up rises in a straight line and its
/// first step already learns: `transformers` starts at 0, which wastes a batch.
pub(super) fn learning_rate(config: &TrainConfig, step: usize, steps: usize) -> f64 {
    let warmup = (config.warmup * steps as f64).ceil();
    let now = step as f64;
    if now < warmup {
        return config.learning_rate * (now + 1.0) / warmup;
    }
    let left = (steps as f64 - now) / (steps as f64 - warmup).max(1.0);
    config.learning_rate
        * match config.schedule {
            Schedule::Linear => left,
            Schedule::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left).cos()),
            Schedule::Constant => 1.0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls() {
        let config = TrainConfig {
            learning_rate: 1.0,
            warmup: 0.2,
            ..TrainConfig::default()
        };
        let rates = |schedule| {
            let config = TrainConfig {
                schedule,
                ..config.clone()
            };
            (0..10)
                .map(move |step| learning_rate(&config, step, 10))
                .collect::<Vec<_>>()
        };
        let linear = rates(Schedule::Linear);
        assert_eq!(linear[..4], [0.5, 1.0, 1.0, 0.875]);
        assert!((linear[9] - 0.125).abs() < 1e-12);
        let cosine = rates(Schedule::Cosine);
        assert!((cosine[6] - 0.5).abs() < 1e-12 && cosine[9] > 0.0);
        assert_eq!(rates(Schedule::Constant)[9], 1.0);
    }
}
