//! [`Sampler`]: which token, or which choice, comes next.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Draws by temperature from a stream of its own.
pub(super) struct Sampler {
    temperature: f64,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub(super) fn new(temperature: f64, seed: Option<u64>) -> Self {
        Self {
            temperature,
            rng: ChaCha8Rng::seed_from_u64(seed.unwrap_or(0)),
        }
    }

    /// The next token by its logits.
    pub(super) fn next(&mut self, logits: &[f32]) -> u32 {
        if self.temperature <= 0.0 {
            return largest(logits) as u32;
        }
        let most = f64::from(logits[largest(logits)]);
        let weight = |logit: &f32| ((f64::from(*logit) - most) / self.temperature).exp();
        let weights: Vec<f64> = logits.iter().map(weight).collect();
        self.draw(&weights) as u32
    }

    /// A choice by its probability.
    pub(super) fn choose(&mut self, probs: &[f32]) -> usize {
        if self.temperature <= 0.0 {
            return largest(probs);
        }
        let power = 1.0 / self.temperature;
        let weights: Vec<f64> = probs.iter().map(|p| f64::from(*p).powf(power)).collect();
        self.draw(&weights)
    }

    fn draw(&mut self, weights: &[f64]) -> usize {
        let mut left = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        let place = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a little after the last one.
        place.unwrap_or(weights.len() - 1)
    }
}

/// Position of the largest value; the first of equal ones.
fn largest(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}
