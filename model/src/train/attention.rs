//! Causal attention over spans of rows that may share a prefix, forward and backward.
//!
//! A span may also see keys and values of a stretch that came before the pass; these get no
//! gradient. Queries, keys and values come as `[heads, tokens, head_dim]`, rotated. Knows no projection.
//! The scores are computed again in the backward pass, so memory grows with the tokens, not with
//! their square; the rows go block by block, so that little is computed of what they do not see.
//! Invariant: gradients that several spans send to the prefix are added in
//! the order of the spans, so equal inputs give equal bits.

mod backward;

use std::ops::Range;

use rayon::prelude::*;

use super::pack::Pack;
use super::past::Past;
use crate::config::LlamaConfig;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector;
use crate::kernels::window::blocks;
pub(super) use backward::OutGradient;

/// Consecutive rows that form one sequence: each sees the rows before it in the span, itself,
/// and the first `prefix` rows of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// First row.
    pub(super) start: usize,
    /// Number of rows.
    pub(super) len: usize,
    /// Number of leading rows of the matrix that the span sees too.
    pub(super) prefix: usize,
    /// Which entry of the pack's `past` it sees before all else, if any, and the tokens there.
    pub(super) past: Option<usize>,
    pub(super) past_len: usize,
}

impl Span {
    /// Columns before the span's own.
    fn before(&self) -> usize {
        self.past_len + self.prefix
    }
}

/// What attention reads: queries, keys, values, and how the rows belong together. The spans
/// cover all rows, in order.
pub(super) struct Attention<'a> {
    heads: usize,
    group: usize,
    dim: usize,
    tokens: usize,
    layer: usize,
    /// How many columns a row sees at most, its own included.
    window: Option<usize>,
    spans: &'a [Span],
    past: &'a [Vec<Past>],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// Some rows of a span, and the columns that any of them sees.
struct Block {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Block {
    /// Of some columns, those in the block: as rows of the values that the columns stand for,
    /// whose first is column `first`, and as a place in the block's scores.
    fn within(&self, first: usize, len: usize) -> (Range<usize>, usize) {
        let from = self.columns.start.max(first);
        let to = self.columns.end.min(first + len).max(from);
        (from - first..to - first, from - self.columns.start)
    }
}

#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    dp: Vec<f32>,
}

impl<'a> Attention<'a> {
    pub(super) fn new(
        config: &LlamaConfig,
        layer: usize,
        pack: &'a Pack,
        [q, k, v]: [&'a [f32]; 3],
    ) -> Self {
        let (spans, past) = (&pack.spans[..], &pack.past[..]);
        let tokens = spans.iter().map(|span| span.len).sum();
        Self {
            heads: config.heads,
            group: config.heads / config.kv_heads,
            dim: config.head_dim,
            tokens,
            layer,
            window: config.window(layer),
            spans,
            past,
            q,
            k,
            v,
        }
    }

    /// Writes `out` as `[heads, tokens, head_dim]` and, for the backward pass, `log_sums` as
    /// `[heads, tokens]`.
    pub(super) fn forward(&self, out: &mut [f32], log_sums: &mut [f32]) {
        let mut tasks = Vec::with_capacity(self.heads * self.spans.len());
        let outs = out.chunks_exact_mut(self.tokens * self.dim);
        let sums = log_sums.chunks_exact_mut(self.tokens);
        for (head, (out, sums)) in outs.zip(sums).enumerate().take(self.heads) {
            let outs = split(out, self.spans, self.dim);
            let sums = split(sums, self.spans, 1);
            let parts = self.spans.iter().zip(outs).zip(sums);
            tasks.extend(parts.map(|((span, out), sums)| (head, *span, out, sums)));
        }
        tasks.into_par_iter().for_each_init(
            Scratch::default,
            |scratch, (head, span, out, sums)| {
                for block in self.blocks(span) {
                    let width = self.scores(&mut scratch.p, head, span, &block);
                    let sums = &mut sums[block.rows.clone()];
                    let rows = scratch.p.chunks_exact_mut(width).zip(sums);
                    for (row, (p, sum)) in rows.enumerate() {
                        let seen = self.seen_in(span, &block, row);
                        *sum = vector::softmax_row(&mut p[seen.clone()], self.scale());
                        hide(p, &seen);
                    }
                    let values = self.parts(1, head / self.group, span);
                    self.times(out, &scratch.p, &block, &values);
                }
            },
        );
    }

    /// The blocks of a span.
    fn blocks(&self, span: Span) -> impl Iterator<Item = Block> {
        blocks(span.len, self.window).map(move |rows| {
            let columns = self.seen(span, rows.start).start..span.before() + rows.end;
            Block { rows, columns }
        })
    }

    /// The columns of a block that one of its rows sees.
    fn seen_in(&self, span: Span, block: &Block, row: usize) -> Range<usize> {
        let seen = self.seen(span, block.rows.start + row);
        seen.start - block.columns.start..seen.end - block.columns.start
    }

    /// The columns that a row of a span sees. They stand for tokens one after the other, from the
    /// sequence's first on.
    fn seen(&self, span: Span, row: usize) -> Range<usize> {
        let end = span.before() + row + 1;
        let first = self.window.map_or(0, |window| end.saturating_sub(window));
        first..end
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// `q · kᵀ` of one head and block, unscaled; returns the width of a row.
    fn scores(&self, p: &mut Vec<f32>, head: usize, span: Span, block: &Block) -> usize {
        let keys = self.parts(0, head / self.group, span);
        let queries = self.own(self.q, head, span).some_rows(block.rows.clone());
        self.against(p, queries, block, &keys)
    }

    /// The keys (0) or values (1) of all that a span sees, in order.
    fn parts(&self, which: usize, kv_head: usize, span: Span) -> Vec<Mat<'a>> {
        let all: &'a [Vec<Past>] = self.past;
        let past = span.past.map_or(&[][..], |at| &all[at][..]);
        let past = past
            .iter()
            .map(|past| past.head(self.layer, which, kv_head, self.dim));
        let values = [self.k, self.v][which];
        let prefix = (span.prefix > 0).then(|| self.prefix(values, kv_head, span));
        past.chain(prefix)
            .chain([self.own(values, kv_head, span)])
            .collect()
    }

    /// `out = rows · [parts]ᵀ`, of the columns of a block.
    fn against(
        &self,
        out: &mut Vec<f32>,
        rows: Mat<'_>,
        block: &Block,
        parts: &[Mat<'_>],
    ) -> usize {
        let width = block.columns.len();
        out.resize(block.rows.len() * width, 0.0);
        let mut first = 0;
        for part in parts {
            let (seen, at) = block.within(first, part.rows());
            first += part.rows();
            if seen.is_empty() {
                continue;
            }
            let part = part.some_rows(seen);
            let target = MatMut::strided(&mut out[at..], block.rows.len(), part.rows(), width);
            matmul(target, Into::Replace, 1.0, rows, part.t(), Threads::One);
        }
        width
    }

    /// `out = weights · [parts]` in the rows of a block; `out` is the whole span's.
    fn times(&self, out: &mut [f32], weights: &[f32], block: &Block, parts: &[Mat<'_>]) {
        let width = block.columns.len();
        let out = &mut out[block.rows.start * self.dim..block.rows.end * self.dim];
        let (mut first, mut into) = (0, Into::Replace);
        for part in parts {
            let (seen, at) = block.within(first, part.rows());
            first += part.rows();
            if seen.is_empty() {
                continue;
            }
            let part = part.some_rows(seen);
            let weights = Mat::strided(&weights[at..], block.rows.len(), part.rows(), width);
            let target = MatMut::new(out, block.rows.len(), self.dim);
            matmul(target, into, 1.0, weights, part, Threads::One);
            into = Into::Add;
        }
    }

    fn own(&self, values: &'a [f32], head: usize, span: Span) -> Mat<'a> {
        let at = (head * self.tokens + span.start) * self.dim;
        Mat::new(&values[at..], span.len, self.dim)
    }

    fn prefix(&self, values: &'a [f32], head: usize, span: Span) -> Mat<'a> {
        Mat::new(
            &values[head * self.tokens * self.dim..],
            span.prefix,
            self.dim,
        )
    }
}

/// Clears what a row does not see.
fn hide(row: &mut [f32], seen: &Range<usize>) {
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
}

/// The rows of each span, `width` values a row.
fn split<'b>(
    mut rows: &'b mut [f32],
    spans: &[Span],
    width: usize,
) -> impl Iterator<Item = &'b mut [f32]> {
    spans.iter().map(move |span| {
        let (head, rest) = std::mem::take(&mut rows).split_at_mut(span.len * width);
        rows = rest;
        head
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: usize = 2;
    const DIM: usize = 4;
    const SCALE: f64 = 0.5;

    fn spans() -> Vec<Span> {
        let span = |start, len, prefix| Span {
            start,
            len,
            prefix,
            past: None,
            past_len: 0,
        };
        vec![span(0, 10, 0), span(10, 90, 10), span(100, 33, 10)]
    }

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0)
            .collect()
    }

    fn attention<'a>(
        spans: &'a [Span],
        window: Option<usize>,
        [q, k, v]: [&'a [f32]; 3],
    ) -> Attention<'a> {
        Attention {
            heads: HEADS,
            group: HEADS,
            dim: DIM,
            tokens: spans.iter().map(|span| span.len).sum(),
            layer: 0,
            window,
            spans,
            past: &[],
            q,
            k,
            v,
        }
    }

    /// What attention returns, row by row and in f64, as `[tokens, heads · head_dim]`.
    fn slow(spans: &[Span], window: Option<usize>, [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
        let tokens: usize = spans.iter().map(|span| span.len).sum();
        let mut out = vec![0.0; tokens * HEADS * DIM];
        for span in spans {
            for (head, row) in (0..HEADS).flat_map(|h| (0..span.len).map(move |r| (h, r))) {
                let own = span.start..=span.start + row;
                let seen: Vec<usize> = (0..span.prefix).chain(own).collect();
                let first = seen.len().saturating_sub(window.unwrap_or(usize::MAX));
                let row = span.start + row;
                let query = &q[(head * tokens + row) * DIM..][..DIM];
                let score = |at: &usize| {
                    let key = &k[at * DIM..][..DIM];
                    let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                    (dot * SCALE).exp()
                };
                let scores: Vec<f64> = seen[first..].iter().map(score).collect();
                let total: f64 = scores.iter().sum();
                for (score, at) in scores.iter().zip(&seen[first..]) {
                    for d in 0..DIM {
                        out[(row * HEADS + head) * DIM + d] += score / total * v[at * DIM + d];
                    }
                }
            }
        }
        out
    }

    /// Compares results, and the gradients of every `every`th value, with the plain formula's.
    fn check(spans: &[Span], window: Option<usize>, every: usize) {
        let tokens: usize = spans.iter().map(|span| span.len).sum();
        let (q, g) = (
            numbers(HEADS * tokens * DIM, 1),
            numbers(HEADS * tokens * DIM, 2),
        );
        let (k, v) = (numbers(tokens * DIM, 3), numbers(tokens * DIM, 4));
        let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let attention = attention(spans, window, [&q, &k, &v]);
        let (mut heads, mut log_sums) = (vec![0f32; q.len()], vec![0f32; HEADS * tokens]);
        attention.forward(&mut heads, &mut log_sums);
        let mut out = vec![0f32; heads.len()];
        for (at, value) in heads.iter().enumerate() {
            let (head, rest) = (at / (tokens * DIM), at % (tokens * DIM));
            out[(rest / DIM * HEADS + head) * DIM + rest % DIM] = *value;
        }
        let wanted = slow(spans, window, [&wide(&q), &wide(&k), &wide(&v)]);
        let off = out
            .iter()
            .zip(&wanted)
            .map(|(a, b)| (f64::from(*a) - b).abs());
        assert!(off.fold(0.0, f64::max) < 1e-5, "{window:?}");

        let mut gradients = [
            vec![0f32; q.len()],
            vec![0f32; k.len()],
            vec![0f32; v.len()],
        ];
        let [dq, dk, dv] = &mut gradients;
        let given = OutGradient {
            out: &out,
            d_out: &g,
            log_sums: &log_sums,
        };
        attention.backward(&given, dq, dk, dv);
        let step = 1e-5;
        for (which, gradient) in gradients.iter().enumerate() {
            for at in (0..gradient.len()).step_by(every) {
                let loss = |by: f64| -> f64 {
                    let mut given = [wide(&q), wide(&k), wide(&v)];
                    given[which][at] += by;
                    let [q, k, v] = &given;
                    let out = slow(spans, window, [q, k, v]);
                    out.iter().zip(&g).map(|(o, g)| o * f64::from(*g)).sum()
                };
                let wanted = (loss(step) - loss(-step)) / (2.0 * step);
                let off = (f64::from(gradient[at]) - wanted).abs();
                assert!(off < 1e-4, "{window:?} {which} {at}: off by {off}");
            }
        }
    }

    #[test]
    fn windows_give_what_the_plain_formula_gives_and_its_gradients() {
        for window in [None, Some(1), Some(7), Some(50), Some(80), Some(1000)] {
            check(&spans(), window, 29);
        }
    }

    #[test]
    fn a_row_of_several_blocks_gives_the_same_and_its_gradients() {
        let row = Span {
            start: 0,
            len: 1100,
            prefix: 0,
            past: None,
            past_len: 0,
        };
        check(&[row], None, 997);
    }
}
