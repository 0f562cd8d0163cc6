//! What a forward pass on a GPU leaves there, and the room that both passes compute in. Buffers are
//! kept from pass to pass and only grow. Knows no computation.

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gpu::{Buffer, Gpu};
use crate::train::params::Layout;
use crate::train::tape::Keep;

/// Rows of logits at a time.
pub(super) const BLOCK: usize = 128;

/// What the forward pass leaves, as `tape` has it, of every layer one after the other: `[slots,
/// tokens, width]`.
pub(super) struct Tape {
    /// One slot more than layers: the last one's result.
    pub(super) x: Buffer<f32>,
    pub(super) x_inverse: Buffer<f32>,
    pub(super) q: Buffer<f32>,
    pub(super) k: Buffer<f32>,
    pub(super) v: Buffer<f32>,
    pub(super) log_sums: Buffer<f32>,
    pub(super) attended: Buffer<f32>,
    pub(super) middle: Buffer<f32>,
    pub(super) middle_inverse: Buffer<f32>,
    pub(super) gate: Buffer<f32>,
    pub(super) up: Buffer<f32>,
    /// Of each group, `[tokens, inner]`.
    pub(super) inner: [Buffer<f32>; 4],
    /// Inputs of the norms that not every model has, and `1 / rms`: of queries, of keys, after
    /// attention, after the feed-forward layer.
    pub(super) normed: [[Buffer<f32>; 2]; 4],
    /// Inputs of the layers, where only they are kept.
    pub(super) inputs: Buffer<f32>,
}

/// Room for values that do not outlive a layer.
pub(super) struct Room {
    pub(super) hidden: Buffer<f32>,
    pub(super) hidden2: Buffer<f32>,
    pub(super) dx: Buffer<f32>,
    pub(super) q: Buffer<f32>,
    pub(super) q2: Buffer<f32>,
    pub(super) k: Buffer<f32>,
    pub(super) k2: Buffer<f32>,
    pub(super) v: Buffer<f32>,
    pub(super) dots: Buffer<f32>,
    pub(super) ffn: Buffer<f32>,
    pub(super) inner: Buffer<f32>,
    /// A group's input, or its gradient, with values dropped.
    pub(super) dropped: Buffer<f32>,
    pub(super) logits: Buffer<f32>,
    /// Rows of the head: the last layer's, normed, their gradients, `1 / rms`.
    pub(super) rows: [Buffer<f32>; 4],
}

impl Tape {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, ModelError> {
        let none = || gpu.room(0);
        let two = || -> Result<_, ModelError> { Ok([none()?, none()?]) };
        Ok(Self {
            x: none()?,
            x_inverse: none()?,
            q: none()?,
            k: none()?,
            v: none()?,
            log_sums: none()?,
            attended: none()?,
            middle: none()?,
            middle_inverse: none()?,
            gate: none()?,
            up: none()?,
            inner: [none()?, none()?, none()?, none()?],
            normed: [two()?, two()?, two()?, two()?],
            inputs: none()?,
        })
    }

    pub(super) fn fit(
        &mut self,
        c: &LlamaConfig,
        layout: &Layout,
        n: usize,
        keep: Keep,
    ) -> Result<(), ModelError> {
        let slots = match keep {
            Keep::Everything => c.layers,
            Keep::Inputs | Keep::Nothing => 1,
        };
        let rows = slots * n;
        self.x.fit((rows + n) * c.hidden)?;
        self.x_inverse.fit(rows)?;
        self.q.fit(rows * c.q_width())?;
        self.k.fit(rows * c.kv_width())?;
        self.v.fit(rows * c.kv_width())?;
        self.log_sums.fit(rows * c.heads)?;
        self.attended.fit(rows * c.q_width())?;
        self.middle.fit(rows * c.hidden)?;
        self.middle_inverse.fit(rows)?;
        self.gate.fit(rows * c.ffn)?;
        self.up.fit(rows * c.ffn)?;
        for (inner, group) in self.inner.iter_mut().zip(&layout.layers[0]) {
            inner.fit(rows * group.inner)?;
        }
        let sizes = [
            (c.parts.head_norms, c.q_width(), c.heads),
            (c.parts.head_norms, c.kv_width(), c.kv_heads),
            (c.parts.post_norms, c.hidden, 1),
            (c.parts.post_norms, c.hidden, 1),
        ];
        for ([x, inverse], (there, width, norms)) in self.normed.iter_mut().zip(sizes) {
            if there {
                x.fit(rows * width)?;
                inverse.fit(rows * norms)?;
            }
        }
        match keep {
            Keep::Inputs => self.inputs.fit(c.layers * n * c.hidden),
            Keep::Everything | Keep::Nothing => Ok(()),
        }
    }
}

impl Room {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, ModelError> {
        let none = || gpu.room(0);
        Ok(Self {
            hidden: none()?,
            hidden2: none()?,
            dx: none()?,
            q: none()?,
            q2: none()?,
            k: none()?,
            k2: none()?,
            v: none()?,
            dots: none()?,
            ffn: none()?,
            inner: none()?,
            dropped: none()?,
            logits: none()?,
            rows: [none()?, none()?, none()?, none()?],
        })
    }

    pub(super) fn fit(
        &mut self,
        c: &LlamaConfig,
        layout: &Layout,
        n: usize,
    ) -> Result<(), ModelError> {
        self.hidden.fit(n * c.hidden)?;
        self.hidden2.fit(n * c.hidden)?;
        self.dx.fit(n * c.hidden)?;
        self.q.fit(n * c.q_width())?;
        self.q2.fit(n * c.q_width())?;
        self.k.fit(n * c.kv_width())?;
        self.k2.fit(n * c.kv_width())?;
        self.v.fit(n * c.kv_width())?;
        self.dots.fit(n * c.heads)?;
        self.ffn.fit(n * c.ffn)?;
        let inner = layout.layers[0].iter().map(|group| group.inner).max();
        self.inner.fit(n * inner.unwrap_or(0))?;
        let widest = c.hidden.max(c.q_width()).max(c.ffn);
        self.dropped.fit(n * widest)?;
        self.logits.fit(BLOCK * c.vocab)?;
        let [x, normed, dx, inverse] = &mut self.rows;
        x.fit(BLOCK * c.hidden)?;
        normed.fit(BLOCK * c.hidden)?;
        dx.fit(BLOCK * c.hidden)?;
        inverse.fit(BLOCK)
    }
}
