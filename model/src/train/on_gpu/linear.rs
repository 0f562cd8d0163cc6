//! Linear layers with a frozen weight and a trained low-rank delta on a GPU, as the CPU's `linear`.
//! Knows no other part of the model.

use super::pass::Pass;
use crate::error::ModelError;
use crate::gpu::{Buffer, Matrix, View};
use crate::train::linear::Dropout;
use crate::train::params::Group;

/// A group of linear layers that read one input.
pub(super) struct Linear<'a> {
    pub(super) pass: &'a Pass<'a>,
    pub(super) group: &'a Group,
    pub(super) weights: &'a [Buffer<f32>],
    pub(super) dropout: Option<Dropout>,
}

impl Linear<'_> {
    fn matrix<'b>(&self, values: View<'b, f32>, width: usize) -> Matrix<'b> {
        Matrix::new(values, self.pass.n, width)
    }

    /// The part of the inner values that belongs to the module at `column`.
    fn columns<'b>(&self, inner: View<'b, f32>, column: usize) -> Matrix<'b> {
        let rank = self.pass.layout.rank;
        let part = inner.at(column, inner.len() - column);
        Matrix::strided(part, self.pass.n, rank, self.group.inner)
    }

    fn a(&self) -> Matrix<'_> {
        let values = self.pass.params.at(self.group.a.start, self.group.a.len());
        Matrix::new(values, self.group.inner, self.group.input)
    }

    /// The input as the adapter sees it.
    fn dropped<'b>(&'b self, x: View<'b, f32>) -> Result<View<'b, f32>, ModelError> {
        let Some(dropout) = self.dropout else {
            return Ok(x);
        };
        let out = self.pass.room.dropped.at(0, x.len());
        let (limit, keep) = dropout.bounds();
        self.pass.gpu.dropout(out, x, dropout.key, limit, keep)?;
        Ok(out)
    }

    /// As the CPU's `Linear::forward`.
    pub(super) fn forward(
        &self,
        x: View<'_, f32>,
        inner: View<'_, f32>,
        add: bool,
        ys: &[View<'_, f32>],
    ) -> Result<(), ModelError> {
        let (gpu, group) = (self.pass.gpu, self.group);
        for ((member, weight), y) in group.members.iter().zip(self.weights).zip(ys) {
            let w = Matrix::new(weight.all(), member.output, group.input);
            let y = self.matrix(*y, member.output);
            gpu.product(y, add, 1.0, self.matrix(x, group.input), w.t())?;
        }
        if group.inner == 0 {
            return Ok(());
        }
        let dropped = self.matrix(self.dropped(x)?, group.input);
        let target = self.matrix(inner, group.inner);
        gpu.product(target, false, 1.0, dropped, self.a().t())?;
        for (member, y) in group.members.iter().zip(ys) {
            if let Some((b, column)) = &member.factors {
                let b = self.pass.params.at(b.start, b.len());
                let b = Matrix::new(b, member.output, self.pass.layout.rank);
                let y = self.matrix(*y, member.output);
                let inner = self.columns(inner, *column);
                gpu.product(y, true, self.pass.scale, inner, b.t())?;
            }
        }
        Ok(())
    }

    /// As the CPU's `Linear::backward`; the gradient of `inner` goes to `room.inner`.
    pub(super) fn backward(
        &self,
        dys: &[View<'_, f32>],
        inner: View<'_, f32>,
        dx: Option<View<'_, f32>>,
    ) -> Result<(), ModelError> {
        let (gpu, group, rank) = (self.pass.gpu, self.group, self.pass.layout.rank);
        if let Some(dx) = dx {
            let members = group.members.iter().zip(self.weights).zip(dys);
            for (index, ((member, weight), dy)) in members.enumerate() {
                let w = Matrix::new(weight.all(), member.output, group.input);
                let dy = self.matrix(*dy, member.output);
                gpu.product(self.matrix(dx, group.input), index > 0, 1.0, dy, w)?;
            }
        }
        let d_inner = self.d_inner();
        for (member, dy) in group.members.iter().zip(dys) {
            let Some((range, column)) = &member.factors else {
                continue;
            };
            let dy = self.matrix(*dy, member.output);
            let b = self.pass.params.at(range.start, range.len());
            let b = Matrix::new(b, member.output, rank);
            let target = self.columns(d_inner, *column);
            gpu.product(target, false, self.pass.scale, dy, b)?;
            let target = self.pass.grads.at(range.start, range.len());
            let target = Matrix::new(target, member.output, rank);
            let inner = self.columns(inner, *column);
            gpu.product(target, true, self.pass.scale, dy.t(), inner)?;
        }
        match dx {
            Some(dx) if group.inner > 0 => self.backward_delta(d_inner, dx),
            _ => Ok(()),
        }
    }

    fn d_inner(&self) -> View<'_, f32> {
        self.pass.rows(&self.pass.room.inner, self.group.inner)
    }

    /// `dx += d_inner · A`, through the dropout where there is one.
    fn backward_delta(&self, d_inner: View<'_, f32>, dx: View<'_, f32>) -> Result<(), ModelError> {
        let (gpu, input) = (self.pass.gpu, self.group.input);
        let inner = self.matrix(d_inner, self.group.inner);
        let Some(dropout) = self.dropout else {
            return gpu.product(self.matrix(dx, input), true, 1.0, inner, self.a());
        };
        let delta = self.pass.room.dropped.at(0, dx.len());
        gpu.product(self.matrix(delta, input), false, 1.0, inner, self.a())?;
        let (limit, keep) = dropout.bounds();
        gpu.dropout(delta, delta, dropout.key, limit, keep)?;
        gpu.add(dx, delta)
    }

    /// As the CPU's `Linear::backward_a`, with the gradient of `inner` in `room.inner`.
    pub(super) fn backward_a(&self, x: View<'_, f32>) -> Result<(), ModelError> {
        let (group, gpu) = (self.group, self.pass.gpu);
        if group.inner == 0 {
            return Ok(());
        }
        let x = self.matrix(self.dropped(x)?, group.input);
        let target = self.pass.grads.at(group.a.start, group.a.len());
        let target = Matrix::new(target, group.inner, group.input);
        let d_inner = self.matrix(self.d_inner(), group.inner);
        gpu.product(target, true, 1.0, d_inner.t(), x)
    }
}
