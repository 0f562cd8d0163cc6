//! RMS norm of many rows, forward and backward. The norm's weight is frozen.

use rayon::prelude::*;

use super::tape::NormTape;
use crate::kernels::vector;
use crate::profile::{self, Operation};

/// Rows per parallel task.
const ROWS: usize = 16;

/// Normalises each row of `x` into `out`; `inverse` gets `1 / rms` of each row.
pub(super) fn forward(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], eps: f64) {
    let _counted = profile::scope(Operation::Elementwise);
    let width = weight.len();
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width));
    rows.zip(inverse)
        .with_min_len(ROWS)
        .for_each(|((out, x), inverse)| {
            *inverse = vector::rms_norm_row(out, x, weight, eps as f32)
        });
}

/// The same result again, from `inverse`.
pub(super) fn again(out: &mut [f32], inverse: &[f32], x: &[f32], weight: &[f32]) {
    let _counted = profile::scope(Operation::Elementwise);
    let width = weight.len();
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width));
    rows.zip(inverse)
        .with_min_len(ROWS)
        .for_each(|((out, x), inverse)| vector::rescale_row(out, x, weight, *inverse));
}

/// Adds the gradient of `x` to `dx`.
pub(super) fn backward(dx: &mut [f32], dy: &[f32], inverse: &[f32], x: &[f32], weight: &[f32]) {
    let _counted = profile::scope(Operation::Elementwise);
    let width = weight.len();
    let rows = dx.par_chunks_mut(width).zip(dy.par_chunks(width));
    rows.zip(x.par_chunks(width))
        .zip(inverse)
        .with_min_len(ROWS)
        .for_each(|(((dx, dy), x), inverse)| {
            vector::rms_norm_backward_row(dx, dy, x, weight, *inverse);
        });
}

/// Normalises `rows` in place, in rows as wide as `weight`, and records it.
pub(super) fn forward_in_place(rows: &mut Vec<f32>, tape: &mut NormTape, weight: &[f32], eps: f64) {
    std::mem::swap(rows, &mut tape.x);
    forward(rows, &mut tape.inverse, &tape.x, weight, eps);
}

/// Turns the gradient of a recorded norm's result into that of its input. `spare` is room of the
/// same size.
pub(super) fn backward_in_place(
    d: &mut Vec<f32>,
    tape: &NormTape,
    weight: &[f32],
    spare: &mut Vec<f32>,
) {
    spare.fill(0.0);
    backward(spare, d, &tape.inverse, &tape.x, weight);
    std::mem::swap(d, spare);
}
