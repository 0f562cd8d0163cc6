//! Row-wise steps of inference, each on the calling thread: callers split rows over threads.

use pulp::Arch;
use rayon::prelude::*;

use super::matmul::{Into, Mat, MatMut, Threads, matmul};
use super::vector::{exp, gelu_tanh, sum};
use crate::config::Activation;

/// `out = x · wᵀ` or `out += x · wᵀ`: the linear layer. `x` is `[rows, inputs]`, `w` is
/// `[outputs, inputs]`, `out` is `[rows, outputs]`.
pub(crate) fn linear(
    x: &[f32],
    w: &[f32],
    inputs: usize,
    out: &mut [f32],
    into: Into,
    threads: Threads,
) {
    let (rows, outputs) = (x.len() / inputs, w.len() / inputs);
    if rows == 1 && threads == Threads::All {
        // One row is bound by reading `w`, which `gemm` does on one thread only.
        let share = outputs.div_ceil(rayon::current_num_threads()).max(64);
        let parts = out.par_chunks_mut(share).zip(w.par_chunks(share * inputs));
        parts.for_each(|(out, w)| linear(x, w, inputs, out, into, Threads::One));
        return;
    }
    let (x, w) = (Mat::new(x, rows, inputs), Mat::new(w, outputs, inputs));
    matmul(
        MatMut::new(out, rows, outputs),
        into,
        1.0,
        x,
        w.t(),
        threads,
    );
}

/// `gate = activation(gate) · up`.
pub(crate) fn gate_mul(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => silu_mul(gate, up),
        Activation::GeluTanh => gelu_tanh_mul(gate, up),
    }
}

fn silu_mul(gate: &mut [f32], up: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (g, u) in gate.iter_mut().zip(up) {
                *g = *g / (1.0 + exp(-*g)) * u;
            }
        },
    );
}

fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (g, u) in gate.iter_mut().zip(up) {
                let (argument, _) = gelu_tanh(*g);
                *g = *g / (1.0 + exp(-argument)) * u;
            }
        },
    );
}

/// GELU with the error function (Abramowitz and Stegun 7.1.26, error below 1.5e-7), in place.
pub(crate) fn gelu(x: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for v in x.iter_mut() {
                let z = v.abs() * std::f32::consts::FRAC_1_SQRT_2;
                let t = 1.0 / (1.0 + 0.327_591_1 * z);
                let mut p = 1.061_405_4;
                p = p * t - 1.453_152;
                p = p * t + 1.421_413_7;
                p = p * t - 0.284_496_74;
                p = p * t + 0.254_829_6;
                let erf = 1.0 - p * t * exp(-z * z);
                *v = 0.5 * *v * (1.0 + erf.copysign(*v));
            }
        },
    );
}

/// Per row, in place: `(x - mean) / sqrt(variance + eps) · weight + bias`.
pub(crate) fn layer_norm(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let width = weight.len();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for row in x.chunks_exact_mut(width) {
                let mean = sum(width, |i| row[i]) / width as f32;
                let variance = sum(width, |i| (row[i] - mean) * (row[i] - mean)) / width as f32;
                let scale = 1.0 / (variance + eps).sqrt();
                for ((v, w), b) in row.iter_mut().zip(weight).zip(bias) {
                    *v = (*v - mean) * scale * w + b;
                }
            }
        },
    );
}

/// Adds `bias` to every row.
pub(crate) fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (v, b) in row.iter_mut().zip(bias) {
            *v += b;
        }
    }
}

/// Per row, in place: `x / rms(x) · weight`. A row may be one head of a token.
pub(crate) fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for row in x.chunks_exact_mut(width) {
                let mean = sum(width, |i| row[i] * row[i]) / width as f32;
                let inverse = 1.0 / (mean + eps).sqrt();
                for (v, w) in row.iter_mut().zip(weight) {
                    *v = *v * inverse * w;
                }
            }
        },
    );
}

/// Turns one token's heads in place (rotate-half): dimension `i` of each head with dimension
/// `i + head_dim / 2`. `cos` and `sin` have `head_dim / 2` entries; the result is scaled.
pub(crate) fn rotate(heads: &mut [f32], cos: &[f32], sin: &[f32], scale: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for head in heads.chunks_exact_mut(2 * cos.len()) {
                let (low, high) = head.split_at_mut(cos.len());
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = ((*a * c - *b * s) * scale, (*b * c + *a * s) * scale);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::vector::rms_norm_row;

    fn close(a: f32, b: f32) {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} is not {b}");
    }

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 31 + seed * 17) % 23) as f32 * 0.1 - 1.1)
            .collect()
    }

    #[test]
    fn linear_is_the_same_for_every_thread_plan() {
        for (rows, inputs, outputs) in [(1, 20, 200), (1, 3, 1), (7, 33, 65), (40, 16, 5)] {
            let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
            for threads in [Threads::One, Threads::All] {
                let mut out = vec![f32::NAN; rows * outputs];
                linear(&x, &w, inputs, &mut out, Into::Replace, threads);
                linear(&x, &w, inputs, &mut out, Into::Add, threads);
                for (i, value) in out.iter().enumerate() {
                    let x = &x[i / outputs * inputs..];
                    let w = &w[i % outputs * inputs..];
                    let wanted = (0..inputs).map(|j| x[j] * w[j]).sum::<f32>();
                    assert!(
                        (value - 2.0 * wanted).abs() < 1e-3,
                        "{value} is not 2 · {wanted}"
                    );
                }
            }
        }
    }

    #[test]
    fn activations_match_their_definitions() {
        let mut gate = [1.5f32, -2.0, 0.0];
        gate_mul(Activation::Silu, &mut gate, &[2.0, 1.0, 1.0]);
        close(gate[0], 2.0 * 1.5 / (1.0 + (-1.5f32).exp()));
        close(gate[1], -2.0 / (1.0 + 2f32.exp()));
        let x = [1.5f32, -2.0, 0.0, 40.0, -40.0];
        let mut gate = x;
        gate_mul(Activation::GeluTanh, &mut gate, &[2.0; 5]);
        for (got, x) in gate.into_iter().zip(x) {
            let z = std::f32::consts::FRAC_2_PI.sqrt() * (x + 0.044_715 * x * x * x);
            close(got, x * (1.0 + z.tanh()));
        }
        // Reference values of 0.5 x (1 + erf(x / sqrt 2)).
        let mut x = [1.0f32, -1.0, 3.0, 0.0];
        gelu(&mut x);
        for (value, wanted) in x.iter().zip([0.841_344_8, -0.158_655_25, 2.995_950_2, 0.0]) {
            close(*value, wanted);
        }
    }

    #[test]
    fn a_layer_norm_has_the_moments_it_promises() {
        let mut x = values(26, 3);
        layer_norm(&mut x, &[2.0; 13], &[0.5; 13], 0.0);
        let row = &x[13..];
        close(row.iter().sum::<f32>() / 13.0, 0.5);
        close(
            row.iter().map(|v| (v - 0.5) * (v - 0.5)).sum::<f32>() / 13.0,
            4.0,
        );
    }

    #[test]
    fn an_rms_norm_in_place_is_that_of_each_row() {
        let (x, weight) = (values(26, 3), values(13, 4));
        let mut out = x.clone();
        rms_norm(&mut out, &weight, 1e-5);
        for (got, x) in out.chunks(13).zip(x.chunks(13)) {
            let mut wanted = vec![0.0; 13];
            rms_norm_row(&mut wanted, x, &weight, 1e-5);
            assert_eq!(got, wanted);
        }
    }

    #[test]
    fn rotation_turns_the_halves() {
        let mut head = [1.0f32, 0.0, 0.0, 2.0];
        rotate(&mut head, &[0.0, 1.0], &[1.0, 0.0], 3.0);
        assert_eq!(head, [0.0, 0.0, 3.0, 6.0]);
    }
}
