//! Rotary position embedding, together with the change between rows of tokens and heads.
//!
//! Linear layers see `[tokens, heads · head_dim]`; attention sees `[heads, tokens, head_dim]`,
//! so that a head is one contiguous block. Knows no attention. Invariant: the backward of a
//! rotation is the rotation by the opposite angle.

use rayon::prelude::*;

use crate::config::LlamaConfig;

/// Cosines and sines of every position, `[positions, head_dim / 2]` each.
pub(super) struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

/// Which way to turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// By the angle of the position.
    Forward,
    /// Back again: the gradient of `Forward`.
    Backward,
    /// Not at all, for values.
    None,
}

impl Rope {
    /// Tables for positions below `positions`, one for each of the model's frequency tables.
    pub(super) fn tables(config: &LlamaConfig, positions: usize) -> Vec<Self> {
        let tables = config.frequency_tables().into_iter();
        tables.map(|table| Self::new(&table, positions)).collect()
    }

    fn new(frequencies: &[f64], positions: usize) -> Self {
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (sin, cos) = angles
            .map(|angle| (angle.sin() as f32, angle.cos() as f32))
            .unzip();
        Self {
            cos,
            sin,
            half: frequencies.len(),
        }
    }

    /// Cosines and sines, `[positions, head_dim / 2]` each.
    #[cfg(feature = "cuda")]
    pub(super) fn angles(&self) -> [&[f32]; 2] {
        [&self.cos, &self.sin]
    }

    /// From rows of tokens to heads; `positions[i]` is the position of row `i`.
    pub(super) fn split(&self, out: &mut [f32], rows: &[f32], positions: &[u32], turn: Turn) {
        let (dim, tokens) = (2 * self.half, positions.len());
        let width = rows.len() / tokens.max(1);
        let heads = out.par_chunks_mut((tokens * dim).max(1)).enumerate();
        heads.for_each(|(head, out)| {
            let rows = rows.chunks_exact(width);
            for ((out, row), position) in out.chunks_exact_mut(dim).zip(rows).zip(positions) {
                out.copy_from_slice(&row[head * dim..(head + 1) * dim]);
                self.turn(out, *position, turn);
            }
        });
    }

    /// From heads back to rows of tokens.
    pub(super) fn merge(&self, out: &mut [f32], heads: &[f32], positions: &[u32], turn: Turn) {
        let (dim, tokens) = (2 * self.half, positions.len());
        let width = out.len() / tokens.max(1);
        let rows = out.par_chunks_mut(width.max(1)).with_min_len(16);
        rows.zip(positions)
            .enumerate()
            .for_each(|(row, (out, position))| {
                for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                    let start = (head * tokens + row) * dim;
                    out.copy_from_slice(&heads[start..start + dim]);
                    self.turn(out, *position, turn);
                }
            });
    }

    #[inline]
    fn turn(&self, head: &mut [f32], position: u32, turn: Turn) {
        let sign = match turn {
            Turn::None => return,
            Turn::Forward => 1.0,
            Turn::Backward => -1.0,
        };
        let at = position as usize * self.half;
        let (cos, sin) = (&self.cos[at..at + self.half], &self.sin[at..at + self.half]);
        let (low, high) = head.split_at_mut(self.half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b, sin) = (*low, *high, sign * sin);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayerParts;

    #[test]
    fn backward_undoes_forward() {
        let config = LlamaConfig {
            hidden: 12,
            layers: 1,
            heads: 3,
            kv_heads: 3,
            head_dim: 4,
            ffn: 8,
            vocab: 8,
            context: 64,
            rope_theta: 100.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tied_head: true,
            parts: LayerParts::LLAMA,
            local: None,
        };
        let rope = Rope::tables(&config, 10).remove(0);
        let rows: Vec<f32> = (0..5 * 12).map(|i| i as f32).collect();
        let positions = [0, 1, 2, 7, 9];
        let (mut heads, mut back) = (vec![0.0; 60], vec![0.0; 60]);
        rope.split(&mut heads, &rows, &positions, Turn::Forward);
        assert_eq!(heads[..4], rows[..4]);
        assert_ne!(heads[4..8], rows[12..16]);
        rope.merge(&mut back, &heads, &positions, Turn::Backward);
        assert!(rows.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}
