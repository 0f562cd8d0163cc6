//! The product of a tile without special instructions: what the other kernels give, step by step.

use super::inputs::Int8Rows;
use super::{BLOCK, Int8Matrix, PANEL, STEPS, TILE};

impl Int8Matrix {
    pub(super) fn tile_portable(
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
}
