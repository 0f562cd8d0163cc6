//! The output head: cross entropy of the predicted tokens, and its gradient.
//!
//! Only the matrix rows that predict a target are looked at, a block at a time, so the logits of
//! a whole batch never exist at once. Knows no layer.

use rayon::prelude::*;

use super::frozen::Frozen;
use super::norm;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector;
use crate::profile::{self, Operation};

/// Rows of logits at a time.
const BLOCK: usize = 128;

/// Sums over predicted tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct LossSum {
    /// Sum of the cross entropies, in nats.
    pub(super) loss: f64,
    /// Tokens whose most likely prediction was right.
    pub(super) right: usize,
    /// Predicted tokens.
    pub(super) tokens: usize,
}

impl LossSum {
    pub(super) fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.right += other.right;
        self.tokens += other.tokens;
    }
}

/// Room that is kept between calls.
#[derive(Default)]
pub(super) struct HeadRoom {
    x: Vec<f32>,
    hidden: Vec<f32>,
    inverse: Vec<f32>,
    logits: Vec<f32>,
    dx: Vec<f32>,
}

/// The loss of `targets` (matrix row and token) when `x` are the last layer's rows. With `dx`,
/// the gradient of `weight · Σ loss` is written there: zero for rows that predict nothing.
pub(super) fn loss(
    frozen: &Frozen<'_>,
    room: &mut HeadRoom,
    x: &[f32],
    targets: &[(usize, u32)],
    weight: f32,
    mut dx: Option<&mut [f32]>,
) -> LossSum {
    let _counted = profile::scope(Operation::Head);
    if let Some(dx) = dx.as_deref_mut() {
        dx.fill(0.0);
    }
    let mut sum = LossSum::default();
    for block in targets.chunks(BLOCK) {
        sum.add(room.forward(frozen, x, block));
        if let Some(dx) = dx.as_deref_mut() {
            room.backward(frozen, block, weight, dx);
        }
    }
    sum
}

impl HeadRoom {
    /// Leaves the probabilities less one at the target in `logits`.
    fn forward(&mut self, frozen: &Frozen<'_>, x: &[f32], block: &[(usize, u32)]) -> LossSum {
        let (width, vocab, n) = (frozen.config.hidden, frozen.config.vocab, block.len());
        self.x.resize(n * width, 0.0);
        self.hidden.resize(n * width, 0.0);
        self.inverse.resize(n, 0.0);
        self.logits.resize(n * vocab, 0.0);
        for (to, (row, _)) in self.x.chunks_exact_mut(width).zip(block) {
            to.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
        let eps = frozen.config.norm_eps;
        norm::forward(
            &mut self.hidden,
            &mut self.inverse,
            &self.x,
            &frozen.norm,
            eps,
        );
        let hidden = Mat::new(&self.hidden, n, width);
        let head = Mat::new(&frozen.head, vocab, width);
        let target = MatMut::new(&mut self.logits, n, vocab);
        matmul(target, Into::Replace, 1.0, hidden, head.t(), Threads::All);

        let rows = self.logits.par_chunks_mut(vocab).zip(block);
        let losses: Vec<(f32, bool)> = rows
            .map(|(logits, (_, token))| {
                let token = *token as usize;
                let logit = logits[token];
                let right = logits.iter().all(|other| *other <= logit);
                let log_sum = vector::softmax_row(logits, 1.0);
                logits[token] -= 1.0;
                (log_sum - logit, right)
            })
            .collect();
        LossSum {
            loss: losses.iter().map(|(loss, _)| f64::from(*loss)).sum(),
            right: losses.iter().filter(|(_, right)| *right).count(),
            tokens: n,
        }
    }

    fn backward(
        &mut self,
        frozen: &Frozen<'_>,
        block: &[(usize, u32)],
        weight: f32,
        dx: &mut [f32],
    ) {
        let (width, vocab, n) = (frozen.config.hidden, frozen.config.vocab, block.len());
        let logits = Mat::new(&self.logits, n, vocab);
        let head = Mat::new(&frozen.head, vocab, width);
        let target = MatMut::new(&mut self.hidden, n, width);
        matmul(target, Into::Replace, weight, logits, head, Threads::All);
        self.dx.clear();
        self.dx.resize(n * width, 0.0);
        norm::backward(
            &mut self.dx,
            &self.hidden,
            &self.inverse,
            &self.x,
            &frozen.norm,
        );
        for (from, (row, _)) in self.dx.chunks_exact(width).zip(block) {
            let to = &mut dx[row * width..(row + 1) * width];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
    }
}
