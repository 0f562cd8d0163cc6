//! AdamW (Loshchilov and Hutter 2019), as PyTorch computes it, over flat slices.

use pulp::Arch;
use rayon::prelude::*;

use super::config::TrainConfig;

/// Values per parallel task.
const TASK: usize = 16 * 1024;

/// The update of one step.
pub(super) struct AdamW {
    rate: f32,
    decay: f32,
    beta1: f32,
    beta2: f32,
    /// `1 / √(1 - beta2^t)`.
    second: f32,
    epsilon: f32,
    /// Factor on the gradients, from clipping.
    shrink: f32,
}

impl AdamW {
    /// For step `step`, counted from 1, at learning rate `rate`.
    pub(super) fn new(config: &TrainConfig, step: usize, rate: f64, shrink: f64) -> Self {
        let step = step as f64;
        Self {
            rate: (rate / (1.0 - config.beta1.powf(step))) as f32,
            decay: (1.0 - rate * config.weight_decay) as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            second: (1.0 / (1.0 - config.beta2.powf(step)).sqrt()) as f32,
            epsilon: config.epsilon as f32,
            shrink: shrink as f32,
        }
    }

    /// Updates `params` and the two moments from `grads`.
    pub(super) fn update(
        &self,
        params: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
        grads: &[f32],
    ) {
        let tasks = params.par_chunks_mut(TASK).zip(first.par_chunks_mut(TASK));
        let tasks = tasks.zip(second.par_chunks_mut(TASK));
        tasks
            .zip(grads.par_chunks(TASK))
            .for_each(|(((params, first), second), grads)| {
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        let values = params.iter_mut().zip(first).zip(second).zip(grads);
                        for (((p, m), v), g) in values {
                            let g = g * self.shrink;
                            *m = self.beta1 * *m + (1.0 - self.beta1) * g;
                            *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
                            let size = v.sqrt() * self.second + self.epsilon;
                            *p = *p * self.decay - self.rate * *m / size;
                        }
                    },
                );
            });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_steps_equal_the_definition() {
        let config = TrainConfig {
            weight_decay: 0.1,
            ..TrainConfig::default()
        };
        let (mut p, mut m, mut v) = ([1.0f32, -2.0], [0.0; 2], [0.0; 2]);
        let (mut want, mut m64, mut v64) = ([1.0f64, -2.0], [0.0; 2], [0.0; 2]);
        for step in 1..=3 {
            let grads = [0.5 * step as f32, -4.0];
            AdamW::new(&config, step, 0.01, 0.5).update(&mut p, &mut m, &mut v, &grads);
            for i in 0..2 {
                let g = f64::from(grads[i]) * 0.5;
                m64[i] = 0.9 * m64[i] + 0.1 * g;
                v64[i] = 0.999 * v64[i] + 0.001 * g * g;
                let t = step as i32;
                let (mean, square) = (
                    m64[i] / (1.0 - 0.9f64.powi(t)),
                    v64[i] / (1.0 - 0.999f64.powi(t)),
                );
                want[i] -= 0.01 * 0.1 * want[i];
                want[i] -= 0.01 * mean / (square.sqrt() + 1e-8);
                assert!((f64::from(p[i]) - want[i]).abs() < 1e-6);
            }
        }
    }
}
