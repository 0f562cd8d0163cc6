//! Linear layers on 8-bit weights, for inference.
//!
//! A row of weights is cut into blocks of 32; in each, `w ≈ low + scale · u` with `u` from 0 to
//! 255. 255 = 17 · 15 and 254 = 2 · 127, so what came from a file of 4 or 8 bits is kept exactly, up
//! to rounding.
//! The input is cut likewise into `x ≈ scale · (254 · a + b)`, `a` and `b` from -127 to 127: what
//! one byte would lose of it would be most of the error. The sums of products are whole numbers,
//! and what follows is computed in one order of fused steps: every instruction set gives the same
//! bits, and a row's result does not depend on the other rows.
//!
//! Weights lie in panels of 16 outputs, four inputs of each output side by side: what one
//! `vpdpbusd` takes. Knows no model.
//!
//! | file | what |
//! |---|---|
//! | `weights` | a matrix rounded to bytes |
//! | `inputs` | rows of inputs rounded to two bytes |
//! | `portable`, `x86` | the product of some rows and a panel, by instruction set |

mod inputs;
mod portable;
#[cfg(test)]
mod tests;
mod weights;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

use rayon::prelude::*;

use super::matmul::{Into, Threads};
use inputs::Int8Rows;

/// Inputs per block.
pub(crate) const BLOCK: usize = 32;
/// Outputs per panel.
const PANEL: usize = 16;
/// Bytes of a block of a panel.
const BYTES: usize = BLOCK * PANEL;
/// Steps of the second byte of an input in one of the first.
const STEPS: i32 = 254;
/// Rows that share one reading of the weights.
const TILE: usize = 4;
/// Adding this to a value below 2²² rounds it to a whole number, ties to even, which is then in the
/// low bits. Unlike a call to round, it needs no instruction that some processors lack.
const ROUND: f32 = 12_582_912.0;

/// A matrix of weights, `[outputs, inputs]`.
pub(crate) struct Int8Matrix {
    inputs: usize,
    outputs: usize,
    /// Blocks, panel by panel.
    weights: Vec<u8>,
    /// 16 a block.
    scales: Vec<f32>,
    /// 16 a block.
    lows: Vec<f32>,
}

/// Which instructions to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Any processor; slow.
    Portable,
}

impl Kernel {
    fn best() -> Self {
        Self::all()[0]
    }

    /// Those that this machine can run, the fastest first.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let vnni =
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
            if avx2 && vnni {
                all.push(Self::Vnni);
            }
            if avx2 {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }
}

/// Whether this machine computes on 8-bit weights faster than on f32.
pub(crate) fn is_fast() -> bool {
    Kernel::best() != Kernel::Portable
}

impl Int8Matrix {
    /// `out = x · wᵀ` or `out += x · wᵀ`, as [`linear`](super::rows::linear).
    pub(crate) fn linear(&self, x: &[f32], out: &mut [f32], into: Into, threads: Threads) {
        self.linear_by(Kernel::best(), x, out, into, threads);
    }

    fn linear_by(&self, kernel: Kernel, x: &[f32], out: &mut [f32], into: Into, threads: Threads) {
        debug_assert!(x.len().is_multiple_of(self.inputs));
        let x = Int8Rows::new(kernel, x, threads);
        let rows = x.scales.len() * BLOCK / self.inputs;
        assert_eq!(out.len(), rows * self.outputs, "matrix sizes do not fit");
        let panels = self.outputs.div_ceil(PANEL);
        let many = threads == Threads::All && rows * self.weights.len() >= 1 << 18;
        if !many || rayon::current_num_threads() == 1 {
            return self.panels(
                kernel,
                0..panels,
                &x,
                into,
                &mut Target::new(out, self.outputs, 0),
            );
        }
        // A task's outputs are columns of `out`: each computes into its own room.
        let share = panels.div_ceil(rayon::current_num_threads() * 2).max(4);
        let tasks: Vec<_> = (0..panels).step_by(share).collect();
        let parts: Vec<Vec<f32>> = tasks
            .par_iter()
            .map(|first| {
                let until = (first + share).min(panels);
                let columns = first * PANEL..(until * PANEL).min(self.outputs);
                let mut part = vec![0.0; rows * columns.len()];
                let mut target = Target::new(&mut part, columns.len(), columns.start);
                self.panels(kernel, *first..until, &x, Into::Replace, &mut target);
                part
            })
            .collect();
        for (first, part) in tasks.iter().zip(&parts) {
            let width = part.len() / rows;
            let rows = out
                .chunks_exact_mut(self.outputs)
                .zip(part.chunks_exact(width));
            for (out, part) in rows {
                let out = &mut out[first * PANEL..first * PANEL + width];
                match into {
                    Into::Replace => out.copy_from_slice(part),
                    Into::Add => out.iter_mut().zip(part).for_each(|(o, p)| *o += p),
                }
            }
        }
    }

    fn panels(
        &self,
        kernel: Kernel,
        panels: std::ops::Range<usize>,
        x: &Int8Rows,
        into: Into,
        target: &mut Target<'_>,
    ) {
        let rows = x.scales.len() * BLOCK / self.inputs;
        for panel in panels {
            let lanes = (self.outputs - panel * PANEL).min(PANEL);
            for first in (0..rows).step_by(TILE) {
                let count = (rows - first).min(TILE);
                let mut sums = [[0.0f32; PANEL]; TILE];
                self.tile(kernel, panel, first, count, x, &mut sums);
                for (row, sums) in sums[..count].iter().enumerate() {
                    target.put(first + row, panel * PANEL, &sums[..lanes], into);
                }
            }
        }
    }

    #[allow(unsafe_code)]
    fn tile(
        &self,
        kernel: Kernel,
        panel: usize,
        first: usize,
        count: usize,
        x: &Int8Rows,
        sums: &mut [[f32; PANEL]; TILE],
    ) {
        match kernel {
            // SAFETY: `Kernel::all` names a kernel only where the processor has its instructions.
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => unsafe { x86::tile_vnni(self, panel, first, count, x, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { x86::tile_avx2(self, panel, first, count, x, sums) },
            Kernel::Portable => self.tile_portable(panel, first, count, x, sums),
        }
    }
}

/// Where results go: a matrix of `width` columns, the first of which is column `start`.
struct Target<'a> {
    out: &'a mut [f32],
    width: usize,
    start: usize,
}

impl<'a> Target<'a> {
    fn new(out: &'a mut [f32], width: usize, start: usize) -> Self {
        Self { out, width, start }
    }

    #[inline(always)]
    fn put(&mut self, row: usize, column: usize, values: &[f32], into: Into) {
        let at = row * self.width + column - self.start;
        let out = &mut self.out[at..at + values.len()];
        match into {
            Into::Replace => out.copy_from_slice(values),
            Into::Add => out.iter_mut().zip(values).for_each(|(o, v)| *o += v),
        }
    }
}
