//! Low-rank adapters (LoRA, Hu et al. 2021) in PEFT's terms.

use std::collections::BTreeMap;

use candle_core::Tensor;

/// How an adapter is shaped: PEFT's `LoraConfig`, the part that this crate uses.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank `r` of every pair.
    pub rank: usize,
    /// The delta is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout on the adapter's input while training.
    pub dropout: f64,
    /// Adapted modules, such as `q_proj`.
    pub target_modules: Vec<String>,
}

/// The two factors of one adapted linear layer: `y += scale · (x · aᵀ) · bᵀ`.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// `[rank, in]`, f32.
    pub a: Tensor,
    /// `[out, rank]`, f32.
    pub b: Tensor,
}

/// An adapter for one base model.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    /// Its shape.
    pub config: LoraConfig,
    /// Per layer: module name (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    /// `down_proj`) to its pair.
    pub layers: Vec<BTreeMap<String, LoraPair>>,
}

impl LoraAdapter {
    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.config.alpha / self.config.rank as f64
    }
}
