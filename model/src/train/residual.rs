//! How a block's result comes into the residual stream: as it is, or through an RMS norm.
//!
//! Knows no block. Invariant: without a norm nothing is recorded and nothing copied.

use super::linear::Linear;
use super::norm;
use super::tape::NormTape;
use crate::kernels::matmul::Into;
use crate::kernels::vector;
use crate::profile::{self, Operation};

/// The way of one block.
pub(super) struct Residual<'a> {
    /// Weight of the norm, where there is one.
    pub(super) norm: Option<&'a [f32]>,
    /// Its epsilon.
    pub(super) eps: f64,
}

impl Residual<'_> {
    /// `stream += linear(x)`, the result normed first where there is a norm. `inner` is the
    /// linear layer's record, `room` is as large as `stream`.
    pub(super) fn forward(
        &self,
        linear: &Linear<'_>,
        x: &[f32],
        inner: &mut [f32],
        tape: &mut NormTape,
        room: &mut [f32],
        stream: &mut [f32],
    ) {
        let Some(weight) = self.norm else {
            return linear.forward(x, inner, Into::Add, &mut [stream]);
        };
        linear.forward(x, inner, Into::Replace, &mut [&mut tape.x]);
        norm::forward(room, &mut tape.inverse, &tape.x, weight, self.eps);
        let _counted = profile::scope(Operation::Elementwise);
        vector::add(stream, room);
    }

    /// The gradient of the linear layer's result, from that of the stream: the same, or in `room`
    /// what the norm makes of it.
    pub(super) fn backward<'b>(
        &self,
        tape: &NormTape,
        d_stream: &'b [f32],
        room: &'b mut [f32],
    ) -> &'b [f32] {
        let Some(weight) = self.norm else {
            return d_stream;
        };
        room.fill(0.0);
        norm::backward(room, d_stream, &tape.inverse, &tape.x, weight);
        room
    }
}
