//! A LoRA adapter repacked for inference.
//!
//! The adapter stays beside the base weights (no merged copy), so one base serves many adapters,
//! each row its own. Layers that read the same input share one product with their stacked `a`
//! factors.

use std::collections::BTreeMap;

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::kernels::View;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::rows::linear;
use crate::lora::{LoraAdapter, LoraPair, Module, activation};
use crate::profile::{self, Operation};

/// The adapters of the linear layers that read one input.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// `[width, inputs]`: the `a` factors below each other.
    pub(super) a: Vec<f32>,
    pub(super) inputs: usize,
    pub(super) width: usize,
    pub(super) members: Vec<Option<Member>>,
}

#[derive(Debug)]
pub(super) struct Member {
    /// The first column of this member in the group's inner activations.
    pub(super) column: usize,
    pub(super) rank: usize,
    /// `[outputs, rank]`, scaled.
    pub(super) b: Vec<f32>,
}

/// One layer's adapters, grouped by input.
#[derive(Debug, Default)]
pub(super) struct LayerDelta {
    pub(super) qkv: Group,
    pub(super) o: Group,
    pub(super) gate_up: Group,
    pub(super) down: Group,
}

/// An adapter, ready to run.
#[derive(Debug)]
pub(crate) struct Adapter {
    layers: Vec<LayerDelta>,
    invocation: Option<Vec<u32>>,
    /// The factors on a GPU, where it is used there.
    #[cfg(feature = "cuda")]
    pub(super) on_gpu: Option<super::on_gpu::GpuAdapter>,
}

impl Adapter {
    /// Repacks an adapter, or says where it does not fit the model.
    pub(crate) fn new(adapter: &LoraAdapter, config: &LlamaConfig) -> Result<Self, ModelError> {
        Ok(Self {
            layers: pack(adapter, config)?,
            invocation: adapter.config.invocation_tokens.clone(),
            #[cfg(feature = "cuda")]
            on_gpu: None,
        })
    }

    /// Whether it leaves what comes before its invocation to the base model.
    pub(crate) fn is_activated(&self) -> bool {
        self.invocation.is_some()
    }

    /// How many tokens of a prompt come before the adapter takes effect; `None` when it never
    /// does, since it is an activated one and not invoked.
    pub(crate) fn start(&self, prompt: &[u32]) -> Option<usize> {
        match &self.invocation {
            None => Some(0),
            Some(invocation) => activation(prompt, invocation),
        }
    }

    pub(super) fn layer(&self, layer: usize) -> &LayerDelta {
        &self.layers[layer]
    }

    /// Every layer's factors.
    #[cfg(feature = "cuda")]
    pub(super) fn layers(&self) -> &[LayerDelta] {
        &self.layers
    }
}

fn pack(adapter: &LoraAdapter, config: &LlamaConfig) -> Result<Vec<LayerDelta>, ModelError> {
    if adapter.layers.len() != config.layers {
        return Err(ModelError::Adapter(format!(
            "it has {} layers, the base model {}",
            adapter.layers.len(),
            config.layers
        )));
    }
    let scale = adapter.scale() as f32;
    let group = |index: usize, pairs: &BTreeMap<String, LoraPair>, modules: &[Module]| {
        Group::pack(pairs, modules, config, scale)
            .map_err(|reason| ModelError::Adapter(format!("layer {index}: {reason}")))
    };
    let layers = adapter.layers.iter().enumerate().map(|(index, pairs)| {
        Ok(LayerDelta {
            qkv: group(index, pairs, &[Module::Q, Module::K, Module::V])?,
            o: group(index, pairs, &[Module::O])?,
            gate_up: group(index, pairs, &[Module::Gate, Module::Up])?,
            down: group(index, pairs, &[Module::Down])?,
        })
    });
    layers.collect()
}

impl Group {
    fn pack(
        pairs: &BTreeMap<String, LoraPair>,
        modules: &[Module],
        config: &LlamaConfig,
        scale: f32,
    ) -> Result<Self, String> {
        let mut group = Self::default();
        for module in modules {
            group.inputs = module.input(config);
            let Some(pair) = pairs.get(module.name()) else {
                group.members.push(None);
                continue;
            };
            let (name, outputs) = (module.name(), module.output(config));
            let (a, b) = (pair.a.dims(), pair.b.dims());
            let rank = a.first().copied().unwrap_or(0);
            if a != [rank, group.inputs] || b != [outputs, rank] || rank == 0 {
                return Err(format!(
                    "`{name}` has factors {a:?} and {b:?}, the base model has {outputs} outputs \
                     and {} inputs",
                    group.inputs
                ));
            }
            let view = |tensor| View::new(tensor).map_err(|e| format!("`{name}`: {e}"));
            group.a.extend_from_slice(&view(&pair.a)?);
            let b = view(&pair.b)?.iter().map(|value| value * scale).collect();
            group.members.push(Some(Member {
                column: group.width,
                rank,
                b,
            }));
            group.width += rank;
        }
        Ok(group)
    }

    /// Adds the adapters' share to the outputs of the linear layers, which are in the group's
    /// order. `inner` is scratch space.
    pub(super) fn add<const N: usize>(
        &self,
        x: &[f32],
        outs: [&mut [f32]; N],
        inner: &mut Vec<f32>,
        threads: Threads,
    ) {
        if self.width == 0 {
            return;
        }
        let _counted = profile::scope(Operation::Lora);
        let rows = x.len() / self.inputs;
        inner.resize(rows * self.width, 0.0);
        linear(x, &self.a, self.inputs, inner, Into::Replace, threads);
        for (member, out) in self.members.iter().zip(outs) {
            let Some(Member { column, rank, b }) = member else {
                continue;
            };
            let outputs = b.len() / rank;
            let part = Mat::strided(&inner[*column..], rows, *rank, self.width);
            let target = MatMut::new(out, rows, outputs);
            matmul(
                target,
                Into::Add,
                1.0,
                part,
                Mat::new(b, outputs, *rank).t(),
                threads,
            );
        }
    }
}
