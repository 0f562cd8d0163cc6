//! Qwen 3: no biases, but a norm on every head's queries and keys; its heads have a width of
//! their own.

use super::Architecture;
use super::llama::LLAMA;
use crate::config::LayerParts;

pub(super) const QWEN3: Architecture = Architecture {
    gguf: "qwen3",
    model_type: "qwen3",
    parts: LayerParts {
        head_norms: true,
        ..LayerParts::LLAMA
    },
    interleaved: false,
    head_dim: Some(128),
    ..LLAMA
};
