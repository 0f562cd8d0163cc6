//! How attention is laid out on a device: which rows see what, and which block takes which rows.
//!
//! Knows no layer. Invariant: the tiles of a plan cover every pair of a row and a head once, and
//! those of keys every row of a pass once.

use super::backend::{Buffer, Gpu, View};
use super::ops::Attended;
use crate::config::LlamaConfig;
use crate::error::ModelError;

/// Floats of shared memory that every GPU gives a block: 48 KiB.
const SHARED: usize = 12 * 1024;
/// Pairs and keys of a block, the first that fits is taken; multiples of 4.
const BLOCKS: [Block; 6] = [
    Block { rows: 16, keys: 32 },
    Block { rows: 16, keys: 16 },
    Block { rows: 16, keys: 8 },
    Block { rows: 8, keys: 8 },
    Block { rows: 8, keys: 4 },
    Block { rows: 4, keys: 4 },
];

/// What one block computes at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub(super) rows: usize,
    pub(super) keys: usize,
}

/// The heads of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
}

/// Neighbouring keys and values of one sequence, `[tokens, kv_heads · dim]` in each layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    /// Addresses of the first layer's keys and values.
    pub(crate) keys: u64,
    pub(crate) values: u64,
    /// Values from one layer to the next.
    pub(crate) layer: usize,
    pub(crate) tokens: usize,
}

/// Neighbouring rows of one sequence, and all that they see; the last segment ends with them.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) segments: Vec<Segment>,
}

/// Tiles on the device.
#[derive(Debug)]
pub(super) struct Tiles {
    pub(super) table: Buffer<i32>,
    pub(super) count: usize,
    pub(super) block: Block,
}

/// Runs and tiles on the device.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(super) sizes: Sizes,
    /// All rows.
    pub(super) rows: usize,
    pub(super) runs: Buffer<i32>,
    pub(super) segments: Buffer<u64>,
    pub(super) forward: Tiles,
}

/// What the backward pass needs beside the plan.
#[derive(Debug)]
pub(crate) struct KeyTiles {
    pub(super) queries: Tiles,
    pub(super) keys: Tiles,
    /// Of each row in its sequence.
    pub(super) positions: Buffer<u32>,
}

impl Sizes {
    pub(crate) fn of(config: &LlamaConfig) -> Self {
        Self {
            heads: config.heads,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
        }
    }

    pub(super) fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    pub(super) fn check(self, rows: usize, values: Attended<'_>) {
        let Attended { q, out, log_sums } = values;
        assert_eq!(q.len(), rows * self.heads * self.dim, "queries");
        assert_eq!(out.len(), q.len(), "results");
        assert_eq!(log_sums.len(), rows * self.heads, "sums");
    }

    /// Shared memory of each kernel, in floats, as it divides it up.
    pub(super) fn shared_forward(self, block: Block) -> usize {
        let Block { rows, keys } = block;
        rows * (2 * self.dim + keys + 3) + keys * (self.dim + 1)
    }

    pub(super) fn shared_backward_q(self, block: Block) -> usize {
        let Block { rows, keys } = block;
        rows * (3 * self.dim + keys) + 2 * keys * (self.dim + 1)
    }

    pub(super) fn shared_backward_kv(self, block: Block) -> usize {
        let Block { rows, keys } = block;
        keys * (4 * self.dim + 2) + rows * (2 * self.dim + 2 * keys)
    }

    fn block(self, shared: impl Fn(Self, Block) -> usize) -> Result<Block, ModelError> {
        let fitting = BLOCKS.iter().find(|block| shared(self, **block) <= SHARED);
        fitting.copied().ok_or_else(|| {
            let dim = self.dim;
            ModelError::NoDevice(format!(
                "heads of {dim} values are too wide for it; use the CPU"
            ))
        })
    }

    fn tiles(self, gpu: &Gpu, runs: &[Run], block: Block) -> Result<Tiles, ModelError> {
        let group = self.heads / self.kv_heads;
        let table: Vec<i32> = runs
            .iter()
            .enumerate()
            .flat_map(|(run, at)| {
                let pairs = (0..at.rows * group).step_by(block.rows);
                pairs.flat_map(move |first| [run as i32, first as i32])
            })
            .collect();
        Ok(Tiles {
            count: table.len() / 2,
            table: gpu.copy_of(&table)?,
            block,
        })
    }
}

impl Plan {
    /// Lays out `runs`, which follow each other without a gap.
    pub(crate) fn new(gpu: &Gpu, sizes: Sizes, runs: &[Run]) -> Result<Self, ModelError> {
        let (mut table, mut segments, mut rows) = (Vec::new(), Vec::new(), 0);
        for run in runs {
            assert_eq!(run.first, rows, "runs without a gap");
            rows += run.rows;
            let from = segments.len() / 4;
            for segment in run.segments.iter().filter(|segment| segment.tokens > 0) {
                segments.extend([
                    segment.keys,
                    segment.values,
                    segment.layer as u64,
                    segment.tokens as u64,
                ]);
            }
            let to = segments.len() / 4;
            table.extend([run.first, run.rows, from, to].map(|n| n as i32));
        }
        let block = sizes.block(Sizes::shared_forward)?;
        Ok(Self {
            sizes,
            rows,
            runs: gpu.copy_of(&table)?,
            segments: gpu.copy_of(&segments)?,
            forward: sizes.tiles(gpu, runs, block)?,
        })
    }

    /// What the backward pass needs. `ends` tells of each run the row after the last that sees its
    /// rows; `positions` are those of the rows.
    pub(crate) fn key_tiles(
        &self,
        gpu: &Gpu,
        runs: &[Run],
        ends: &[usize],
        positions: &[u32],
    ) -> Result<KeyTiles, ModelError> {
        assert!(ends.len() == runs.len() && positions.len() == self.rows);
        let sizes = self.sizes;
        let block = sizes.block(Sizes::shared_backward_kv)?;
        let mut table = Vec::new();
        for (run, end) in runs.iter().zip(ends) {
            let after = run.first + run.rows;
            assert!(after <= *end && *end <= self.rows, "rows of the pass");
            for first in (run.first..after).step_by(block.keys) {
                let keys = block.keys.min(after - first);
                table.extend([first, keys, *end].map(|n| n as i32));
            }
        }
        let keys = Tiles {
            count: table.len() / 3,
            table: gpu.copy_of(&table)?,
            block,
        };
        let block = sizes.block(Sizes::shared_backward_q)?;
        Ok(KeyTiles {
            queries: sizes.tiles(gpu, runs, block)?,
            keys,
            positions: gpu.copy_of(positions)?,
        })
    }
}

/// Keys and values of all layers in one buffer: `[layers, 2, capacity, width]`.
pub(crate) fn segment_of(
    values: View<'_, f32>,
    width: usize,
    capacity: usize,
    start: usize,
    tokens: usize,
) -> Segment {
    assert!(start + tokens <= capacity && 2 * capacity * width <= values.len());
    let words = |n: usize| (n * size_of::<f32>()) as u64;
    let keys = values.address() + words(start * width);
    Segment {
        keys,
        values: keys + words(capacity * width),
        layer: 2 * capacity * width,
        tokens,
    }
}
