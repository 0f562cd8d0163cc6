//! Loops over f32 slices, compiled for the best instruction set that the machine has.
//!
//! Knows no model. Invariant: sums run in a fixed order, so equal inputs give equal bits.

use pulp::Arch;
use rayon::prelude::*;

use crate::config::Activation;

/// Values per lane group; sums keep this many partial sums, so that they vectorise.
pub(crate) const LANES: usize = 16;
/// Values per parallel task of an elementwise loop.
const TASK: usize = 16 * 1024;

/// `eˣ` to within 2 units in the last place; below -87 it stays at `e⁻⁸⁷`, NaN stays NaN.
///
/// Range reduction to `±ln2/2` and the degree-6 polynomial of Cephes' `expf`.
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding this rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_375 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_15e-4;
    p = p * r + 1.398_199_95e-3;
    p = p * r + 8.333_451_9e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_55e-1;
    p = p * r + 5.000_000_1e-1;
    p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The sum of `f(i)` for `i` below `n`, in a fixed order.
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut parts = [0.0f32; LANES];
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, part) in parts.iter_mut().enumerate() {
            *part += f(start + lane);
        }
    }
    let rest: f32 = (whole..n).map(f).sum();
    parts.iter().sum::<f32>() + rest
}

/// `target += other`.
pub(crate) fn add(target: &mut [f32], other: &[f32]) {
    let tasks = target.par_chunks_mut(TASK).zip(other.par_chunks(TASK));
    tasks.for_each(|(target, other)| {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (t, o) in target.iter_mut().zip(other) {
                    *t += o;
                }
            },
        );
    });
}

/// Both activations are `x · sigmoid(a(x))`: this is `a` and its slope for SiLU.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    (x, 1.0)
}

/// The same for GELU by its tanh approximation, since `(1 + tanh z) / 2 = sigmoid(2z)`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> (f32, f32) {
    // 2 · √(2/π)
    const SCALE: f32 = 1.595_769;
    let square = 0.044_715 * x * x;
    (SCALE * x * (1.0 + square), SCALE * (1.0 + 3.0 * square))
}

/// `out = activation(gate) · up`.
pub(crate) fn glu(activation: Activation, out: &mut [f32], gate: &[f32], up: &[f32]) {
    match activation {
        Activation::Silu => glu_of(silu, out, gate, up),
        Activation::GeluTanh => glu_of(gelu_tanh, out, gate, up),
    }
}

/// Backward of [`glu`]: from the gradient of its result to those of `gate` and `up`, written over
/// the values themselves; `d_out` becomes the recomputed result.
pub(crate) fn glu_backward(
    activation: Activation,
    d_out: &mut [f32],
    gate: &mut [f32],
    up: &mut [f32],
) {
    match activation {
        Activation::Silu => glu_backward_of(silu, d_out, gate, up),
        Activation::GeluTanh => glu_backward_of(gelu_tanh, d_out, gate, up),
    }
}

fn glu_of(a: impl Fn(f32) -> (f32, f32) + Sync, out: &mut [f32], gate: &[f32], up: &[f32]) {
    let tasks = out.par_chunks_mut(TASK).zip(gate.par_chunks(TASK));
    tasks
        .zip(up.par_chunks(TASK))
        .for_each(|((out, gate), up)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
                        let (argument, _) = a(*g);
                        *o = g * sigmoid(argument) * u;
                    }
                },
            );
        });
}

fn glu_backward_of(
    a: impl Fn(f32) -> (f32, f32) + Sync,
    d_out: &mut [f32],
    gate: &mut [f32],
    up: &mut [f32],
) {
    let tasks = d_out.par_chunks_mut(TASK).zip(gate.par_chunks_mut(TASK));
    tasks
        .zip(up.par_chunks_mut(TASK))
        .for_each(|((out, gate), up)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
                        let (d, x) = (*o, *g);
                        let (argument, slope) = a(x);
                        let s = sigmoid(argument);
                        *o = x * s * *u;
                        *g = d * *u * s * (1.0 + x * (1.0 - s) * slope);
                        *u = d * (x * s);
                    }
                },
            );
        });
}

/// One row of an RMS norm: `out = x / rms(x) · weight`; returns `1 / rms(x)`.
pub(crate) fn rms_norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mean = sum(x.len(), |i| x[i] * x[i]) / x.len() as f32;
            let inverse = 1.0 / (mean + eps).sqrt();
            for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * inverse * w;
            }
            inverse
        },
    )
}

/// One row of the same norm when `1 / rms(x)` is known.
pub(crate) fn rescale_row(out: &mut [f32], x: &[f32], weight: &[f32], inverse: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * inverse * w;
            }
        },
    );
}

/// Backward of one row of an RMS norm: adds to `dx`.
pub(crate) fn rms_norm_backward_row(
    dx: &mut [f32],
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    inverse: f32,
) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let n = x.len().min(dy.len()).min(weight.len());
            let (x, dy, weight) = (&x[..n], &dy[..n], &weight[..n]);
            let dot = sum(n, |i| dy[i] * weight[i] * x[i]);
            let along = dot * inverse * inverse * inverse / n as f32;
            for (((d, dy), w), x) in dx.iter_mut().zip(dy).zip(weight).zip(x) {
                *d += dy * w * inverse - x * along;
            }
        },
    );
}

/// Softmax of `scale · row` in place; returns the logarithm of the sum of exponentials.
pub(crate) fn softmax_row(row: &mut [f32], scale: f32) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut top = [f32::NEG_INFINITY; LANES];
            let mut chunks = row.chunks_exact(LANES);
            for chunk in &mut chunks {
                for (t, x) in top.iter_mut().zip(chunk) {
                    *t = if *x > *t { *x } else { *t };
                }
            }
            let rest = chunks.remainder().iter();
            let top = top.iter().chain(rest).copied();
            let top = top.fold(f32::NEG_INFINITY, f32::max) * scale;
            for x in row.iter_mut() {
                *x = exp(*x * scale - top);
            }
            let total = sum(row.len(), |i| row[i]);
            let inverse = 1.0 / total;
            for x in row.iter_mut() {
                *x *= inverse;
            }
            top + total.ln()
        },
    )
}

/// The same softmax again, from the value that [`softmax_row`] returned.
pub(crate) fn softmax_again_row(row: &mut [f32], scale: f32, log_sum: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for x in row.iter_mut() {
                *x = exp(*x * scale - log_sum);
            }
        },
    );
}

/// Backward of a softmax row: `d = p · (d - dot) · scale` in `d`, where `dot` is `Σ p·d`.
pub(crate) fn softmax_backward_row(d: &mut [f32], p: &[f32], dot: f32, scale: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (d, p) in d.iter_mut().zip(p) {
                *d = p * (*d - dot) * scale;
            }
        },
    );
}

/// The dot product.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let n = a.len().min(b.len());
            let (a, b) = (&a[..n], &b[..n]);
            sum(n, |i| a[i] * b[i])
        },
    )
}

/// The sum of squares, in double precision over fixed parts.
pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
    let parts = values
        .par_chunks(TASK)
        .map(|part| f64::from(dot(part, part)));
    parts.collect::<Vec<_>>().into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in -8_600..8_800 {
            let x = i as f32 * 0.01;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / want - 1.0).abs() < 2.5e-7,
                "exp({x}) = {got}, not {want}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1000.0) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn softmax_rows_sum_to_one_and_can_be_repeated() {
        let x: Vec<f32> = (0..37).map(|i| ((i * 5) % 13) as f32).collect();
        let mut p = x.clone();
        let log_sum = softmax_row(&mut p, 0.5);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let mut again = x.clone();
        softmax_again_row(&mut again, 0.5, log_sum);
        assert!(p.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn gradients_of_gated_activations_equal_finite_differences() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let result = |gate: f32| {
                let mut out = [0.0];
                glu(activation, &mut out, &[gate], &[1.5]);
                f64::from(out[0])
            };
            for i in -40..40 {
                let x = i as f32 * 0.1 + 0.03;
                let (mut out, mut gate, mut up) = ([2.0], [x], [1.5]);
                glu_backward(activation, &mut out, &mut gate, &mut up);
                let want = 2.0 * (result(x + 1e-2) - result(x - 1e-2)) / 2e-2;
                assert!(
                    (f64::from(gate[0]) - want).abs() < 2e-3,
                    "{x}: {gate:?} {want}"
                );
                assert!((f64::from(out[0]) - result(x)).abs() < 1e-6);
                assert!((f64::from(up[0]) - 2.0 * result(x) / 1.5).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn gradients_of_rows_equal_finite_differences() {
        let n = 19;
        let x: Vec<f32> = (0..n).map(|i| ((i * 7) % 11) as f32 * 0.3 - 1.4).collect();
        let w: Vec<f32> = (0..n).map(|i| 0.5 + (i % 5) as f32 * 0.2).collect();
        let dy: Vec<f32> = (0..n).map(|i| ((i * 3) % 7) as f32 - 3.0).collect();
        let loss = |x: &[f32]| {
            let mut y = vec![0.0; n];
            rms_norm_row(&mut y, x, &w, 1e-5);
            f64::from(dot(&y, &dy))
        };
        let inverse = rms_norm_row(&mut vec![0.0; n], &x, &w, 1e-5);
        let mut dx = vec![0.0; n];
        rms_norm_backward_row(&mut dx, &dy, &x, &w, inverse);
        for i in 0..n {
            let (mut up, mut down) = (x.clone(), x.clone());
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let want = (loss(&up) - loss(&down)) / 2e-2;
            assert!(
                (f64::from(dx[i]) - want).abs() < 2e-3,
                "{i}: {} {want}",
                dx[i]
            );
        }
    }
}
