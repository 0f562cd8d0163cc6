//! Weights as bytes: `w ≈ low + scale · u`, with both factors for each block.

use rayon::prelude::*;

use super::{BLOCK, BYTES, Int8Matrix, PANEL, ROUND};

/// One block of a panel with its factors.
pub(super) struct Block<'a> {
    pub(super) weights: &'a [u8; BYTES],
    pub(super) scales: &'a [f32; PANEL],
    pub(super) lows: &'a [f32; PANEL],
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

    /// Bytes of the weights with their factors.
    pub(crate) fn bytes(&self) -> usize {
        let factors = self.scales.len() + self.lows.len();
        self.weights.len() + factors * size_of::<f32>()
    }

    /// The weights of an output, as they were rounded.
    pub(crate) fn row(&self, output: usize) -> Vec<f32> {
        let (panel, lane) = (output / PANEL, output % PANEL);
        let mut row = Vec::with_capacity(self.inputs);
        for index in 0..self.inputs / BLOCK {
            let block = self.block(panel, index);
            row.extend((0..BLOCK).map(|k| {
                let level = block.weights[k / 4 * 4 * PANEL + lane * 4 + k % 4];
                f32::from(level).mul_add(block.scales[lane], block.lows[lane])
            }));
        }
        row
    }

    #[inline(always)]
    pub(super) fn block(&self, panel: usize, index: usize) -> Block<'_> {
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
