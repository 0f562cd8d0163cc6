//! Attention alone.

use super::{assert_close, devices};
use crate::config::LlamaConfig;
use crate::gpu::{Attended, Layer, Plan, Run, Sizes, segment_of};
use crate::train::tiny;

/// Attention of one head over all columns up to `end`, or the last `window` of them, in f64.
fn slow_attention(q: &[f32], k: &[&[f32]], v: &[&[f32]], window: Option<usize>) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    let first = window.map_or(0, |window| k.len().saturating_sub(window));
    let scale = 1.0 / (q.len() as f64).sqrt();
    let scores: Vec<f64> = k[first..]
        .iter()
        .map(|k| (dot(q, k) * scale).exp())
        .collect();
    let total: f64 = scores.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (score, v) in scores.iter().zip(&v[first..]) {
        for (out, v) in out.iter_mut().zip(*v) {
            *out += score / total * f64::from(*v);
        }
    }
    out
}

/// Heads of real widths, more keys than a block takes, segments, groups and windows.
#[test]
fn attention_of_real_heads_equals_a_plain_implementation() {
    let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0;
    for (heads, kv_heads, dim) in [(6, 2, 64), (4, 4, 128), (3, 1, 256), (2, 1, 80)] {
        for gpu in devices() {
            for window in [None, Some(20)] {
                let (past, rows) = (37, 43);
                let (width, kv) = (heads * dim, kv_heads * dim);
                let total = past + rows;
                let q: Vec<f32> = (0..rows * width).map(value).collect();
                // Two layers; the second one is asked for.
                let part = |tokens: usize, seed: usize| -> Vec<f32> {
                    (0..2 * 2 * tokens * kv).map(|i| value(i + seed)).collect()
                };
                let (before, own) = (part(past, 5), part(rows, 77));
                let buffers = [gpu.copy_of(&before).unwrap(), gpu.copy_of(&own).unwrap()];
                let segments = vec![
                    segment_of(buffers[0].all(), kv, past, 0, past),
                    segment_of(buffers[1].all(), kv, rows, 0, rows),
                ];
                let sizes = Sizes::of(&LlamaConfig {
                    heads,
                    kv_heads,
                    head_dim: dim,
                    ..tiny::config()
                });
                let run = Run {
                    first: 0,
                    rows,
                    segments,
                };
                let plan = Plan::new(&gpu, sizes, &[run]).unwrap();
                let (q_there, out) = (gpu.copy_of(&q).unwrap(), gpu.room(q.len()).unwrap());
                let log_sums = gpu.room(rows * heads).unwrap();
                let values = Attended {
                    q: q_there.all(),
                    out: out.all(),
                    log_sums: log_sums.all(),
                };
                gpu.attention(&plan, Layer { slot: 1, window }, values)
                    .unwrap();
                let got = out.all().read(&gpu).unwrap();
                let row = |which: usize, token: usize, head: usize| {
                    let (values, tokens, at) = match token.checked_sub(past) {
                        None => (&before, past, token),
                        Some(at) => (&own, rows, at),
                    };
                    let start = ((2 + which) * tokens + at) * kv + head * dim;
                    &values[start..start + dim]
                };
                for token in 0..rows {
                    for head in 0..heads {
                        let kv_head = head / (heads / kv_heads);
                        let end = total - rows + token + 1;
                        let k: Vec<&[f32]> = (0..end).map(|t| row(0, t, kv_head)).collect();
                        let v: Vec<&[f32]> = (0..end).map(|t| row(1, t, kv_head)).collect();
                        let at = token * width + head * dim;
                        let wanted = slow_attention(&q[at..at + dim], &k, &v, window);
                        let wanted: Vec<f32> = wanted.iter().map(|v| *v as f32).collect();
                        let what = format!("{dim} {window:?} row {token} head {head}");
                        assert_close(&got[at..at + dim], &wanted, 2e-5, &what);
                    }
                }
            }
        }
    }
}
