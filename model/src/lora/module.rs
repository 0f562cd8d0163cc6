//! The linear layers of a Llama layer that an adapter can sit on. Knows no tensor.

use crate::config::LlamaConfig;

/// An adaptable linear layer; the order is that of the computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Module {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of the attention.
    O,
    /// Gate projection of the feed-forward layer.
    Gate,
    /// Up projection of the feed-forward layer.
    Up,
    /// Down projection of the feed-forward layer.
    Down,
}

impl Module {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Its name in PEFT and `transformers`, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The module of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|module| module.name() == name)
    }

    /// The block of a layer that it belongs to: `self_attn` or `mlp`.
    pub fn block(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }

    /// Width of its input.
    pub fn input(self, config: &LlamaConfig) -> usize {
        match self {
            Self::Q | Self::K | Self::V | Self::Gate | Self::Up => config.hidden,
            Self::O => config.heads * config.head_dim,
            Self::Down => config.ffn,
        }
    }

    /// Width of its output.
    pub fn output(self, config: &LlamaConfig) -> usize {
        match self {
            Self::Q => config.heads * config.head_dim,
            Self::K | Self::V => config.kv_heads * config.head_dim,
            Self::O | Self::Down => config.hidden,
            Self::Gate | Self::Up => config.ffn,
        }
    }
}
