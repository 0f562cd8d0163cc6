//! The pass of training on a GPU: forward, loss and backward of a pack, as `network` and `head`
//! have them.
//!
//! Keys and values stay in rows, so nothing is split into heads. Adapters come from and gradients
//! go to the CPU once a step, and losses once a pass. Invariant: as `network`'s, a backward pass
//! uses up what its forward pass left.

use std::sync::Arc;

use super::head::LossSum;
use super::linear::Dropout;
use super::network::{DOWN, GATE_UP, MODULES, OUT, QKV};
use super::pack::Pack;
use super::params::{Group, Layout};
use super::past::Stretch;
use super::rope::Rope;
use super::tape::Keep;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gpu::{
    Attended, Buffer, Gpu, GpuLayer, GpuModel, KeyTiles, Layer, Matrix, Norm, Plan, Run, Segment,
    Sizes, View,
};

/// Rows of logits at a time.
const BLOCK: usize = 128;

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

/// What the forward pass leaves, as `tape` has it, of every layer one after the other: `[slots,
/// tokens, width]`.
struct Tape {
    /// One slot more than layers: the last one's result.
    x: Buffer<f32>,
    x_inverse: Buffer<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    log_sums: Buffer<f32>,
    attended: Buffer<f32>,
    middle: Buffer<f32>,
    middle_inverse: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    /// Of each group, `[tokens, inner]`.
    inner: [Buffer<f32>; 4],
    /// Inputs of the norms that not every model has, and `1 / rms`: of queries, of keys, after
    /// attention, after the feed-forward layer.
    normed: [[Buffer<f32>; 2]; 4],
    /// Inputs of the layers, where only they are kept.
    inputs: Buffer<f32>,
}

/// Room for values that do not outlive a layer.
struct Room {
    hidden: Buffer<f32>,
    hidden2: Buffer<f32>,
    dx: Buffer<f32>,
    q: Buffer<f32>,
    q2: Buffer<f32>,
    k: Buffer<f32>,
    k2: Buffer<f32>,
    v: Buffer<f32>,
    dots: Buffer<f32>,
    ffn: Buffer<f32>,
    inner: Buffer<f32>,
    /// A group's input, or its gradient, with values dropped.
    dropped: Buffer<f32>,
    logits: Buffer<f32>,
    /// Rows of the head: the last layer's, normed, their gradients, `1 / rms`.
    rows: [Buffer<f32>; 4],
}

/// One pack on the device.
struct Laid {
    tokens: Buffer<u32>,
    /// Of each frequency table, by rows.
    turns: Vec<[Buffer<f32>; 2]>,
    plan: Plan,
    keys: Option<KeyTiles>,
}

/// One pass.
struct Pass<'a> {
    gpu: &'a Gpu,
    c: &'a LlamaConfig,
    model: &'a GpuModel,
    layout: &'a Layout,
    params: View<'a, f32>,
    grads: View<'a, f32>,
    scale: f32,
    dropout: Option<Dropout>,
    keep: Keep,
    n: usize,
    tape: &'a Tape,
    room: &'a Room,
    laid: &'a Laid,
}

/// A group of linear layers that read one input.
struct Linear<'a> {
    pass: &'a Pass<'a>,
    group: &'a Group,
    weights: &'a [Buffer<f32>],
    dropout: Option<Dropout>,
}

const Q_NORM: usize = 0;
const K_NORM: usize = 1;
const ATTN_POST: usize = 2;
const FFN_POST: usize = 3;

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
        let run = |span: &super::attention::Span| {
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
    let end = |span: &super::attention::Span| match span.start < prefix {
        true => pack.tokens.len(),
        false => span.start + span.len,
    };
    pack.spans.iter().map(end).collect()
}

impl Tape {
    fn new(gpu: &Gpu) -> Result<Self, ModelError> {
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

    fn fit(
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
    fn new(gpu: &Gpu) -> Result<Self, ModelError> {
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

    fn fit(&mut self, c: &LlamaConfig, layout: &Layout, n: usize) -> Result<(), ModelError> {
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

impl<'a> Pass<'a> {
    /// The values of a slot of the tape.
    fn slot(&self, buffer: &'a Buffer<f32>, slot: usize, width: usize) -> View<'a, f32> {
        let len = self.n * width;
        buffer.at(slot * len, len)
    }

    fn rows(&self, buffer: &'a Buffer<f32>, width: usize) -> View<'a, f32> {
        self.slot(buffer, 0, width)
    }

    /// Where a layer's values are.
    fn slot_of(&self, layer: usize) -> usize {
        match self.keep {
            Keep::Everything => layer,
            Keep::Inputs | Keep::Nothing => 0,
        }
    }

    /// Keys and values of all layers go to `kept`, where that is given.
    fn forward(&self, kept: Option<&Buffer<f32>>) -> Result<(), ModelError> {
        let (gpu, c, tape) = (self.gpu, self.c, self.tape);
        let first = self.slot(&tape.x, 0, c.hidden);
        let tokens = self.laid.tokens.all();
        gpu.gather(first, self.model.embed.all(), tokens, c.hidden)?;
        for layer in 0..c.layers {
            let slot = self.slot_of(layer);
            if layer > 0 && self.keep != Keep::Everything {
                first.copy_from(gpu, self.slot(&tape.x, 1, c.hidden))?;
            }
            if self.keep == Keep::Inputs {
                self.slot(&tape.inputs, layer, c.hidden)
                    .copy_from(gpu, first)?;
            }
            self.attend(layer, slot)?;
            if let Some(kept) = kept {
                let len = self.n * c.kv_width();
                for (which, values) in [&tape.k, &tape.v].into_iter().enumerate() {
                    kept.at((2 * layer + which) * len, len)
                        .copy_from(gpu, values.at(0, len))?;
                }
            }
            self.feed_forward(layer, slot)?;
        }
        Ok(())
    }

    /// Writes the gradients, from that of the last layer's result in `room.dx`.
    fn backward(&self) -> Result<(), ModelError> {
        for layer in (0..self.c.layers).rev() {
            let slot = self.slot_of(layer);
            if self.keep == Keep::Inputs {
                let input = self.slot(&self.tape.inputs, layer, self.c.hidden);
                let x = self.slot(&self.tape.x, 0, self.c.hidden);
                x.copy_from(self.gpu, input)?;
                self.attend(layer, slot)?;
                self.feed_forward(layer, slot)?;
            }
            self.feed_forward_backward(layer, slot)?;
            self.attend_backward(layer, slot)?;
        }
        Ok(())
    }

    fn weights(&self, layer: usize) -> &'a GpuLayer {
        &self.model.layers[layer]
    }

    fn linear(&'a self, layer: usize, group: usize) -> Linear<'a> {
        let place = (layer * MODULES.len() + group) as u64;
        Linear {
            pass: self,
            group: &self.layout.layers[layer][group],
            weights: &self.weights(layer).modules[MODULES[group].clone()],
            dropout: self.dropout.map(|dropout| dropout.of_place(place)),
        }
    }

    fn inner(&self, group: usize, layer: usize, slot: usize) -> View<'a, f32> {
        let width = self.layout.layers[layer][group].inner;
        self.slot(&self.tape.inner[group], slot, width)
    }

    /// The record of a norm whose rows are `norms` a token.
    fn norm(
        &self,
        weight: &'a Buffer<f32>,
        inverse: &'a Buffer<f32>,
        slot: usize,
        norms: usize,
    ) -> Norm<'a> {
        Norm {
            weight: weight.all(),
            inverse: self.slot(inverse, slot, norms),
        }
    }

    fn attended(&self, slot: usize) -> Attended<'a> {
        let (c, tape) = (self.c, self.tape);
        Attended {
            q: self.slot(&tape.q, slot, c.q_width()),
            out: self.slot(&tape.attended, slot, c.q_width()),
            log_sums: self.slot(&tape.log_sums, slot, c.heads),
        }
    }

    fn layer(&self, layer: usize) -> Layer {
        Layer {
            slot: layer,
            window: self.c.window(layer),
        }
    }

    fn rotate(&self, layer: usize, x: View<'_, f32>, back: bool) -> Result<(), ModelError> {
        let [cos, sin] = &self.laid.turns[self.c.frequency_table(layer)];
        let turns = [cos.all(), sin.all()];
        self.gpu.rotate(x, turns, self.c.head_dim, back)
    }

    fn attend(&self, layer: usize, slot: usize) -> Result<(), ModelError> {
        let (gpu, c, tape, w) = (self.gpu, self.c, self.tape, self.weights(layer));
        let x = self.slot(&tape.x, slot, c.hidden);
        let hidden = self.rows(&self.room.hidden, c.hidden);
        let norm = self.norm(&w.attn_norm, &tape.x_inverse, slot, 1);
        gpu.rms_norm(hidden, x, norm, c.norm_eps)?;
        let q = self.slot(&tape.q, slot, c.q_width());
        let k = self.slot(&tape.k, slot, c.kv_width());
        let v = self.slot(&tape.v, slot, c.kv_width());
        let inner = self.inner(QKV, layer, slot);
        self.linear(layer, QKV)
            .forward(hidden, inner, false, &[q, k, v])?;
        if let Some(biases) = &w.bias {
            for (rows, bias) in [q, k, v].into_iter().zip(biases) {
                gpu.add_bias(rows, bias.all())?;
            }
        }
        if let Some(norms) = &w.head_norms {
            for ((rows, which), (weight, heads)) in [(q, Q_NORM), (k, K_NORM)]
                .into_iter()
                .zip(norms.iter().zip([c.heads, c.kv_heads]))
            {
                let [input, inverse] = &tape.normed[which];
                let input = self.slot(input, slot, heads * c.head_dim);
                input.copy_from(gpu, rows)?;
                let norm = self.norm(weight, inverse, slot, heads);
                gpu.rms_norm(rows, input, norm, c.norm_eps)?;
            }
        }
        self.rotate(layer, q, false)?;
        self.rotate(layer, k, false)?;
        let values = self.attended(slot);
        gpu.attention(&self.laid.plan, self.layer(layer), values)?;
        let middle = self.slot(&tape.middle, slot, c.hidden);
        middle.copy_from(gpu, x)?;
        let post = w.post_norms.as_ref().map(|[attn, _]| (attn, ATTN_POST));
        self.back((layer, slot), OUT, values.out, post, middle)
    }

    fn feed_forward(&self, layer: usize, slot: usize) -> Result<(), ModelError> {
        let (gpu, c, tape, w) = (self.gpu, self.c, self.tape, self.weights(layer));
        let middle = self.slot(&tape.middle, slot, c.hidden);
        let hidden = self.rows(&self.room.hidden, c.hidden);
        let norm = self.norm(&w.ffn_norm, &tape.middle_inverse, slot, 1);
        gpu.rms_norm(hidden, middle, norm, c.norm_eps)?;
        let gate = self.slot(&tape.gate, slot, c.ffn);
        let up = self.slot(&tape.up, slot, c.ffn);
        let inner = self.inner(GATE_UP, layer, slot);
        self.linear(layer, GATE_UP)
            .forward(hidden, inner, false, &[gate, up])?;
        let ffn = self.rows(&self.room.ffn, c.ffn);
        gpu.glu(c.parts.activation, ffn, gate, up)?;
        let next = self.slot(&tape.x, slot + 1, c.hidden);
        next.copy_from(gpu, middle)?;
        let post = w.post_norms.as_ref().map(|[_, ffn]| (ffn, FFN_POST));
        self.back((layer, slot), DOWN, ffn, post, next)
    }

    /// `stream += linear(x)`, the result normed first where there is a norm.
    fn back(
        &self,
        (layer, slot): (usize, usize),
        group: usize,
        x: View<'_, f32>,
        post: Option<(&'a Buffer<f32>, usize)>,
        stream: View<'_, f32>,
    ) -> Result<(), ModelError> {
        let linear = self.linear(layer, group);
        let inner = self.inner(group, layer, slot);
        let Some((weight, which)) = post else {
            return linear.forward(x, inner, true, &[stream]);
        };
        let [input, inverse] = &self.tape.normed[which];
        let input = self.slot(input, slot, self.c.hidden);
        linear.forward(x, inner, false, &[input])?;
        let room = self.rows(&self.room.hidden, self.c.hidden);
        let norm = self.norm(weight, inverse, slot, 1);
        self.gpu.rms_norm(room, input, norm, self.c.norm_eps)?;
        self.gpu.add(stream, room)
    }

    /// The gradient of a block's last linear layer, from that of the stream.
    fn back_backward(
        &self,
        slot: usize,
        post: Option<(&'a Buffer<f32>, usize)>,
        dx: View<'a, f32>,
    ) -> Result<View<'a, f32>, ModelError> {
        let Some((weight, which)) = post else {
            return Ok(dx);
        };
        let [input, inverse] = &self.tape.normed[which];
        let input = self.slot(input, slot, self.c.hidden);
        let room = self.rows(&self.room.hidden2, self.c.hidden);
        let norm = self.norm(weight, inverse, slot, 1);
        self.gpu.rms_norm_backward(room, false, dx, input, norm)?;
        Ok(room)
    }

    fn feed_forward_backward(&self, layer: usize, slot: usize) -> Result<(), ModelError> {
        let (gpu, c, tape, w) = (self.gpu, self.c, self.tape, self.weights(layer));
        let dx = self.rows(&self.room.dx, c.hidden);
        let post = w.post_norms.as_ref().map(|[_, ffn]| (ffn, FFN_POST));
        let d_down = self.back_backward(slot, post, dx)?;
        let ffn = self.rows(&self.room.ffn, c.ffn);
        let down = self.linear(layer, DOWN);
        down.backward(&[d_down], self.inner(DOWN, layer, slot), Some(ffn))?;
        let gate = self.slot(&tape.gate, slot, c.ffn);
        let up = self.slot(&tape.up, slot, c.ffn);
        gpu.glu_backward(c.parts.activation, ffn, gate, up)?;
        down.backward_a(ffn)?;

        let hidden = self.rows(&self.room.hidden, c.hidden);
        let again = self.rows(&self.room.hidden2, c.hidden);
        let gate_up = self.linear(layer, GATE_UP);
        let inner = self.inner(GATE_UP, layer, slot);
        gate_up.backward(&[gate, up], inner, Some(hidden))?;
        let norm = self.norm(&w.ffn_norm, &tape.middle_inverse, slot, 1);
        let middle = self.slot(&tape.middle, slot, c.hidden);
        gpu.rms_norm_again(again, middle, norm)?;
        gate_up.backward_a(again)?;
        gpu.rms_norm_backward(dx, true, hidden, middle, norm)
    }

    fn attend_backward(&self, layer: usize, slot: usize) -> Result<(), ModelError> {
        let (gpu, c, tape, room, w) = (self.gpu, self.c, self.tape, self.room, self.weights(layer));
        let Some(keys) = &self.laid.keys else {
            return Ok(());
        };
        let dx = self.rows(&room.dx, c.hidden);
        let post = w.post_norms.as_ref().map(|[attn, _]| (attn, ATTN_POST));
        let d_out = self.back_backward(slot, post, dx)?;
        let d_attended = self.rows(&room.q, c.q_width());
        let values = self.attended(slot);
        let out = self.linear(layer, OUT);
        out.backward(&[d_out], self.inner(OUT, layer, slot), Some(d_attended))?;
        out.backward_a(values.out)?;

        let k = self.slot(&tape.k, slot, c.kv_width());
        let v = self.slot(&tape.v, slot, c.kv_width());
        let (mut dq, mut dk, dv) = (
            self.rows(&room.q2, c.q_width()),
            self.rows(&room.k, c.kv_width()),
            self.rows(&room.v, c.kv_width()),
        );
        gpu.attention_backward(
            &self.laid.plan,
            keys,
            self.layer(layer),
            values,
            [k, v],
            d_attended,
            self.rows(&room.dots, c.heads),
            [dq, dk, dv],
        )?;
        self.rotate(layer, dq, true)?;
        self.rotate(layer, dk, true)?;
        if let Some([of_q, of_k]) = &w.head_norms {
            let [x, inverse] = &tape.normed[Q_NORM];
            let norm = self.norm(of_q, inverse, slot, c.heads);
            let x = self.slot(x, slot, c.q_width());
            gpu.rms_norm_backward(d_attended, false, dq, x, norm)?;
            let [x, inverse] = &tape.normed[K_NORM];
            let norm = self.norm(of_k, inverse, slot, c.kv_heads);
            let x = self.slot(x, slot, c.kv_width());
            let other = self.rows(&room.k2, c.kv_width());
            gpu.rms_norm_backward(other, false, dk, x, norm)?;
            (dq, dk) = (d_attended, other);
        }

        // Below the first layer there is nothing left to train.
        let hidden = self.rows(&room.hidden, c.hidden);
        let qkv = self.linear(layer, QKV);
        let inner = self.inner(QKV, layer, slot);
        qkv.backward(&[dq, dk, dv], inner, (layer > 0).then_some(hidden))?;
        let norm = self.norm(&w.attn_norm, &tape.x_inverse, slot, 1);
        let x = self.slot(&tape.x, slot, c.hidden);
        let again = self.rows(&room.hidden2, c.hidden);
        gpu.rms_norm_again(again, x, norm)?;
        qkv.backward_a(again)?;
        match layer {
            0 => Ok(()),
            _ => gpu.rms_norm_backward(dx, true, hidden, x, norm),
        }
    }

    /// The loss of the pack's targets; with `weight`, the gradient of `weight · Σ loss` goes to
    /// `room.dx`.
    fn loss(&self, pack: &Pack, weight: Option<f32>) -> Result<LossSum, ModelError> {
        let (gpu, c, room) = (self.gpu, self.c, self.room);
        let last = match self.keep {
            Keep::Everything => c.layers,
            Keep::Inputs | Keep::Nothing => 1,
        };
        let out = self.slot(&self.tape.x, last, c.hidden);
        let dx = self.rows(&room.dx, c.hidden);
        if weight.is_some() {
            dx.clear(gpu)?;
        }
        let (rows, tokens): (Vec<u32>, Vec<u32>) = pack
            .targets
            .iter()
            .map(|(row, token)| (*row as u32, *token))
            .unzip();
        let (rows, tokens) = (gpu.copy_of(&rows)?, gpu.copy_of(&tokens)?);
        let all = pack.targets.len();
        let losses = gpu.room(2 * all)?;
        let head = Matrix::new(self.model.head(), c.vocab, c.hidden);
        for start in (0..all).step_by(BLOCK) {
            let n = BLOCK.min(all - start);
            let [x, normed, d_rows] = [0, 1, 2].map(|at| room.rows[at].at(0, n * c.hidden));
            let norm = Norm {
                weight: self.model.norm.all(),
                inverse: room.rows[3].at(0, n),
            };
            let index = rows.at(start, n);
            let logits = room.logits.at(0, n * c.vocab);
            gpu.gather(x, out, index, c.hidden)?;
            gpu.rms_norm(normed, x, norm, c.norm_eps)?;
            let (hidden, target) = (
                Matrix::new(normed, n, c.hidden),
                Matrix::new(logits, n, c.vocab),
            );
            gpu.product(target, false, 1.0, hidden, head.t())?;
            gpu.cross_entropy(logits, tokens.at(start, n), losses.at(2 * start, 2 * n))?;
            if let Some(weight) = weight {
                gpu.product(hidden, false, weight, target, head)?;
                gpu.rms_norm_backward(d_rows, false, normed, x, norm)?;
                gpu.scatter_add(dx, d_rows, index, c.hidden)?;
            }
        }
        let losses = losses.all().read(gpu)?;
        let pairs = losses.chunks_exact(2);
        Ok(LossSum {
            loss: pairs.clone().map(|pair| f64::from(pair[0])).sum(),
            right: pairs.filter(|pair| pair[1] > 0.5).count(),
            tokens: all,
        })
    }
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
    fn forward(
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
    fn backward(
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
    fn backward_a(&self, x: View<'_, f32>) -> Result<(), ModelError> {
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
