//! Llama, and SmolLM2, which is one. The others say what they do differently.

use super::Architecture;
use crate::config::LayerParts;

pub(super) const LLAMA: Architecture = Architecture {
    gguf: "llama",
    model_type: "llama",
    parts: LayerParts::LLAMA,
    interleaved: true,
    head_dim: None,
    rope_theta: 10_000.0,
    tied_head: false,
    ffn_norm: "post_attention_layernorm",
    norms_less_one: false,
    scaled_embedding: false,
    query_scalar: None,
    local: None,
    beside_pictures: &[],
};
