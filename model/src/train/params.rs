//! Where each trained value lives: all factors of the adapter in one flat vector.
//!
//! The optimizer, the gradient norm and the saved state see plain slices. Modules that read the
//! same input (`q`, `k`, `v`; `gate`, `up`) form a group whose `a` factors lie one after the
//! other, so that one product serves them all. Knows no computation. Invariant: the layout
//! depends on the two configs alone.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::lora::{LoraAdapter, LoraConfig, LoraPair, Module};

/// Modules that read the same input.
pub(super) const GROUPS: [&[Module]; 4] = [
    &[Module::Q, Module::K, Module::V],
    &[Module::O],
    &[Module::Gate, Module::Up],
    &[Module::Down],
];

/// The place of one module's factors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) module: Module,
    /// Width of its output.
    pub(super) output: usize,
    /// Where its `b` lies and its first column in the group's inner values; none without LoRA.
    pub(super) factors: Option<(Range<usize>, usize)>,
}

/// The place of a group's factors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// Width of the common input.
    pub(super) input: usize,
    /// All `a` factors of the group, `[inner, input]`.
    pub(super) a: Range<usize>,
    /// Sum of the ranks.
    pub(super) inner: usize,
    pub(super) members: Vec<Member>,
}

/// The whole map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) rank: usize,
    pub(super) layers: Vec<[Group; 4]>,
    /// Number of trained values.
    pub(super) len: usize,
}

impl Layout {
    pub(super) fn new(lora: &LoraConfig, model: &LlamaConfig) -> Result<Self, ModelError> {
        Ok(Self::of(&lora.check()?, lora.rank, model))
    }

    /// That of a model without an adapter.
    pub(super) fn none(model: &LlamaConfig) -> Self {
        Self::of(&[], 1, model)
    }

    fn of(adapted: &[Module], rank: usize, model: &LlamaConfig) -> Self {
        let mut len = 0;
        let mut take = |size: usize| {
            len += size;
            len - size..len
        };
        let mut group = |modules: &[Module]| {
            let input = modules[0].input(model);
            let with = modules.iter().filter(|m| adapted.contains(m)).count();
            let a = take(with * rank * input);
            let mut column = 0;
            let members = modules.iter().map(|module| {
                let output = module.output(model);
                let factors = adapted.contains(module).then(|| {
                    column += rank;
                    (take(output * rank), column - rank)
                });
                Member {
                    module: *module,
                    output,
                    factors,
                }
            });
            Group {
                input,
                a,
                inner: with * rank,
                members: members.collect(),
            }
        };
        let layers = (0..model.layers).map(|_| GROUPS.map(&mut group)).collect();
        Self { rank, layers, len }
    }

    /// The adapter's values in this layout.
    ///
    /// # Errors
    /// [`ModelError::Adapter`] when a factor is missing or of another size.
    pub(super) fn flatten(&self, adapter: &LoraAdapter) -> Result<Vec<f32>, ModelError> {
        let mut values = vec![0.0; self.len];
        for (layer, a, b, module) in self.pairs() {
            let pair = adapter.layers.get(layer).and_then(|l| l.get(module.name()));
            let missing = || format!("layer {layer} has no `{}`", module.name());
            let pair = pair.ok_or_else(|| ModelError::Adapter(missing()))?;
            for (range, tensor) in [(a, &pair.a), (b, &pair.b)] {
                let from = tensor.flatten_all()?.to_vec1::<f32>()?;
                if from.len() != range.len() {
                    let name = module.name();
                    let reason = format!("layer {layer} `{name}` has another size than the model");
                    return Err(ModelError::Adapter(reason));
                }
                values[range].copy_from_slice(&from);
            }
        }
        Ok(values)
    }

    /// The adapter that `values` are.
    pub(super) fn adapter(
        &self,
        values: &[f32],
        config: &LoraConfig,
    ) -> Result<LoraAdapter, ModelError> {
        let mut layers = vec![BTreeMap::new(); self.layers.len()];
        let tensor = |range: Range<usize>, rows: usize| {
            let columns = range.len() / rows;
            Tensor::from_slice(&values[range], (rows, columns), &Device::Cpu)
        };
        for (layer, a, b, module) in self.pairs() {
            let output = b.len() / self.rank;
            let pair = LoraPair {
                a: tensor(a, self.rank)?,
                b: tensor(b, output)?,
            };
            layers[layer].insert(module.name().to_owned(), pair);
        }
        let config = config.clone();
        Ok(LoraAdapter { config, layers })
    }

    /// Layer, `a`, `b` and module of every pair.
    pub(super) fn pairs(
        &self,
    ) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>, Module)> {
        let groups = self.layers.iter().enumerate();
        let groups = groups.flat_map(|(layer, groups)| groups.iter().map(move |g| (layer, g)));
        groups.flat_map(move |(layer, group)| {
            group.members.iter().filter_map(move |member| {
                let (b, column) = member.factors.clone()?;
                let start = group.a.start + column * group.input;
                let a = start..start + self.rank * group.input;
                Some((layer, a, b, member.module))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::tiny;

    #[test]
    fn an_adapter_survives_the_flat_layout() {
        let weights = tiny::weights(1);
        for modules in [vec!["q_proj", "v_proj", "up_proj"], vec!["down_proj"]] {
            let lora = LoraConfig {
                rank: 3,
                target_modules: modules.into_iter().map(str::to_owned).collect(),
                ..LoraConfig::default()
            };
            let layout = Layout::new(&lora, &weights.config).unwrap();
            let adapter = tiny::adapter(&lora, &weights.config, 5);
            let values = layout.flatten(&adapter).unwrap();
            assert_eq!(values.len(), adapter.parameters());
            let back = layout.adapter(&values, &lora).unwrap();
            assert_eq!(
                back.to_safetensors().unwrap(),
                adapter.to_safetensors().unwrap()
            );
        }
    }
}
