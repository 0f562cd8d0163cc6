//! Low-rank adapters (LoRA, Hu et al. 2021) in PEFT's terms.
//!
//! Knows no training and no generation. Invariant: an adapter that [`LoraAdapter::init`] or
//! [`LoraAdapter::load`] returned fits the model whose config it was given, so later code does
//! not check shapes again.

mod config;
mod init;
mod module;
mod names;
mod peft;

use std::collections::BTreeMap;

use candle_core::Tensor;

pub use config::LoraConfig;
pub(crate) use config::activation;
pub use module::Module;
pub use names::LayerNames;
pub(crate) use peft::replace;

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
        self.config.scale()
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        let pairs = self.layers.iter().flat_map(BTreeMap::values);
        pairs.map(|p| p.a.elem_count() + p.b.elem_count()).sum()
    }
}
