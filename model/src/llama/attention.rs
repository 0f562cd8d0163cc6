//! Causal attention of one run over the stretches that came before it and itself.

use super::kv_cache::LayerCache;
use crate::config::LlamaConfig;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector::softmax_row;

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
    let (width, kv_width, dim) = (config.q_width(), config.kv_width(), config.head_dim);
    let tokens = queries.len() / width;
    let context: usize = stretches.iter().map(|s| s.keys.len() / kv_width).sum();
    let group = config.heads / config.kv_heads;
    let window = config.window(layer);
    // With one token, the query heads that share a key head are the rows of one product; with
    // many, the tokens are.
    let (rows, stride, blocks) = match tokens {
        1 => (group, dim, config.kv_heads),
        _ => (tokens, width, config.heads),
    };
    scores.resize(rows * context, 0.0);
    for block in 0..blocks {
        let (start, kv) = match tokens {
            1 => (block * group * dim, block * dim),
            _ => (block * dim, block / group * dim),
        };
        let queries = Mat::strided(&queries[start..], rows, dim, stride);
        let mut column = 0;
        for stretch in stretches {
            let len = stretch.keys.len() / kv_width;
            if len == 0 {
                continue;
            }
            let keys = Mat::strided(&stretch.keys[kv..], len, dim, kv_width);
            let target = MatMut::strided(&mut scores[column..], rows, len, context);
            matmul(target, Into::Replace, 1.0, queries, keys.t(), threads);
            column += len;
        }
        for (row, scores) in scores.chunks_exact_mut(context).enumerate() {
            let visible = if tokens == 1 {
                context
            } else {
                context - tokens + row + 1
            };
            let first = window.map_or(0, |window| visible.saturating_sub(window));
            scores[..first].fill(0.0);
            softmax_row(&mut scores[first..visible], 1.0);
            scores[visible..].fill(0.0);
        }
        let mut column = 0;
        for stretch in stretches {
            let len = stretch.values.len() / kv_width;
            if len == 0 {
                continue;
            }
            let values = Mat::strided(&stretch.values[kv..], len, dim, kv_width);
            let weights = Mat::strided(&scores[column..], rows, len, context);
            let into = if column == 0 {
                Into::Replace
            } else {
                Into::Add
            };
            let target = MatMut::strided(&mut out[start..], rows, dim, stride);
            matmul(target, into, 1.0, weights, values, threads);
            column += len;
        }
    }
}
