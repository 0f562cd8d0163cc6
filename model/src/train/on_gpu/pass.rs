//! One pass of training on a GPU, as `network` and `head` have it.

use super::Laid;
use super::linear::Linear;
use super::tape::{BLOCK, Room, Tape};
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gpu::{Attended, Buffer, Gpu, GpuLayer, GpuModel, Layer, Matrix, Norm, View};
use crate::train::head::LossSum;
use crate::train::linear::Dropout;
use crate::train::network::{DOWN, GATE_UP, MODULES, OUT, QKV};
use crate::train::pack::Pack;
use crate::train::params::Layout;
use crate::train::tape::Keep;

/// Norms that not every model has, in the order of `Tape::normed`.
const Q_NORM: usize = 0;
const K_NORM: usize = 1;
const ATTN_POST: usize = 2;
const FFN_POST: usize = 3;

/// One pass.
pub(super) struct Pass<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) c: &'a LlamaConfig,
    pub(super) model: &'a GpuModel,
    pub(super) layout: &'a Layout,
    pub(super) params: View<'a, f32>,
    pub(super) grads: View<'a, f32>,
    pub(super) scale: f32,
    pub(super) dropout: Option<Dropout>,
    pub(super) keep: Keep,
    pub(super) n: usize,
    pub(super) tape: &'a Tape,
    pub(super) room: &'a Room,
    pub(super) laid: &'a Laid,
}

impl<'a> Pass<'a> {
    /// The values of a slot of the tape.
    fn slot(&self, buffer: &'a Buffer<f32>, slot: usize, width: usize) -> View<'a, f32> {
        let len = self.n * width;
        buffer.at(slot * len, len)
    }

    pub(super) fn rows(&self, buffer: &'a Buffer<f32>, width: usize) -> View<'a, f32> {
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
    pub(super) fn forward(&self, kept: Option<&Buffer<f32>>) -> Result<(), ModelError> {
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
    pub(super) fn backward(&self) -> Result<(), ModelError> {
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
    pub(super) fn loss(&self, pack: &Pack, weight: Option<f32>) -> Result<LossSum, ModelError> {
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
