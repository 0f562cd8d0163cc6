//! Qwen 2 and 2.5: queries, keys and values have biases.

use super::Architecture;
use super::llama::LLAMA;
use crate::config::LayerParts;

pub(super) const QWEN2: Architecture = Architecture {
    gguf: "qwen2",
    model_type: "qwen2",
    parts: LayerParts {
        qkv_bias: true,
        ..LayerParts::LLAMA
    },
    interleaved: false,
    ..LLAMA
};
