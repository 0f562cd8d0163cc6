//! What the forward pass leaves for the backward pass, and the room that both compute in.
//!
//! Buffers are kept from step to step, since fresh pages cost more than many of the loops that
//! fill them. Knows no computation.

use super::params::Layout;
use crate::config::LlamaConfig;

/// One layer's values; widths are per token.
#[derive(Default)]
pub(super) struct LayerTape {
    /// Input of the layer, `hidden`.
    pub(super) x: Vec<f32>,
    /// `1 / rms` of it.
    pub(super) x_inverse: Vec<f32>,
    /// Rotated queries, `[heads, tokens, head_dim]`.
    pub(super) q: Vec<f32>,
    /// Rotated keys, `[kv_heads, tokens, head_dim]`.
    pub(super) k: Vec<f32>,
    /// Values, shaped as the keys.
    pub(super) v: Vec<f32>,
    /// Logarithms of the softmax sums, `[heads, tokens]`.
    pub(super) log_sums: Vec<f32>,
    /// Result of the attention, `heads · head_dim`.
    pub(super) attended: Vec<f32>,
    /// The residual stream between attention and feed-forward, `hidden`.
    pub(super) middle: Vec<f32>,
    /// `1 / rms` of it.
    pub(super) middle_inverse: Vec<f32>,
    /// Output of the gate projection, `ffn`.
    pub(super) gate: Vec<f32>,
    /// Output of the up projection, `ffn`.
    pub(super) up: Vec<f32>,
    /// `x·Aᵀ` of each group.
    pub(super) inner: [Vec<f32>; 4],
    /// Of the queries' norm, where there is one.
    pub(super) q_norm: NormTape,
    /// Of the keys' norm, where there is one.
    pub(super) k_norm: NormTape,
    /// Of the norm after the attention, where there is one.
    pub(super) attn_post: NormTape,
    /// Of the norm after the feed-forward layer, where there is one.
    pub(super) ffn_post: NormTape,
}

/// What a norm that not every model has leaves for the backward pass; empty without it.
#[derive(Default)]
pub(super) struct NormTape {
    /// Its input.
    pub(super) x: Vec<f32>,
    /// `1 / rms` of every row of it.
    pub(super) inverse: Vec<f32>,
}

/// Room for values that do not outlive a layer.
#[derive(Default)]
pub(super) struct Room {
    /// A normalised input or its gradient, `hidden`.
    pub(super) hidden: Vec<f32>,
    /// A second one.
    pub(super) hidden2: Vec<f32>,
    /// `heads · head_dim`, as rows.
    pub(super) q: Vec<f32>,
    /// The same by heads.
    pub(super) q_heads: Vec<f32>,
    /// `kv_heads · head_dim`, as rows.
    pub(super) k: Vec<f32>,
    /// The same by heads.
    pub(super) k_heads: Vec<f32>,
    /// As `k`.
    pub(super) v: Vec<f32>,
    /// As `k_heads`.
    pub(super) v_heads: Vec<f32>,
    /// `ffn`.
    pub(super) ffn: Vec<f32>,
    /// Gradient of an `inner`.
    pub(super) inner: Vec<f32>,
}

/// What is kept of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// All that the backward pass reads.
    Everything,
    /// Each layer's input; the backward pass computes the rest again, one layer at a time (Chen
    /// et al. 2016). A third more computation, a small part of the memory.
    Inputs,
    /// Nothing: no backward pass follows.
    Nothing,
}

/// The whole record.
#[derive(Default)]
pub(super) struct Tape {
    /// One a layer, or one for all of them when less is kept.
    pub(super) layers: Vec<LayerTape>,
    /// Inputs of the layers, where only they are kept.
    pub(super) inputs: Vec<Vec<f32>>,
    /// Output of the last layer, `hidden`.
    pub(super) out: Vec<f32>,
    /// Gradient of the residual stream, `hidden`.
    pub(super) dx: Vec<f32>,
    pub(super) room: Room,
}

impl Tape {
    /// Values that [`Tape::fit`] makes room for, per token.
    pub(super) fn token_floats(model: &LlamaConfig, layout: &Layout, keep: Keep) -> usize {
        let (q, kv) = (
            model.heads * model.head_dim,
            model.kv_heads * model.head_dim,
        );
        let mut layer = 2 * (model.hidden + 1) + 2 * q + 2 * kv + model.heads + 2 * model.ffn;
        let groups = layout.layers.first();
        layer += groups.map_or(0, |groups| {
            groups.iter().map(|group| group.inner).sum::<usize>()
        });
        if model.parts.head_norms {
            layer += q + model.heads + kv + model.kv_heads;
        }
        if model.parts.post_norms {
            layer += 2 * (model.hidden + 1);
        }
        let kept = match keep {
            Keep::Everything => model.layers * layer,
            Keep::Inputs => model.layers * model.hidden + layer,
            Keep::Nothing => layer,
        };
        let room = 2 * model.hidden + 2 * q + model.ffn + 4 * kv;
        kept + room + 2 * model.hidden
    }

    /// Makes every buffer fit `tokens` rows.
    pub(super) fn fit(&mut self, model: &LlamaConfig, layout: &Layout, tokens: usize, keep: Keep) {
        let (q, kv) = (
            model.heads * model.head_dim,
            model.kv_heads * model.head_dim,
        );
        let size = |buffer: &mut Vec<f32>, width: usize| buffer.resize(tokens * width, 0.0);
        let (layers, inputs) = match keep {
            Keep::Everything => (model.layers, 0),
            Keep::Inputs => (1, model.layers),
            Keep::Nothing => (1, 0),
        };
        // What a pass that kept more left is room for the next one that does.
        if self.layers.len() < layers {
            self.layers.resize_with(layers, LayerTape::default);
        }
        self.inputs.resize_with(inputs, Vec::new);
        for input in &mut self.inputs {
            size(input, model.hidden);
        }
        for (tape, groups) in self.layers.iter_mut().take(layers).zip(&layout.layers) {
            size(&mut tape.x, model.hidden);
            size(&mut tape.x_inverse, 1);
            size(&mut tape.q, q);
            size(&mut tape.k, kv);
            size(&mut tape.v, kv);
            size(&mut tape.log_sums, model.heads);
            size(&mut tape.attended, q);
            size(&mut tape.middle, model.hidden);
            size(&mut tape.middle_inverse, 1);
            size(&mut tape.gate, model.ffn);
            size(&mut tape.up, model.ffn);
            for (inner, group) in tape.inner.iter_mut().zip(groups) {
                size(inner, group.inner);
            }
            if model.parts.head_norms {
                size(&mut tape.q_norm.x, q);
                size(&mut tape.q_norm.inverse, model.heads);
                size(&mut tape.k_norm.x, kv);
                size(&mut tape.k_norm.inverse, model.kv_heads);
            }
            if model.parts.post_norms {
                for post in [&mut tape.attn_post, &mut tape.ffn_post] {
                    size(&mut post.x, model.hidden);
                    size(&mut post.inverse, 1);
                }
            }
        }
        size(&mut self.out, model.hidden);
        size(&mut self.dx, model.hidden);
        let room = &mut self.room;
        size(&mut room.hidden, model.hidden);
        size(&mut room.hidden2, model.hidden);
        size(&mut room.q, q);
        size(&mut room.q_heads, q);
        size(&mut room.ffn, model.ffn);
        for buffer in [
            &mut room.k,
            &mut room.k_heads,
            &mut room.v,
            &mut room.v_heads,
        ] {
            size(buffer, kv);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tiny;
    use super::*;
    use crate::architecture;
    use crate::error::ModelError;
    use crate::lora::LoraConfig;

    fn values(tape: &Tape) -> usize {
        let norm = |norm: &NormTape| norm.x.len() + norm.inverse.len();
        let layer = |layer: &LayerTape| {
            let rows = [
                &layer.x,
                &layer.x_inverse,
                &layer.q,
                &layer.k,
                &layer.v,
                &layer.log_sums,
                &layer.attended,
                &layer.middle,
                &layer.middle_inverse,
                &layer.gate,
                &layer.up,
            ];
            let rows = rows.into_iter().chain(&layer.inner).map(Vec::len);
            let norms = [
                &layer.q_norm,
                &layer.k_norm,
                &layer.attn_post,
                &layer.ffn_post,
            ];
            rows.sum::<usize>() + norms.into_iter().map(norm).sum::<usize>()
        };
        let room = &tape.room;
        let rest = [
            &tape.out,
            &tape.dx,
            &room.hidden,
            &room.hidden2,
            &room.q,
            &room.q_heads,
            &room.k,
            &room.k_heads,
            &room.v,
            &room.v_heads,
            &room.ffn,
        ];
        let rest = rest.into_iter().chain(&tape.inputs).map(Vec::len);
        tape.layers.iter().map(layer).sum::<usize>() + rest.sum::<usize>()
    }

    #[test]
    fn the_room_of_a_token_is_what_is_made() -> Result<(), ModelError> {
        for architecture in architecture::ALL {
            let model = tiny::weights_of(architecture, 1).config;
            let layout = Layout::new(&LoraConfig::default(), &model)?;
            for keep in [Keep::Everything, Keep::Inputs, Keep::Nothing] {
                let mut tape = Tape::default();
                tape.fit(&model, &layout, 5, keep);
                let wanted = 5 * Tape::token_floats(&model, &layout, keep);
                assert_eq!(values(&tape), wanted, "{} {keep:?}", architecture.gguf);
            }
        }
        Ok(())
    }
}
