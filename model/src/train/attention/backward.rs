//! The backward pass of attention: the gradients of queries, keys and values.
//!
//! The probabilities are computed again, from the sums that the forward pass left.

use rayon::prelude::*;

use super::{Attention, Block, Scratch, Span, hide, split};
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector;

/// The result of the forward pass and its gradient, as rows of tokens.
pub(in crate::train) struct OutGradient<'a> {
    /// What [`Attention::forward`] gave, merged to `[tokens, heads · head_dim]`.
    pub(in crate::train) out: &'a [f32],
    /// Its gradient, of the same shape.
    pub(in crate::train) d_out: &'a [f32],
    /// What [`Attention::forward`] returned.
    pub(in crate::train) log_sums: &'a [f32],
}

struct BackwardTask<'b> {
    kv_head: usize,
    span: Span,
    dq: Vec<&'b mut [f32]>,
    dk: &'b mut [f32],
    dv: &'b mut [f32],
}

/// Gradients that a span sends to the keys and values of the prefix.
struct PrefixGradient {
    kv_head: usize,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Attention<'_> {
    /// Writes the gradients of queries, keys and values, each shaped as the value itself.
    pub(in crate::train) fn backward(
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
            for block in self.blocks(span) {
                self.probabilities_again(scratch, given, head, span, &block);
                self.times(dq, &scratch.dp, &block, &self.parts(0, kv_head, span));
                let q = self.own(self.q, head, span).some_rows(block.rows.clone());
                let d_out = self.d_out(given, head, span, &block);
                let width = block.columns.len();
                let product = |target: &mut [f32], weights: &[f32], (first, len), values| {
                    let (rows, at) = block.within(first, len);
                    if rows.is_empty() {
                        return;
                    }
                    let target = &mut target[rows.start * self.dim..];
                    let target = MatMut::new(target, rows.len(), self.dim);
                    let weights = Mat::strided(&weights[at..], block.rows.len(), rows.len(), width);
                    matmul(target, Into::Add, 1.0, weights.t(), values, Threads::One);
                };
                let own = (span.before(), span.len);
                product(dk, &scratch.dp, own, q);
                product(dv, &scratch.p, own, d_out);
                let prefix = (span.past_len, span.prefix);
                product(&mut shared.dk, &scratch.dp, prefix, q);
                product(&mut shared.dv, &scratch.p, prefix, d_out);
            }
        }
        shared
    }

    /// The probabilities of a block as the forward pass had them, in `p`, and the gradients of its
    /// scores, in `dp`.
    fn probabilities_again(
        &self,
        scratch: &mut Scratch,
        given: &OutGradient<'_>,
        head: usize,
        span: Span,
        block: &Block,
    ) {
        let width = self.scores(&mut scratch.p, head, span, block);
        let values = self.parts(1, head / self.group, span);
        let d_out = self.d_out(given, head, span, block);
        self.against(&mut scratch.dp, d_out, block, &values);
        let rows = self.heads * self.dim;
        let first = span.start + block.rows.start;
        let probabilities = scratch.p.chunks_exact_mut(width);
        let gradients = scratch.dp.chunks_exact_mut(width);
        for (row, (p, dp)) in probabilities.zip(gradients).enumerate() {
            let seen = self.seen_in(span, block, row);
            let log_sum = given.log_sums[head * self.tokens + first + row];
            vector::softmax_again_row(&mut p[seen.clone()], self.scale(), log_sum);
            hide(p, &seen);
            let at = (first + row) * rows + head * self.dim;
            let here = at..at + self.dim;
            // Σ p·dp over a row equals its output times the output's gradient.
            let dot = vector::dot(&given.out[here.clone()], &given.d_out[here]);
            let (seen_p, seen_d) = (&p[seen.clone()], &mut dp[seen.clone()]);
            vector::softmax_backward_row(seen_d, seen_p, dot, self.scale());
            hide(dp, &seen);
        }
    }

    /// The gradient of one head's output in the rows of a block.
    fn d_out<'b>(
        &self,
        given: &OutGradient<'b>,
        head: usize,
        span: Span,
        block: &Block,
    ) -> Mat<'b> {
        let rows = self.heads * self.dim;
        let at = (span.start + block.rows.start) * rows + head * self.dim;
        Mat::strided(&given.d_out[at..], block.rows.len(), self.dim, rows)
    }
}
