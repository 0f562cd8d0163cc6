//! The pass of training on a GPU: forward, loss and backward of a pack, as `network` and `head`
//! have them.
//!
//! | file | what |
//! |---|---|
//! | `tape` | what the forward pass leaves, and the room that both compute in |
//! | `pass` | forward, loss and backward |
//! | `linear` | linear layers with their adapters |
//!
//! Keys and values stay in rows, so nothing is split into heads. Adapters come from and gradients
//! go to the CPU once a step, and losses once a pass. Invariant: as `network`'s, a backward pass
//! uses up what its forward pass left.

mod linear;
mod pass;
mod tape;

use std::sync::Arc;

use super::attention::Span;
use super::head::LossSum;
use super::linear::Dropout;
use super::pack::Pack;
use super::params::Layout;
use super::past::Stretch;
use super::rope::Rope;
use super::tape::Keep;
use crate::error::ModelError;
use crate::gpu::{Buffer, GpuModel, KeyTiles, Plan, Run, Segment, Sizes};
use pass::Pass;
use tape::{Room, Tape};

/// A base model on a GPU, and what its training keeps there.
pub(super) struct OnGpu {
    model: Arc<GpuModel>,
    /// Cosines and sines of every position, of each of the model's frequency tables.
    angles: Vec<[Buffer<f32>; 2]>,
    params: Buffer<f32>,
    grads: Buffer<f32>,
    tape: Tape,
    room: Room,
}

/// One pack on the device.
pub(super) struct Laid {
    pub(super) tokens: Buffer<u32>,
    /// Of each frequency table, by rows.
    pub(super) turns: Vec<[Buffer<f32>; 2]>,
    pub(super) plan: Plan,
    pub(super) keys: Option<KeyTiles>,
}

impl OnGpu {
    /// Room for `values` trained values; positions are those of `ropes`.
    pub(super) fn new(
        model: &Arc<GpuModel>,
        ropes: &[Rope],
        values: usize,
    ) -> Result<Self, ModelError> {
        let gpu = &model.gpu;
        let angles = ropes.iter().map(|rope| {
            let [cos, sin] = rope.angles();
            Ok([gpu.copy_of(cos)?, gpu.copy_of(sin)?])
        });
        Ok(Self {
            angles: angles.collect::<Result<_, ModelError>>()?,
            params: gpu.room(values)?,
            grads: gpu.room(values)?,
            tape: Tape::new(gpu)?,
            room: Room::new(gpu)?,
            model: Arc::clone(model),
        })
    }

    /// Takes the trained values of a step and forgets the gradients of the one before.
    pub(super) fn begin(&mut self, params: &[f32]) -> Result<(), ModelError> {
        self.params.set(params)?;
        self.grads.all().clear(&self.model.gpu)
    }

    /// The gradients since [`OnGpu::begin`].
    pub(super) fn gathered(&self) -> Result<Vec<f32>, ModelError> {
        self.grads.all().read(&self.model.gpu)
    }

    /// The loss of a pack; adds the gradient of `weight · Σ loss`.
    pub(super) fn gradients(
        &mut self,
        layout: &Layout,
        scale: f32,
        dropout: Option<Dropout>,
        keep: Keep,
        pack: &Pack,
        weight: f32,
    ) -> Result<LossSum, ModelError> {
        let laid = self.lay(layout, pack, keep)?;
        let pass = self.pass(layout, scale, dropout, keep, &laid);
        pass.forward(None)?;
        let sum = pass.loss(pack, Some(weight))?;
        pass.backward()?;
        Ok(sum)
    }

    /// The loss of a pack alone.
    pub(super) fn loss(
        &mut self,
        layout: &Layout,
        scale: f32,
        pack: &Pack,
    ) -> Result<LossSum, ModelError> {
        let laid = self.lay(layout, pack, Keep::Nothing)?;
        let pass = self.pass(layout, scale, None, Keep::Nothing, &laid);
        pass.forward(None)?;
        pass.loss(pack, None)
    }

    /// Keys and values of a pack; `layout` is that of a model without an adapter.
    pub(super) fn stretch(&mut self, layout: &Layout, pack: &Pack) -> Result<Stretch, ModelError> {
        let laid = self.lay(layout, pack, Keep::Nothing)?;
        let pass = self.pass(layout, 0.0, None, Keep::Nothing, &laid);
        let (c, n) = (pass.c, pass.n);
        let values = pass.gpu.room(c.layers * 2 * n * c.kv_width())?;
        pass.forward(Some(&values))?;
        let mut stretch = Stretch::new(n);
        stretch.on_gpu = Some(values);
        Ok(stretch)
    }

    fn pass<'a>(
        &'a self,
        layout: &'a Layout,
        scale: f32,
        dropout: Option<Dropout>,
        keep: Keep,
        laid: &'a Laid,
    ) -> Pass<'a> {
        Pass {
            gpu: &self.model.gpu,
            c: &self.model.config,
            model: &self.model,
            layout,
            params: self.params.all(),
            grads: self.grads.all(),
            scale,
            dropout,
            keep,
            n: laid.tokens.len(),
            tape: &self.tape,
            room: &self.room,
            laid,
        }
    }

    /// Brings a pack to the device and makes room for it.
    fn lay(&mut self, layout: &Layout, pack: &Pack, keep: Keep) -> Result<Laid, ModelError> {
        let (gpu, c) = (&self.model.gpu, &self.model.config);
        let n = pack.tokens.len();
        self.tape.fit(c, layout, n, keep)?;
        self.room.fit(c, layout, n)?;
        let index = gpu.copy_of(&pack.positions)?;
        let half = c.head_dim / 2;
        let turns = self.angles.iter().map(|angles| {
            let turned = [gpu.room(n * half)?, gpu.room(n * half)?];
            for (out, table) in turned.iter().zip(angles) {
                gpu.gather(out.all(), table.all(), index.all(), half)?;
            }
            Ok(turned)
        });
        let turns = turns.collect::<Result<_, ModelError>>()?;
        let runs = self.runs(pack, keep);
        let plan = Plan::new(gpu, Sizes::of(c), &runs)?;
        let keys = match keep {
            Keep::Nothing => None,
            Keep::Everything | Keep::Inputs => {
                let ends = ends(pack);
                Some(plan.key_tiles(gpu, &runs, &ends, &pack.positions)?)
            }
        };
        Ok(Laid {
            tokens: gpu.copy_of(&pack.tokens)?,
            turns,
            plan,
            keys,
        })
    }

    fn runs(&self, pack: &Pack, keep: Keep) -> Vec<Run> {
        let width = self.model.config.kv_width();
        let n = pack.tokens.len();
        let own = |start: usize, tokens: usize| Segment {
            keys: self.tape.k.at(start * width, tokens * width).address(),
            values: self.tape.v.at(start * width, tokens * width).address(),
            layer: if keep == Keep::Everything {
                n * width
            } else {
                0
            },
            tokens,
        };
        let run = |span: &Span| {
            let past = span.past.map_or(&[][..], |at| &pack.past[at][..]);
            let past = past.iter().filter_map(|past| past.segment(width));
            let parts = [own(0, span.prefix), own(span.start, span.len)];
            Run {
                first: span.start,
                rows: span.len,
                segments: past.chain(parts).collect(),
            }
        };
        pack.spans.iter().map(run).collect()
    }
}

/// Of each span, the row after the last that sees its rows: those of the shared prefix are seen by
/// all, which come after it.
fn ends(pack: &Pack) -> Vec<usize> {
    let prefix = pack.spans.iter().map(|span| span.prefix).max().unwrap_or(0);
    let end = |span: &Span| match span.start < prefix {
        true => pack.tokens.len(),
        false => span.start + span.len,
    };
    pack.spans.iter().map(end).collect()
}
