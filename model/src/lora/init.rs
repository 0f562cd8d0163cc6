//! The adapter that training starts from.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{LoraAdapter, LoraConfig, LoraPair};
use crate::config::LlamaConfig;
use crate::error::ModelError;

impl LoraAdapter {
    /// A new adapter, as PEFT starts one: `a` Kaiming-uniform with `a = √5`, which is uniform in
    /// `±1/√in`, and `b` zero, so that it changes nothing yet. The same seed gives the same
    /// values on every machine.
    ///
    /// # Errors
    /// [`ModelError::Config`] when `config` is out of range.
    pub fn init(config: &LoraConfig, model: &LlamaConfig, seed: u64) -> Result<Self, ModelError> {
        let modules = config.check()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut layers = Vec::with_capacity(model.layers);
        for _ in 0..model.layers {
            let mut layer = BTreeMap::new();
            for module in &modules {
                let (input, output) = (module.input(model), module.output(model));
                let bound = 1.0 / (input as f32).sqrt();
                let a: Vec<f32> = (0..config.rank * input)
                    .map(|_| (2.0 * rng.random::<f32>() - 1.0) * bound)
                    .collect();
                let pair = LoraPair {
                    a: Tensor::from_vec(a, (config.rank, input), &Device::Cpu)?,
                    b: Tensor::from_vec(
                        vec![0f32; output * config.rank],
                        (output, config.rank),
                        &Device::Cpu,
                    )?,
                };
                layer.insert(module.name().to_owned(), pair);
            }
            layers.push(layer);
        }
        Ok(Self {
            config: config.clone(),
            layers,
        })
    }
}
