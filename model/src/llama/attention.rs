//! Causal attention of one run over the stretches that came before it and itself.
//!
//! Tokens go block by block, so that the scores of a long run take little room, and little is
//! computed of what the tokens do not see.

use super::kv_cache::LayerCache;
use crate::config::LlamaConfig;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector::softmax_row;
use crate::kernels::window::blocks;

/// Attends `queries` (`[tokens, heads * head_dim]`, rotated and scaled) to all tokens of
/// `stretches`, the last of which ends with the run's own, or to the last of them where `layer` is
/// a local one; writes `out` of the same shape. `scores` is scratch space.
pub(super) fn attend(
    config: &LlamaConfig,
    layer: usize,
    queries: &[f32],
    stretches: &[&LayerCache],
    out: &mut [f32],
    scores: &mut Vec<f32>,
    threads: Threads,
) {
    let (width, kv_width) = (config.q_width(), config.kv_width());
    let context: usize = stretches.iter().map(|s| s.keys.len() / kv_width).sum();
    let tokens = queries.len() / width;
    let before = context - tokens;
    let window = config.window(layer);
    for rows in blocks(tokens, window) {
        let seen = Seen {
            first: window.map_or(0, |window| (before + rows.start + 1).saturating_sub(window)),
            end: before + rows.end,
            window,
        };
        let values = rows.start * width..rows.end * width;
        let (queries, out) = (&queries[values.clone()], &mut out[values]);
        attend_block(config, &seen, queries, stretches, out, scores, threads);
    }
}

/// What the queries of a block see of the tokens.
struct Seen {
    /// The first one that any of them sees.
    first: usize,
    /// Behind the one that the last query sees last.
    end: usize,
    window: Option<usize>,
}

/// The part of a stretch that a block sees.
struct Part<'a> {
    /// `[len, kv_width]` each.
    keys: &'a [f32],
    values: &'a [f32],
    len: usize,
    /// Where its scores begin in a row of them.
    column: usize,
}

impl Seen {
    fn parts<'a>(&self, stretches: &[&'a LayerCache], kv_width: usize) -> Vec<Part<'a>> {
        let (mut parts, mut at) = (Vec::with_capacity(stretches.len()), 0);
        for stretch in stretches {
            let len = stretch.keys.len() / kv_width;
            let (from, to) = (self.first.max(at), self.end.min(at + len));
            if from < to {
                let values = (from - at) * kv_width..(to - at) * kv_width;
                parts.push(Part {
                    keys: &stretch.keys[values.clone()],
                    values: &stretch.values[values],
                    len: to - from,
                    column: from - self.first,
                });
            }
            at += len;
        }
        parts
    }
}

fn attend_block(
    config: &LlamaConfig,
    seen: &Seen,
    queries: &[f32],
    stretches: &[&LayerCache],
    out: &mut [f32],
    scores: &mut Vec<f32>,
    threads: Threads,
) {
    let (width, kv_width, dim) = (config.q_width(), config.kv_width(), config.head_dim);
    let tokens = queries.len() / width;
    let columns = seen.end - seen.first;
    let group = config.heads / config.kv_heads;
    // With one token, the query heads that share a key head are the rows of one product; with
    // many, the tokens are.
    let (rows, stride, blocks) = match tokens {
        1 => (group, dim, config.kv_heads),
        _ => (tokens, width, config.heads),
    };
    let parts = seen.parts(stretches, kv_width);
    scores.resize(rows * columns, 0.0);
    for block in 0..blocks {
        let (start, kv) = match tokens {
            1 => (block * group * dim, block * dim),
            _ => (block * dim, block / group * dim),
        };
        let queries = Mat::strided(&queries[start..], rows, dim, stride);
        for part in &parts {
            let keys = Mat::strided(&part.keys[kv..], part.len, dim, kv_width);
            let target = MatMut::strided(&mut scores[part.column..], rows, part.len, columns);
            matmul(target, Into::Replace, 1.0, queries, keys.t(), threads);
        }
        for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
            let visible = if tokens == 1 {
                columns
            } else {
                columns - tokens + row + 1
            };
            let first = seen.window.map_or(0, |w| visible.saturating_sub(w));
            scores[..first].fill(0.0);
            softmax_row(&mut scores[first..visible], 1.0);
            scores[visible..].fill(0.0);
        }
        let mut into = Into::Replace;
        for part in &parts {
            let values = Mat::strided(&part.values[kv..], part.len, dim, kv_width);
            let weights = Mat::strided(&scores[part.column..], rows, part.len, columns);
            let target = MatMut::strided(&mut out[start..], rows, dim, stride);
            matmul(target, into, 1.0, weights, values, threads);
            into = Into::Add;
        }
    }
}
