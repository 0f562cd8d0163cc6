//! Linear layers with a frozen weight and a trained low-rank delta, forward and backward.
//!
//! `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` for every module of a group, which share `x`. Knows no other part of
//! the model. Invariant: the frozen weight gets no gradient, which is a third of the usual cost.

use rayon::prelude::*;

use super::order::mix;
use super::params::Group;
use crate::kernels::View;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector;
use crate::profile::{self, Operation};

/// One group of modules, ready to compute on `tokens` rows.
pub(super) struct Linear<'a> {
    pub(super) group: &'a Group,
    /// The frozen weights of the members, `[output, input]` each.
    pub(super) weights: &'a [View<'a>],
    /// All trained values.
    pub(super) params: &'a [f32],
    pub(super) rank: usize,
    /// `alpha / rank`.
    pub(super) scale: f32,
    pub(super) dropout: Option<Dropout>,
    pub(super) tokens: usize,
}

/// Dropout on the adapter's input. The mask is a function of `key` and the place, so the
/// backward pass and a resumed training see the same one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dropout {
    pub(super) share: f64,
    pub(super) key: u64,
}

impl Dropout {
    /// The same for another place of the network.
    pub(super) fn of_place(self, place: u64) -> Self {
        Self {
            key: mix(self.key ^ mix(place)),
            ..self
        }
    }

    /// Draws of 2³² that drop a value, and what the others are multiplied with.
    pub(super) fn bounds(self) -> (u64, f32) {
        let limit = (self.share * 2f64.powi(32)) as u64;
        (limit, (1.0 / (1.0 - self.share)) as f32)
    }

    /// `values`, where they are kept, scaled so that the mean stays; zero elsewhere.
    fn masked(self, values: &[f32]) -> Vec<f32> {
        let (limit, keep) = self.bounds();
        let values = values.par_iter().enumerate().with_min_len(4096);
        let masked = values.map(|(place, value)| {
            let drawn = mix(self.key.wrapping_add(place as u64)) >> 32;
            if drawn < limit { 0.0 } else { value * keep }
        });
        masked.collect()
    }
}

impl<'a> Linear<'a> {
    /// The outputs of the members for the rows `x`, and in `inner` the `x·Aᵀ` of the group for
    /// the backward pass. With [`Into::Add`] the outputs are added to `ys`.
    pub(super) fn forward(&self, x: &[f32], inner: &mut [f32], into: Into, ys: &mut [&mut [f32]]) {
        // Independent products side by side, so that no thread waits for the small ones.
        profile::join(
            || self.frozen(x, into, ys),
            || {
                if self.group.inner > 0 {
                    let _counted = profile::scope(Operation::Lora);
                    let dropped = self.dropped(x);
                    let x = self.rows(dropped.as_deref().unwrap_or(x), self.group.input);
                    let target = MatMut::new(inner, self.tokens, self.group.inner);
                    matmul(target, Into::Replace, 1.0, x, self.a().t(), Threads::All);
                }
            },
        );
        let _counted = profile::scope(Operation::Lora);
        let members = self.group.members.par_iter().zip(ys);
        members.for_each(|(member, y)| {
            if let Some((b, column)) = &member.factors {
                let b = Mat::new(&self.params[b.clone()], member.output, self.rank);
                let inner = self.columns(inner, *column);
                let target = MatMut::new(y, self.tokens, member.output);
                matmul(target, Into::Add, self.scale, inner, b.t(), Threads::All);
            }
        });
    }

    /// The products with the frozen weights.
    fn frozen(&self, x: &[f32], into: Into, ys: &mut [&mut [f32]]) {
        let _counted = profile::scope(Operation::Products);
        let input = self.group.input;
        let members = self.group.members.par_iter().zip(self.weights).zip(ys);
        members.for_each(|((member, weight), y)| {
            let w = Mat::new(weight, member.output, input);
            let target = MatMut::new(y, self.tokens, member.output);
            matmul(target, into, 1.0, self.rows(x, input), w.t(), Threads::All);
        });
    }

    /// From the gradients of the outputs: that of the input into `dx` (none skips it), those of
    /// the `b` factors added to `grads`, and that of `inner` for [`Linear::backward_a`].
    pub(super) fn backward(
        &self,
        dys: &[&[f32]],
        inner: &[f32],
        d_inner: &mut Vec<f32>,
        grads: &mut [f32],
        mut dx: Option<&mut [f32]>,
    ) {
        d_inner.resize(self.tokens * self.group.inner, 0.0);
        profile::join(
            || {
                if let Some(dx) = dx.as_deref_mut() {
                    self.backward_frozen(dys, dx);
                }
            },
            || self.backward_b(dys, inner, d_inner, grads),
        );
        if let Some(dx) = dx.filter(|_| self.group.inner > 0) {
            self.backward_delta(d_inner, dx);
        }
    }

    /// `dx = Σ dy · W`.
    fn backward_frozen(&self, dys: &[&[f32]], dx: &mut [f32]) {
        let _counted = profile::scope(Operation::Products);
        let input = self.group.input;
        let members = self.group.members.iter().zip(self.weights).zip(dys);
        for (index, ((member, weight), dy)) in members.enumerate() {
            let into = if index == 0 { Into::Replace } else { Into::Add };
            let w = Mat::new(weight, member.output, input);
            let target = MatMut::new(dx, self.tokens, input);
            matmul(
                target,
                into,
                1.0,
                self.rows(dy, member.output),
                w,
                Threads::All,
            );
        }
    }

    /// `d_inner = s · dy · B` and `dB += s · dyᵀ · inner`.
    fn backward_b(&self, dys: &[&[f32]], inner: &[f32], d_inner: &mut [f32], grads: &mut [f32]) {
        let _counted = profile::scope(Operation::Lora);
        let width = self.group.inner;
        for (member, dy) in self.group.members.iter().zip(dys) {
            let Some((range, column)) = &member.factors else {
                continue;
            };
            let dy = self.rows(dy, member.output);
            let b = Mat::new(&self.params[range.clone()], member.output, self.rank);
            let target = &mut d_inner[*column..];
            let target = MatMut::strided(target, self.tokens, self.rank, width);
            matmul(target, Into::Replace, self.scale, dy, b, Threads::All);
            let inner = self.columns(inner, *column);
            let target = MatMut::new(&mut grads[range.clone()], member.output, self.rank);
            matmul(target, Into::Add, self.scale, dy.t(), inner, Threads::All);
        }
    }

    /// Adds the gradients of the `a` factors to `grads`, from the group's input `x`.
    pub(super) fn backward_a(&self, x: &[f32], d_inner: &[f32], grads: &mut [f32]) {
        let (n, input, width) = (self.tokens, self.group.input, self.group.inner);
        if width == 0 {
            return;
        }
        let _counted = profile::scope(Operation::Lora);
        let dropped = self.dropped(x);
        let x = Mat::new(dropped.as_deref().unwrap_or(x), n, input);
        let target = MatMut::new(&mut grads[self.group.a.clone()], width, input);
        let d_inner = Mat::new(d_inner, n, width).t();
        matmul(target, Into::Add, 1.0, d_inner, x, Threads::All);
    }

    /// `dx += d_inner · A`, through the dropout where there is one.
    fn backward_delta(&self, d_inner: &[f32], dx: &mut [f32]) {
        let _counted = profile::scope(Operation::Lora);
        let (n, input) = (self.tokens, self.group.input);
        let inner = Mat::new(d_inner, n, self.group.inner);
        let Some(dropout) = self.dropout else {
            let target = MatMut::new(dx, n, input);
            return matmul(target, Into::Add, 1.0, inner, self.a(), Threads::All);
        };
        let mut delta = vec![0.0; n * input];
        let target = MatMut::new(&mut delta, n, input);
        matmul(target, Into::Replace, 1.0, inner, self.a(), Threads::All);
        vector::add(dx, &dropout.masked(&delta));
    }

    fn rows<'b>(&self, values: &'b [f32], width: usize) -> Mat<'b> {
        Mat::new(values, self.tokens, width)
    }

    /// The part of the inner values that belongs to the module at `column`.
    fn columns<'b>(&self, inner: &'b [f32], column: usize) -> Mat<'b> {
        Mat::strided(&inner[column..], self.tokens, self.rank, self.group.inner)
    }

    fn a(&self) -> Mat<'a> {
        let (inner, input) = (self.group.inner, self.group.input);
        Mat::new(&self.params[self.group.a.clone()], inner, input)
    }

    fn dropped(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.dropout.map(|dropout| dropout.masked(x))
    }
}
