//! [`Sampler`]: which token, or which choice, comes next.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Draws by temperature from a stream of its own.
pub(super) struct Sampler {
    temperature: f64,
    /// Share of the probability that draws come from, the likeliest tokens first.
    pub(super) top_p: f64,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// `prompt` takes part in the seed: rows of one call must not share their luck.
    pub(super) fn new(temperature: f64, seed: Option<u64>, prompt: &[u32]) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.unwrap_or(0).to_le_bytes());
        for token in prompt {
            hash.update(&token.to_le_bytes());
        }
        Self {
            temperature,
            top_p: 1.0,
            rng: ChaCha8Rng::from_seed(*hash.finalize().as_bytes()),
        }
    }

    /// The next token by its logits.
    pub(super) fn next(&mut self, logits: &[f32]) -> u32 {
        if self.temperature <= 0.0 {
            return largest(logits) as u32;
        }
        let most = f64::from(logits[largest(logits)]);
        let weight = |logit: &f32| ((f64::from(*logit) - most) / self.temperature).exp();
        let mut weights: Vec<f64> = logits.iter().map(weight).collect();
        if self.top_p < 1.0 {
            keep_nucleus(&mut weights, self.top_p);
        }
        self.draw(&weights) as u32
    }

    /// A choice by its probability.
    pub(super) fn choose(&mut self, probs: &[f32]) -> usize {
        if self.temperature <= 0.0 {
            return largest(probs);
        }
        // Beside the largest, so that a low temperature leaves more than zeros.
        let most = f64::from(probs[largest(probs)]);
        let weight = |p: &f32| (f64::from(*p) / most).powf(1.0 / self.temperature);
        let weights: Vec<f64> = probs.iter().map(weight).collect();
        self.draw(&weights)
    }

    fn draw(&mut self, weights: &[f64]) -> usize {
        let mut left = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        let place = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a little after the last one that may be drawn.
        let last = || weights.iter().rposition(|weight| *weight > 0.0);
        place.or_else(last).unwrap_or(0)
    }
}

/// Leaves the likeliest ones that have the share `top_p` together, at least one.
fn keep_nucleus(weights: &mut [f64], top_p: f64) {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_unstable_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    let mut left = top_p * weights.iter().sum::<f64>();
    for (rank, at) in order.into_iter().enumerate() {
        if rank > 0 && left <= 0.0 {
            weights[at] = 0.0;
        }
        left -= weights[at];
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_temperature_takes_the_likeliest_choice() {
        let mut sampler = Sampler::new(0.001, None, &[1]);
        assert_eq!(sampler.choose(&[0.2, 0.3, 0.1, 0.25]), 1);
    }

    #[test]
    fn a_nucleus_leaves_the_likeliest() {
        let mut weights = [1.0, 5.0, 3.0, 1.0];
        keep_nucleus(&mut weights, 0.7);
        assert_eq!(weights, [0.0, 5.0, 3.0, 0.0]);
        let mut sampler = Sampler::new(1.0, Some(1), &[1]);
        sampler.top_p = 0.0;
        assert!((0..20).all(|_| sampler.next(&[0.1, 0.3, 0.2]) == 1));
    }

    #[test]
    fn rows_draw_apart_and_each_draws_the_same_again() {
        let draws = |prompt: &[u32]| {
            let mut sampler = Sampler::new(1.0, Some(7), prompt);
            (0..20)
                .map(|_| sampler.choose(&[0.25; 4]))
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(&[1, 2]), draws(&[1, 2]));
        assert_ne!(draws(&[1, 2]), draws(&[1, 3]));
    }
}
