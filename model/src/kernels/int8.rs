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

use rayon::prelude::*;

use super::matmul::{Into, Threads};

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
/// Blocks of inputs that one thread rounds at a time.
const ROUNDED: usize = 256;

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

/// Rows of inputs, `[rows, inputs]`.
struct Int8Rows {
    /// First and second bytes: a block of the ones, a block of the others, row by row.
    values: Vec<i8>,
    /// One a block.
    scales: Vec<f32>,
    /// `scale · Σ (254 · a + b)`, one a block.
    sums: Vec<f32>,
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

/// One block of a panel with its factors.
struct Block<'a> {
    weights: &'a [u8; BYTES],
    scales: &'a [f32; PANEL],
    lows: &'a [f32; PANEL],
}

impl Int8Matrix {
    /// Rounds `weights`, `[outputs, inputs]`. `None` when `inputs` is no multiple of 32.
    pub(crate) fn new(weights: &[f32], inputs: usize) -> Option<Self> {
        if inputs == 0 || !inputs.is_multiple_of(BLOCK) {
            return None;
        }
        let outputs = weights.len() / inputs;
        let blocks = inputs / BLOCK;
        let panels = outputs.div_ceil(PANEL);
        let mut matrix = Self {
            inputs,
            outputs,
            weights: vec![0; panels * blocks * BYTES],
            scales: vec![0.0; panels * blocks * PANEL],
            lows: vec![0.0; panels * blocks * PANEL],
        };
        let targets = matrix.weights.par_chunks_mut(blocks * BYTES);
        let targets = targets.zip(matrix.scales.par_chunks_mut(blocks * PANEL));
        let targets = targets.zip(matrix.lows.par_chunks_mut(blocks * PANEL));
        let rows = weights.par_chunks(PANEL * inputs);
        rows.zip(targets)
            .for_each(|(rows, ((bytes, scales), lows))| {
                for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                    for (block, values) in row.chunks_exact(BLOCK).enumerate() {
                        let (low, scale) = range(values);
                        scales[block * PANEL + lane] = scale;
                        lows[block * PANEL + lane] = low;
                        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                        for (k, value) in values.iter().enumerate() {
                            let at = block * BYTES + k / 4 * 4 * PANEL + lane * 4 + k % 4;
                            bytes[at] = nearest((value - low) * inverse).clamp(0.0, 255.0) as u8;
                        }
                    }
                }
            });
        Some(matrix)
    }

    /// `out = x · wᵀ` or `out += x · wᵀ`, as [`super::rows::linear`].
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

    fn tile_portable(
        &self,
        panel: usize,
        first: usize,
        count: usize,
        x: &Int8Rows,
        sums: &mut [[f32; PANEL]; TILE],
    ) {
        let blocks = self.inputs / BLOCK;
        for index in 0..blocks {
            let block = self.block(panel, index);
            for (row, sums) in sums[..count].iter_mut().enumerate() {
                let (coarse, fine, scale, sum) = x.block(first + row, index, blocks);
                for (lane, total) in sums.iter_mut().enumerate() {
                    let mut whole = 0i32;
                    for (k, (a, b)) in coarse.iter().zip(fine).enumerate() {
                        let weight = block.weights[k / 4 * 4 * PANEL + lane * 4 + k % 4];
                        whole += i32::from(weight) * (STEPS * i32::from(*a) + i32::from(*b));
                    }
                    let product = whole as f32 * block.scales[lane];
                    *total = product.mul_add(scale, *total);
                    *total = block.lows[lane].mul_add(sum, *total);
                }
            }
        }
    }

    #[inline(always)]
    fn block(&self, panel: usize, index: usize) -> Block<'_> {
        let at = panel * (self.inputs / BLOCK) + index;
        let factors = at * PANEL..(at + 1) * PANEL;
        let whole = "a slice of that length";
        Block {
            weights: self.weights[at * BYTES..(at + 1) * BYTES]
                .try_into()
                .expect(whole),
            scales: self.scales[factors.clone()].try_into().expect(whole),
            lows: self.lows[factors].try_into().expect(whole),
        }
    }
}

/// The least level and the step between 256 of them: the best of three grids, which hold blocks
/// of Q4_1, Q8_0 and Q4_0 files exactly.
fn range(values: &[f32]) -> (f32, f32) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let most = low.abs().max(high);
    let eighth = most / 8.0;
    let start = if -low > high { low } else { -7.0 * eighth };
    let grids = [
        (low, (high - low) / 255.0),
        (-most, most / 127.0),
        (start, eighth / 17.0),
    ];
    let error = |(low, scale): (f32, f32)| -> f32 {
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let off = |value: &f32| {
            let level = nearest((value - low) * inverse);
            let off = low + level.clamp(0.0, 255.0) * scale - value;
            off * off
        };
        values.iter().map(off).sum()
    };
    let mut best = (grids[0], error(grids[0]));
    for grid in &grids[1..] {
        let error = error(*grid);
        if error < best.1 {
            best = (*grid, error);
        }
    }
    best.0
}

#[inline(always)]
fn nearest(value: f32) -> f32 {
    (value + ROUND) - ROUND
}

impl Int8Rows {
    fn new(kernel: Kernel, x: &[f32], threads: Threads) -> Self {
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
    fn block(
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
        Kernel::Vnni | Kernel::Avx2 => unsafe { x86::round_avx2(x, values, scales, sums) },
        Kernel::Portable => round_blocks(x, values, scales, sums),
    }
}

#[inline(always)]
fn round_blocks(x: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
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

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Int8Matrix, Int8Rows, PANEL, STEPS, TILE, round_blocks};

    /// Four values of a row as the bits that are broadcast to all lanes.
    #[inline(always)]
    fn four(values: &[i8; BLOCK], group: usize) -> i32 {
        let v = &values[4 * group..4 * group + 4];
        i32::from_le_bytes([v[0] as u8, v[1] as u8, v[2] as u8, v[3] as u8])
    }

    /// # Safety
    /// The processor must have AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn round_avx2(
        x: &[f32],
        values: &mut [i8],
        scales: &mut [f32],
        sums: &mut [f32],
    ) {
        round_blocks(x, values, scales, sums);
    }

    /// # Safety
    /// The processor must have AVX-512F and AVX-512 VNNI.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn tile_vnni(
        matrix: &Int8Matrix,
        panel: usize,
        first: usize,
        count: usize,
        x: &Int8Rows,
        sums: &mut [[f32; PANEL]; TILE],
    ) {
        let blocks = matrix.inputs / BLOCK;
        let mut totals = [_mm512_setzero_ps(); TILE];
        for index in 0..blocks {
            let block = matrix.block(panel, index);
            // SAFETY: a block has 8 · 64 bytes, its factors 16 values of 4 bytes each.
            let (weights, scales, lows) = unsafe {
                let from = block.weights.as_ptr();
                let weights: [__m512i; 8] =
                    std::array::from_fn(|g| _mm512_loadu_si512(from.add(64 * g).cast()));
                (
                    weights,
                    _mm512_loadu_ps(block.scales.as_ptr()),
                    _mm512_loadu_ps(block.lows.as_ptr()),
                )
            };
            for (row, total) in totals.iter_mut().enumerate().take(count) {
                let (coarse, fine, scale, sum) = x.block(first + row, index, blocks);
                let (mut a, mut b) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                for (group, weights) in weights.iter().enumerate() {
                    a = _mm512_dpbusd_epi32(a, *weights, _mm512_set1_epi32(four(coarse, group)));
                    b = _mm512_dpbusd_epi32(b, *weights, _mm512_set1_epi32(four(fine, group)));
                }
                let a = _mm512_mullo_epi32(a, _mm512_set1_epi32(STEPS));
                let whole = _mm512_cvtepi32_ps(_mm512_add_epi32(a, b));
                let product = _mm512_mul_ps(whole, scales);
                *total = _mm512_fmadd_ps(product, _mm512_set1_ps(scale), *total);
                *total = _mm512_fmadd_ps(lows, _mm512_set1_ps(sum), *total);
            }
        }
        for (sums, total) in sums.iter_mut().zip(totals) {
            // SAFETY: 16 values.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), total) };
        }
    }

    /// # Safety
    /// The processor must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile_avx2(
        matrix: &Int8Matrix,
        panel: usize,
        first: usize,
        count: usize,
        x: &Int8Rows,
        sums: &mut [[f32; PANEL]; TILE],
    ) {
        let blocks = matrix.inputs / BLOCK;
        for half in 0..2 {
            let mut totals = [_mm256_setzero_ps(); TILE];
            for index in 0..blocks {
                let block = matrix.block(panel, index);
                // SAFETY: half a row of 64 bytes in each of 8 groups; 8 of 16 factors.
                let (weights, scales, lows) = unsafe {
                    let from = block.weights.as_ptr().add(32 * half);
                    let weights: [__m256i; 8] =
                        std::array::from_fn(|g| _mm256_loadu_si256(from.add(64 * g).cast()));
                    (
                        weights,
                        _mm256_loadu_ps(block.scales.as_ptr().add(8 * half)),
                        _mm256_loadu_ps(block.lows.as_ptr().add(8 * half)),
                    )
                };
                for (row, total) in totals.iter_mut().enumerate().take(count) {
                    let (coarse, fine, scale, sum) = x.block(first + row, index, blocks);
                    let a = dot_avx2(&weights, coarse);
                    let a = _mm256_mullo_epi32(a, _mm256_set1_epi32(STEPS));
                    let whole = _mm256_add_epi32(a, dot_avx2(&weights, fine));
                    let whole = _mm256_cvtepi32_ps(whole);
                    let product = _mm256_mul_ps(whole, scales);
                    *total = _mm256_fmadd_ps(product, _mm256_set1_ps(scale), *total);
                    *total = _mm256_fmadd_ps(lows, _mm256_set1_ps(sum), *total);
                }
            }
            for (sums, total) in sums.iter_mut().zip(totals) {
                // SAFETY: 8 of 16 values.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * half), total) };
            }
        }
    }

    /// The sums of 8 lanes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn dot_avx2(weights: &[__m256i; 8], values: &[i8; BLOCK]) -> __m256i {
        // Products of whole bytes would not fit 16 bits; of halves, 8 sums do.
        let nibble = _mm256_set1_epi8(15);
        let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for (group, weights) in weights.iter().enumerate() {
            let four = _mm256_set1_epi32(four(values, group));
            let part = _mm256_and_si256(*weights, nibble);
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(part, four));
            let part = _mm256_and_si256(_mm256_srli_epi16(*weights, 4), nibble);
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(part, four));
        }
        let ones = _mm256_set1_epi16(1);
        let low = _mm256_madd_epi16(low, ones);
        let high = _mm256_slli_epi32(_mm256_madd_epi16(high, ones), 4);
        _mm256_add_epi32(low, high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 504.5 - 1.0)
            .collect()
    }

    /// Rows, inputs and outputs around the sizes of tiles and panels.
    const SHAPES: [(usize, usize, usize); 5] = [
        (1, 32, 1),
        (3, 64, 16),
        (4, 96, 17),
        (9, 576, 40),
        (130, 64, 300),
    ];

    #[test]
    fn products_are_close_to_those_of_f32() {
        for (rows, inputs, outputs) in SHAPES {
            let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
            let matrix = Int8Matrix::new(&w, inputs).expect("whole blocks");
            let mut out = vec![1.0; rows * outputs];
            matrix.linear(&x, &mut out, Into::Add, Threads::All);
            for (at, got) in out.iter().enumerate() {
                let x = &x[at / outputs * inputs..][..inputs];
                let w = &w[at % outputs * inputs..][..inputs];
                let want: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                // Half a level of weights up to 1, whose errors add as noise.
                let bound = 0.01 * (inputs as f32).sqrt();
                assert!((got - 1.0 - want).abs() < bound, "{got} is not 1 + {want}");
            }
        }
    }

    #[test]
    fn every_instruction_set_and_thread_plan_gives_the_same_bits() {
        for (rows, inputs, outputs) in SHAPES {
            let (x, w) = (values(rows * inputs, 3), values(outputs * inputs, 4));
            let matrix = Int8Matrix::new(&w, inputs).expect("whole blocks");
            let run = |kernel, threads| {
                let mut out = vec![0.5; rows * outputs];
                matrix.linear_by(kernel, &x, &mut out, Into::Add, threads);
                out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            let portable = run(Kernel::Portable, Threads::One);
            for kernel in Kernel::all() {
                assert_eq!(run(kernel, Threads::One), portable, "{kernel:?}");
                assert_eq!(run(kernel, Threads::All), portable, "{kernel:?}");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (x, w) = (values(9 * 64, 5), values(20 * 64, 6));
        let matrix = Int8Matrix::new(&w, 64).expect("whole blocks");
        let mut all = vec![0.0; 9 * 20];
        matrix.linear(&x, &mut all, Into::Replace, Threads::One);
        for (x, want) in x.chunks(64).zip(all.chunks(20)) {
            let mut out = vec![0.0; 20];
            matrix.linear(x, &mut out, Into::Replace, Threads::One);
            assert_eq!(out, want);
        }
    }

    #[test]
    fn weights_of_four_and_eight_bits_are_kept() {
        let level = |i: usize, levels: usize| ((i * 7) % levels) as f32;
        let blocks = |value: &dyn Fn(usize) -> f32| (0..64).map(value).collect::<Vec<_>>();
        for w in [
            // Q4_1: 16 even levels, both ends in use.
            blocks(&|i| -0.3 + 0.04 * level(i, 16)),
            // Q4_0: the largest value is 8 steps from zero, on either side; 15 levels are used.
            blocks(&|i| 0.02 * (level(i, 15) - 8.0)),
            blocks(&|i| -0.02 * (level(i, 15) - 8.0)),
            // Q8_0: the largest value is 127 steps from zero.
            blocks(&|i| match i % 32 {
                0 => 0.127,
                _ => 0.001 * (level(i, 255) - 127.0),
            }),
        ] {
            let matrix = Int8Matrix::new(&w, 64).expect("whole blocks");
            for unit in 0..64 {
                let mut x = vec![0.0; 64];
                x[unit] = 1.0;
                let mut out = vec![0.0];
                matrix.linear(&x, &mut out, Into::Replace, Threads::One);
                assert!((out[0] - w[unit]).abs() < 1e-6, "{} {}", out[0], w[unit]);
            }
        }
    }

    #[test]
    fn extremes_do_not_overflow() {
        let x = vec![-1.0f32; 64];
        let w: Vec<f32> = (0..64)
            .map(|i| if i % 32 == 0 { 0.0 } else { 1.0 })
            .collect();
        let matrix = Int8Matrix::new(&w, 64).expect("whole blocks");
        for kernel in Kernel::all() {
            let mut out = vec![0.0];
            matrix.linear_by(kernel, &x, &mut out, Into::Replace, Threads::One);
            assert!((out[0] + 62.0).abs() < 1e-3, "{kernel:?}: {}", out[0]);
        }
        assert!(Int8Matrix::new(&w, 16 + 32).is_none());
    }
}
