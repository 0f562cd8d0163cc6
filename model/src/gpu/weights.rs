//! A base model's weights on a device.
//!
//! Knows no pass. Invariant: every buffer has the size that the config says.

use candle_core::Tensor;

use super::backend::{Buffer, Gpu, View};
use super::cuda::too_little;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::kernels;
use crate::lora::Module;
use crate::weights::LlamaWeights;

/// Bytes that must stay free beside the weights, for what is computed.
const SPARE: usize = 512 << 20;

/// One layer. Matrices are `[out, in]`, in the order of [`Module::ALL`].
#[derive(Debug)]
pub(crate) struct GpuLayer {
    pub(crate) attn_norm: Buffer<f32>,
    pub(crate) ffn_norm: Buffer<f32>,
    pub(crate) modules: [Buffer<f32>; 7],
    /// Biases of queries, keys and values.
    pub(crate) bias: Option<[Buffer<f32>; 3]>,
    /// Norms of each head's queries and keys.
    pub(crate) head_norms: Option<[Buffer<f32>; 2]>,
    /// Norms after attention and feed-forward layer.
    pub(crate) post_norms: Option<[Buffer<f32>; 2]>,
}

/// The whole model.
#[derive(Debug)]
pub(crate) struct GpuModel {
    pub(crate) gpu: Gpu,
    pub(crate) config: LlamaConfig,
    pub(crate) embed: Buffer<f32>,
    pub(crate) layers: Vec<GpuLayer>,
    pub(crate) norm: Buffer<f32>,
    /// None where it is the embedding matrix.
    head: Option<Buffer<f32>>,
}

impl GpuModel {
    /// Copies the weights to `gpu`.
    ///
    /// # Errors
    /// [`ModelError::NoDevice`] when they do not fit there, with the sizes.
    pub(crate) fn new(gpu: &Gpu, weights: &LlamaWeights) -> Result<Self, ModelError> {
        let c = &weights.config;
        let tied = is_same(&weights.embed, &weights.head)?;
        let needed = size(c, tied) * size_of::<f32>() + SPARE;
        let (free, all) = gpu.memory()?;
        if needed > free {
            let text = too_little(&gpu.name(), needed, free, all);
            return Err(ModelError::NoDevice(text));
        }
        let get = |tensor: &Tensor, len: usize| -> Result<Buffer<f32>, ModelError> {
            let view = kernels::View::new(tensor)?;
            if view.len() != len {
                let text = format!("a tensor has {} values, not {len}", view.len());
                return Err(ModelError::Tensor(candle_core::Error::msg(text)));
            }
            gpu.copy_of(&view)
        };
        let mut layers = Vec::with_capacity(c.layers);
        for w in &weights.layers {
            let matrix = |module: Module, tensor| get(tensor, module.output(c) * module.input(c));
            layers.push(GpuLayer {
                attn_norm: get(&w.attn_norm, c.hidden)?,
                ffn_norm: get(&w.ffn_norm, c.hidden)?,
                modules: [
                    matrix(Module::Q, &w.q)?,
                    matrix(Module::K, &w.k)?,
                    matrix(Module::V, &w.v)?,
                    matrix(Module::O, &w.o)?,
                    matrix(Module::Gate, &w.gate)?,
                    matrix(Module::Up, &w.up)?,
                    matrix(Module::Down, &w.down)?,
                ],
                bias: match &w.bias {
                    Some(bias) => Some([
                        get(&bias.q, c.q_width())?,
                        get(&bias.k, c.kv_width())?,
                        get(&bias.v, c.kv_width())?,
                    ]),
                    None => None,
                },
                head_norms: match &w.head_norms {
                    Some(norms) => Some([get(&norms.q, c.head_dim)?, get(&norms.k, c.head_dim)?]),
                    None => None,
                },
                post_norms: match &w.post_norms {
                    Some(norms) => Some([get(&norms.attn, c.hidden)?, get(&norms.ffn, c.hidden)?]),
                    None => None,
                },
            });
        }
        Ok(Self {
            embed: get(&weights.embed, c.vocab * c.hidden)?,
            layers,
            norm: get(&weights.norm, c.hidden)?,
            head: match tied {
                true => None,
                false => Some(get(&weights.head, c.vocab * c.hidden)?),
            },
            gpu: gpu.clone(),
            config: c.clone(),
        })
    }

    /// The output head, `[vocab, hidden]`.
    pub(crate) fn head(&self) -> View<'_, f32> {
        self.head.as_ref().unwrap_or(&self.embed).all()
    }
}

/// Whether two tensors are the same values in memory.
fn is_same(a: &Tensor, b: &Tensor) -> Result<bool, ModelError> {
    let (a, b) = (kernels::View::new(a)?, kernels::View::new(b)?);
    Ok(std::ptr::eq(&raw const a[..], &raw const b[..]))
}

/// Values of a model, norms and biases of layers aside.
fn size(c: &LlamaConfig, tied: bool) -> usize {
    let layer: usize = Module::ALL.iter().map(|m| m.output(c) * m.input(c)).sum();
    let matrices = if tied { 1 } else { 2 };
    c.layers * layer + matrices * c.vocab * c.hidden
}
