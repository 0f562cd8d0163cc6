//! Gemma 3, its text part: norms before and after each block and on the heads, GELU, scaled
//! embeddings, and five layers with a sliding window for each that sees all.

use super::{Architecture, LocalLayers};
use crate::config::{Activation, LayerParts, LlamaConfig};

/// Layers of the 27B model, by which llama.cpp knows it too.
const LAYERS_OF_27B: usize = 62;

pub(super) const GEMMA3: Architecture = Architecture {
    gguf: "gemma3",
    model_type: "gemma3_text",
    parts: LayerParts {
        head_norms: true,
        post_norms: true,
        activation: Activation::GeluTanh,
        ..LayerParts::LLAMA
    },
    interleaved: false,
    head_dim: Some(256),
    rope_theta: 1_000_000.0,
    tied_head: true,
    ffn_norm: "pre_feedforward_layernorm",
    norms_less_one: true,
    scaled_embedding: true,
    query_scalar: Some(query_scalar),
    local: Some(LocalLayers {
        rope_theta: 10_000.0,
        pattern: 6,
    }),
    // 4B, 12B and 27B; 270M and 1B are text models.
    beside_pictures: &[34, 48, LAYERS_OF_27B],
};

/// GGUF files do not name it: the head size, but for the largest model, whose heads are narrower
/// than its hidden size over their number.
fn query_scalar(config: &LlamaConfig) -> f64 {
    match config.layers {
        LAYERS_OF_27B => config.hidden as f64 / config.heads as f64,
        _ => config.head_dim as f64,
    }
}
