//! Llama, and SmolLM2, which is one.

use super::Architecture;
use crate::config::LayerParts;

pub(super) const LLAMA: Architecture = Architecture {
    gguf: "llama",
    model_type: "llama",
    parts: LayerParts::LLAMA,
    interleaved: true,
    head_dim: None,
};
