//! Causal attention over spans of rows that may share a prefix, forward and backward.
//!
//! A span may also see keys and values of a stretch that came before the pass; these get no
//! gradient. Queries, keys and values come as `[heads, tokens, head_dim]`, rotated. Knows no projection.
//! The scores are computed again in the backward pass, so memory grows with the tokens, not with
//! their square. Invariant: gradients that several spans send to the prefix are added in the
//! order of the spans, so equal inputs give equal bits.

use std::ops::Range;

use rayon::prelude::*;

use super::pack::Pack;
use super::past::Past;
use crate::config::LlamaConfig;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector;

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

/// The result of the forward pass and its gradient, as rows of tokens.
pub(super) struct OutGradient<'a> {
    /// What [`Attention::forward`] gave, merged to `[tokens, heads · head_dim]`.
    pub(super) out: &'a [f32],
    /// Its gradient, of the same shape.
    pub(super) d_out: &'a [f32],
    /// What [`Attention::forward`] returned.
    pub(super) log_sums: &'a [f32],
}

struct BackwardTask<'b> {
    kv_head: usize,
    span: Span,
    dq: Vec<&'b mut [f32]>,
    dk: &'b mut [f32],
    dv: &'b mut [f32],
}

#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    dp: Vec<f32>,
}

/// Gradients that a span sends to the keys and values of the prefix.
struct PrefixGradient {
    kv_head: usize,
    dk: Vec<f32>,
    dv: Vec<f32>,
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
                let width = self.scores(&mut scratch.p, head, span);
                for (row, (p, sum)) in scratch.p.chunks_exact_mut(width).zip(sums).enumerate() {
                    let seen = self.seen(span, row);
                    *sum = vector::softmax_row(&mut p[seen.clone()], self.scale());
                    hide(p, &seen);
                }
                let kv_head = head / self.group;
                let values = self.parts(1, kv_head, span);
                self.times(out, &scratch.p, span, &values);
            },
        );
    }

    /// Writes the gradients of queries, keys and values, each shaped as the value itself.
    pub(super) fn backward(
        &self,
        given: &OutGradient<'_>,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let size = self.tokens * self.dim;
        let mut tasks = Vec::new();
        let kv = dk.chunks_exact_mut(size).zip(dv.chunks_exact_mut(size));
        let groups = dq.chunks_exact_mut(self.group * size).zip(kv);
        for (kv_head, (dq, (dk, dv))) in groups.enumerate() {
            let first = tasks.len();
            let parts = split(dk, self.spans, self.dim).zip(split(dv, self.spans, self.dim));
            tasks.extend(self.spans.iter().zip(parts).map(|(span, (dk, dv))| {
                let dq = Vec::with_capacity(self.group);
                let span = *span;
                BackwardTask {
                    kv_head,
                    span,
                    dq,
                    dk,
                    dv,
                }
            }));
            for dq in dq.chunks_exact_mut(size) {
                let parts = split(dq, self.spans, self.dim);
                tasks[first..]
                    .iter_mut()
                    .zip(parts)
                    .for_each(|(task, dq)| task.dq.push(dq));
            }
        }
        let shared: Vec<PrefixGradient> = tasks
            .into_par_iter()
            .map_init(Scratch::default, |scratch, task| {
                self.backward_span(scratch, given, task)
            })
            .collect();
        for part in shared {
            let at = part.kv_head * size;
            vector::add(&mut dk[at..at + part.dk.len()], &part.dk);
            vector::add(&mut dv[at..at + part.dv.len()], &part.dv);
        }
    }

    fn backward_span(
        &self,
        scratch: &mut Scratch,
        given: &OutGradient<'_>,
        task: BackwardTask<'_>,
    ) -> PrefixGradient {
        let BackwardTask {
            kv_head,
            span,
            dq,
            dk,
            dv,
        } = task;
        let mut shared = PrefixGradient {
            kv_head,
            dk: vec![0.0; span.prefix * self.dim],
            dv: vec![0.0; span.prefix * self.dim],
        };
        dk.fill(0.0);
        dv.fill(0.0);
        for (index, dq) in dq.into_iter().enumerate() {
            let head = kv_head * self.group + index;
            let width = self.scores(&mut scratch.p, head, span);
            let rows = self.heads * self.dim;
            let at = span.start * rows + head * self.dim;
            let d_out = Mat::strided(&given.d_out[at..], span.len, self.dim, rows);
            let values = self.parts(1, kv_head, span);
            self.against(&mut scratch.dp, d_out, span, &values);

            let probabilities = scratch.p.chunks_exact_mut(width);
            let gradients = scratch.dp.chunks_exact_mut(width);
            for (row, (p, dp)) in probabilities.zip(gradients).enumerate() {
                let seen = self.seen(span, row);
                let log_sum = given.log_sums[head * self.tokens + span.start + row];
                vector::softmax_again_row(&mut p[seen.clone()], self.scale(), log_sum);
                hide(p, &seen);
                let at = at + row * rows;
                let here = at..at + self.dim;
                // Σ p·dp over a row equals its output times the output's gradient.
                let dot = vector::dot(&given.out[here.clone()], &given.d_out[here]);
                let (seen_p, seen_d) = (&p[seen.clone()], &mut dp[seen.clone()]);
                vector::softmax_backward_row(seen_d, seen_p, dot, self.scale());
                hide(dp, &seen);
            }

            self.times(dq, &scratch.dp, span, &self.parts(0, kv_head, span));
            let q = self.own(self.q, head, span);
            let product = |target: &mut [f32], weights: &[f32], from: usize, len, values| {
                let weights = Mat::strided(&weights[from..], span.len, len, width).t();
                let target = MatMut::new(target, len, self.dim);
                matmul(target, Into::Add, 1.0, weights, values, Threads::One);
            };
            product(dk, &scratch.dp, span.before(), span.len, q);
            product(dv, &scratch.p, span.before(), span.len, d_out);
            if span.prefix > 0 {
                let from = span.past_len;
                product(&mut shared.dk, &scratch.dp, from, span.prefix, q);
                product(&mut shared.dv, &scratch.p, from, span.prefix, d_out);
            }
        }
        shared
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

    /// `q · kᵀ` of one head and span, unscaled; returns the width of a row.
    fn scores(&self, p: &mut Vec<f32>, head: usize, span: Span) -> usize {
        let keys = self.parts(0, head / self.group, span);
        self.against(p, self.own(self.q, head, span), span, &keys)
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

    /// `out = rows · [parts]ᵀ`.
    fn against(&self, out: &mut Vec<f32>, rows: Mat<'_>, span: Span, parts: &[Mat<'_>]) -> usize {
        let width = span.before() + span.len;
        out.resize(span.len * width, 0.0);
        let mut from = 0;
        for part in parts {
            let target = MatMut::strided(&mut out[from..], span.len, part.rows(), width);
            matmul(target, Into::Replace, 1.0, rows, part.t(), Threads::One);
            from += part.rows();
        }
        width
    }

    /// `out = weights · [parts]`.
    fn times(&self, out: &mut [f32], weights: &[f32], span: Span, parts: &[Mat<'_>]) {
        let width = span.before() + span.len;
        let mut from = 0;
        for part in parts {
            let into = if from == 0 { Into::Replace } else { Into::Add };
            let weights = Mat::strided(&weights[from..], span.len, part.rows(), width);
            let target = MatMut::new(out, span.len, self.dim);
            matmul(target, into, 1.0, weights, *part, Threads::One);
            from += part.rows();
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
