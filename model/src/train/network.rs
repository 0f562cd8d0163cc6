//! The adapted model as the trainer runs it: one forward and one backward pass over a pack.
//!
//! Written by hand, layer by layer, since every operation has a short closed gradient: automatic
//! differentiation would compute gradients of frozen weights and keep every temporary. Knows no
//! optimizer. Invariant: [`Network::backward`] follows a forward pass over the same pack with
//! the same trained values; it uses the tape up.

use rayon::prelude::*;

use super::attention::{Attention, OutGradient};
use super::frozen::Frozen;
use super::linear::{Dropout, Linear};
use super::norm;
use super::pack::Pack;
use super::params::Layout;
use super::past::Stretch;
use super::residual::Residual;
use super::rope::{Rope, Turn};
use super::tape::{Keep, LayerTape, Room, Tape};
use crate::kernels::matmul::Into;
use crate::kernels::rows::add_bias;
use crate::kernels::vector;
use crate::profile::{self, Operation};

/// First module and number of modules of each group, in the order of `Module::ALL`.
pub(super) const MODULES: [std::ops::Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];
pub(super) const QKV: usize = 0;
pub(super) const OUT: usize = 1;
pub(super) const GATE_UP: usize = 2;
pub(super) const DOWN: usize = 3;

/// Everything that stays the same while training.
pub(super) struct Network<'a> {
    pub(super) frozen: &'a Frozen<'a>,
    pub(super) layout: &'a Layout,
    /// One for each of the model's frequency tables.
    pub(super) ropes: &'a [Rope],
    /// `alpha / rank`.
    pub(super) scale: f32,
    /// Share of the adapters' inputs to drop, with the seed of this pass.
    pub(super) dropout: Option<Dropout>,
}

impl Network<'_> {
    /// Runs `pack` and records it; the result is `tape.out`.
    pub(super) fn forward(&self, params: &[f32], pack: &Pack, tape: &mut Tape, keep: Keep) {
        self.run(params, pack, tape, keep, None);
    }

    /// Runs `pack` without a record; keys and values go to `stretch`.
    pub(super) fn forward_only(
        &self,
        params: &[f32],
        pack: &Pack,
        tape: &mut Tape,
        stretch: Option<&mut Stretch>,
    ) {
        self.run(params, pack, tape, Keep::Nothing, stretch);
    }

    fn run(
        &self,
        params: &[f32],
        pack: &Pack,
        tape: &mut Tape,
        keep: Keep,
        mut stretch: Option<&mut Stretch>,
    ) {
        tape.fit(self.frozen.config, self.layout, pack.tokens.len(), keep);
        let Tape {
            layers,
            inputs,
            out,
            room,
            ..
        } = tape;
        if let Some(first) = layers.first_mut() {
            self.embed(pack, &mut first.x);
        }
        for layer in 0..self.frozen.config.layers {
            if keep == Keep::Everything {
                let (now, later) = layers.split_at_mut(layer + 1);
                let next = later.first_mut().map_or(&mut *out, |next| &mut next.x);
                self.attend(layer, params, pack, &mut now[layer], room);
                self.feed_forward(layer, params, pack, &mut now[layer], room, next);
                continue;
            }
            let now = &mut layers[0];
            if let Some(input) = inputs.get_mut(layer) {
                input.copy_from_slice(&now.x);
            }
            self.attend(layer, params, pack, now, room);
            if let Some(stretch) = &mut stretch {
                stretch.push(&now.k, &now.v);
            }
            self.feed_forward(layer, params, pack, now, room, out);
            std::mem::swap(&mut now.x, out);
        }
        if keep != Keep::Everything {
            // The last layer's result went where the next one's input would be.
            std::mem::swap(&mut layers[0].x, out);
        }
    }

    fn embed(&self, pack: &Pack, x: &mut [f32]) {
        let width = self.frozen.config.hidden;
        let rows = x.par_chunks_mut(width).zip(&pack.tokens);
        rows.with_min_len(64).for_each(|(row, token)| {
            let at = *token as usize * width;
            row.copy_from_slice(&self.frozen.embed[at..at + width]);
        });
    }

    /// Adds the gradients of the trained values to `grads`, from `tape.dx`, the gradient of
    /// `tape.out`.
    pub(super) fn backward(&self, params: &[f32], grads: &mut [f32], pack: &Pack, tape: &mut Tape) {
        let Tape {
            layers,
            inputs,
            dx,
            out,
            room,
        } = tape;
        for layer in (0..self.frozen.config.layers).rev() {
            let tape = match inputs.get(layer) {
                None => &mut layers[layer],
                Some(input) => {
                    let tape = &mut layers[0];
                    tape.x.copy_from_slice(input);
                    self.attend(layer, params, pack, tape, room);
                    self.feed_forward(layer, params, pack, tape, room, out);
                    tape
                }
            };
            self.feed_forward_backward(layer, params, grads, pack, tape, room, dx);
            self.attend_backward(layer, params, grads, pack, tape, room, dx);
        }
    }

    fn linear<'b>(
        &'b self,
        layer: usize,
        group: usize,
        params: &'b [f32],
        pack: &Pack,
    ) -> Linear<'b> {
        let place = (layer * MODULES.len() + group) as u64;
        Linear {
            group: &self.layout.layers[layer][group],
            weights: &self.frozen.layers[layer].modules[MODULES[group].clone()],
            params,
            rank: self.layout.rank,
            scale: self.scale,
            dropout: self.dropout.map(|dropout| dropout.of_place(place)),
            tokens: pack.tokens.len(),
        }
    }

    fn rope(&self, layer: usize) -> &Rope {
        &self.ropes[self.frozen.config.frequency_table(layer)]
    }

    /// The way of a layer's attention (0) or feed-forward layer (1) into the residual stream.
    fn residual(&self, layer: usize, block: usize) -> Residual<'_> {
        let norms = self.frozen.layers[layer].post_norms.as_ref();
        Residual {
            norm: norms.map(|norms| &norms[block][..]),
            eps: self.frozen.config.norm_eps,
        }
    }

    fn attention<'b>(&self, layer: usize, pack: &'b Pack, tape: &'b LayerTape) -> Attention<'b> {
        let values = [&tape.q[..], &tape.k, &tape.v];
        Attention::new(self.frozen.config, layer, pack, values)
    }

    /// Biases on queries, keys and values, and norms of their heads, where the layer has them.
    fn complete(&self, layer: usize, tape: &mut LayerTape, room: &mut Room) {
        let _counted = profile::scope(Operation::Elementwise);
        let frozen = &self.frozen.layers[layer];
        if let Some(biases) = &frozen.bias {
            let rows = [&mut room.q, &mut room.k, &mut room.v];
            for (rows, bias) in rows.into_iter().zip(biases) {
                let rows = rows.par_chunks_mut(64 * bias.len());
                rows.for_each(|rows| add_bias(rows, bias));
            }
        }
        if let Some([q, k]) = &frozen.head_norms {
            let eps = self.frozen.config.norm_eps;
            norm::forward_in_place(&mut room.q, &mut tape.q_norm, q, eps);
            norm::forward_in_place(&mut room.k, &mut tape.k_norm, k, eps);
        }
    }

    /// The gradients of what [`Network::complete`] made, in `room`, become those of what it got.
    fn complete_backward(&self, layer: usize, tape: &LayerTape, room: &mut Room) {
        if let Some([q, k]) = &self.frozen.layers[layer].head_norms {
            norm::backward_in_place(&mut room.q, &tape.q_norm, q, &mut room.q_heads);
            norm::backward_in_place(&mut room.k, &tape.k_norm, k, &mut room.k_heads);
        }
    }

    /// `middle = x + out_proj(attention(norm(x)))`, where the model has a norm after it, with that.
    fn attend(
        &self,
        layer: usize,
        params: &[f32],
        pack: &Pack,
        tape: &mut LayerTape,
        room: &mut Room,
    ) {
        let weight = &self.frozen.layers[layer].attn_norm;
        let eps = self.frozen.config.norm_eps;
        norm::forward(&mut room.hidden, &mut tape.x_inverse, &tape.x, weight, eps);
        let rows = &mut [&mut room.q[..], &mut room.k[..], &mut room.v[..]];
        let linear = self.linear(layer, QKV, params, pack);
        linear.forward(&room.hidden, &mut tape.inner[QKV], Into::Replace, rows);
        self.complete(layer, tape, room);
        let counted = profile::scope(Operation::Attention);
        let (rope, at) = (self.rope(layer), &pack.positions);
        rope.split(&mut tape.q, &room.q, at, Turn::Forward);
        rope.split(&mut tape.k, &room.k, at, Turn::Forward);
        rope.split(&mut tape.v, &room.v, at, Turn::None);
        let mut log_sums = std::mem::take(&mut tape.log_sums);
        self.attention(layer, pack, tape)
            .forward(&mut room.q_heads, &mut log_sums);
        tape.log_sums = log_sums;
        rope.merge(&mut tape.attended, &room.q_heads, at, Turn::None);
        drop(counted);
        tape.middle.copy_from_slice(&tape.x);
        let linear = self.linear(layer, OUT, params, pack);
        self.residual(layer, 0).forward(
            &linear,
            &tape.attended,
            &mut tape.inner[OUT],
            &mut tape.attn_post,
            &mut room.hidden,
            &mut tape.middle,
        );
    }

    /// `next = middle + down(activation(gate(norm(middle))) · up(norm(middle)))`, where the model
    /// has a norm after it, with that.
    fn feed_forward(
        &self,
        layer: usize,
        params: &[f32],
        pack: &Pack,
        tape: &mut LayerTape,
        room: &mut Room,
        next: &mut [f32],
    ) {
        let weight = &self.frozen.layers[layer].ffn_norm;
        let eps = self.frozen.config.norm_eps;
        norm::forward(
            &mut room.hidden,
            &mut tape.middle_inverse,
            &tape.middle,
            weight,
            eps,
        );
        let linear = self.linear(layer, GATE_UP, params, pack);
        let rows = &mut [&mut tape.gate[..], &mut tape.up[..]];
        linear.forward(&room.hidden, &mut tape.inner[GATE_UP], Into::Replace, rows);
        let counted = profile::scope(Operation::Elementwise);
        let activation = self.frozen.config.parts.activation;
        vector::glu(activation, &mut room.ffn, &tape.gate, &tape.up);
        next.copy_from_slice(&tape.middle);
        drop(counted);
        let linear = self.linear(layer, DOWN, params, pack);
        self.residual(layer, 1).forward(
            &linear,
            &room.ffn,
            &mut tape.inner[DOWN],
            &mut tape.ffn_post,
            &mut room.hidden,
            next,
        );
    }

    #[allow(clippy::too_many_arguments)]
    fn feed_forward_backward(
        &self,
        layer: usize,
        params: &[f32],
        grads: &mut [f32],
        pack: &Pack,
        tape: &mut LayerTape,
        room: &mut Room,
        dx: &mut [f32],
    ) {
        let down = self.linear(layer, DOWN, params, pack);
        let residual = self.residual(layer, 1);
        let d_down = residual.backward(&tape.ffn_post, dx, &mut room.hidden2);
        down.backward(
            &[d_down],
            &tape.inner[DOWN],
            &mut room.inner,
            grads,
            Some(&mut room.ffn),
        );
        let counted = profile::scope(Operation::Elementwise);
        let activation = self.frozen.config.parts.activation;
        vector::glu_backward(activation, &mut room.ffn, &mut tape.gate, &mut tape.up);
        drop(counted);
        down.backward_a(&room.ffn, &room.inner, grads);

        let gate_up = self.linear(layer, GATE_UP, params, pack);
        let dys = [&tape.gate[..], &tape.up[..]];
        let inner = &tape.inner[GATE_UP];
        gate_up.backward(&dys, inner, &mut room.inner, grads, Some(&mut room.hidden));
        let weight = &self.frozen.layers[layer].ffn_norm;
        norm::again(
            &mut room.hidden2,
            &tape.middle_inverse,
            &tape.middle,
            weight,
        );
        gate_up.backward_a(&room.hidden2, &room.inner, grads);
        norm::backward(dx, &room.hidden, &tape.middle_inverse, &tape.middle, weight);
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_backward(
        &self,
        layer: usize,
        params: &[f32],
        grads: &mut [f32],
        pack: &Pack,
        tape: &mut LayerTape,
        room: &mut Room,
        dx: &mut [f32],
    ) {
        let out = self.linear(layer, OUT, params, pack);
        let residual = self.residual(layer, 0);
        let d_out = residual.backward(&tape.attn_post, dx, &mut room.hidden2);
        out.backward(
            &[d_out],
            &tape.inner[OUT],
            &mut room.inner,
            grads,
            Some(&mut room.q),
        );
        out.backward_a(&tape.attended, &room.inner, grads);

        let counted = profile::scope(Operation::Attention);
        let given = OutGradient {
            out: &tape.attended,
            d_out: &room.q,
            log_sums: &tape.log_sums,
        };
        let (dq, dk, dv) = (&mut room.q_heads, &mut room.k_heads, &mut room.v_heads);
        self.attention(layer, pack, tape)
            .backward(&given, dq, dk, dv);
        let (rope, at) = (self.rope(layer), &pack.positions);
        rope.merge(&mut room.q, dq, at, Turn::Backward);
        rope.merge(&mut room.k, dk, at, Turn::Backward);
        rope.merge(&mut room.v, dv, at, Turn::None);
        drop(counted);
        self.complete_backward(layer, tape, room);

        // Below the first layer there is nothing left to train.
        let d_hidden = (layer > 0).then_some(&mut room.hidden[..]);
        let qkv = self.linear(layer, QKV, params, pack);
        let dys = [&room.q[..], &room.k[..], &room.v[..]];
        qkv.backward(&dys, &tape.inner[QKV], &mut room.inner, grads, d_hidden);
        let weight = &self.frozen.layers[layer].attn_norm;
        norm::again(&mut room.hidden2, &tape.x_inverse, &tape.x, weight);
        qkv.backward_a(&room.hidden2, &room.inner, grads);
        if layer > 0 {
            norm::backward(dx, &room.hidden, &tape.x_inverse, &tape.x, weight);
        }
    }
}
