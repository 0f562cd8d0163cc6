//! Inputs as two bytes each: `x ≈ scale · (254 · a + b)`, with a scale for each block.

use rayon::prelude::*;

use super::{BLOCK, Kernel, ROUND, STEPS};
use crate::kernels::matmul::Threads;

/// Blocks of inputs that one thread rounds at a time.
const ROUNDED: usize = 256;

/// Rows of inputs, `[rows, inputs]`.
pub(super) struct Int8Rows {
    /// First and second bytes: a block of the ones, a block of the others, row by row.
    values: Vec<i8>,
    /// One a block.
    pub(super) scales: Vec<f32>,
    /// `scale · Σ (254 · a + b)`, one a block.
    sums: Vec<f32>,
}

impl Int8Rows {
    pub(super) fn new(kernel: Kernel, x: &[f32], threads: Threads) -> Self {
        let blocks = x.len() / BLOCK;
        let mut rows = Self {
            values: vec![0; 2 * x.len()],
            scales: vec![0.0; blocks],
            sums: vec![0.0; blocks],
        };
        if threads == Threads::One || x.len() <= ROUNDED * BLOCK {
            round(
                kernel,
                x,
                &mut rows.values,
                &mut rows.scales,
                &mut rows.sums,
            );
            return rows;
        }
        let targets = rows.values.par_chunks_mut(2 * ROUNDED * BLOCK);
        let targets = targets.zip(rows.scales.par_chunks_mut(ROUNDED));
        let targets = targets.zip(rows.sums.par_chunks_mut(ROUNDED));
        let parts = x.par_chunks(ROUNDED * BLOCK).zip(targets);
        parts.for_each(|(x, ((values, scales), sums))| round(kernel, x, values, scales, sums));
        rows
    }

    /// First bytes, second bytes, scale and scaled sum of a block.
    #[inline(always)]
    pub(super) fn block(
        &self,
        row: usize,
        index: usize,
        blocks: usize,
    ) -> (&[i8; BLOCK], &[i8; BLOCK], f32, f32) {
        let at = row * blocks + index;
        let (coarse, fine) = self.values[2 * at * BLOCK..2 * (at + 1) * BLOCK].split_at(BLOCK);
        let whole = "a slice of that length";
        (
            coarse.try_into().expect(whole),
            fine.try_into().expect(whole),
            self.scales[at],
            self.sums[at],
        )
    }
}

/// Rounds whole blocks of inputs.
#[allow(unsafe_code)]
fn round(kernel: Kernel, x: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
    match kernel {
        // SAFETY: `Kernel::all` names a kernel only where the processor has its instructions.
        #[cfg(target_arch = "x86_64")]
        Kernel::Vnni | Kernel::Avx2 => unsafe { super::x86::round_avx2(x, values, scales, sums) },
        Kernel::Portable => round_blocks(x, values, scales, sums),
    }
}

#[inline(always)]
pub(super) fn round_blocks(x: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
    let targets = values.chunks_exact_mut(2 * BLOCK).zip(scales).zip(sums);
    for (x, ((values, scale), scaled_sum)) in x.chunks_exact(BLOCK).zip(targets) {
        let (coarse, fine) = values.split_at_mut(BLOCK);
        let most = x.iter().fold(0f32, |most, v| most.max(v.abs()));
        let step = most / 127.0;
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let mut sum = 0i32;
        for ((a, b), x) in coarse.iter_mut().zip(fine).zip(x) {
            let exact = x * inverse;
            let whole = exact + ROUND;
            let rest = (exact - (whole - ROUND)) * STEPS as f32 + ROUND;
            *a = whole.to_bits() as i8;
            *b = rest.to_bits() as i8;
            sum += STEPS * i32::from(*a) + i32::from(*b);
        }
        *scale = step / STEPS as f32;
        *scaled_sum = *scale * sum as f32;
    }
}
