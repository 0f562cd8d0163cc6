//! The frozen weights of a model, and the file formats that they come in.
//!
//! Knows no tokenizer and no forward pass. Invariant: whatever the file held, here is dense
//! contiguous f32 on the CPU, every matrix `[out, in]` row-major, query and key rows in the
//! Hugging Face order (rotate-half), so that PEFT adapters fit.

mod gguf;
mod safetensors;

use candle_core::{DType, Tensor};

pub(crate) use gguf::GgufModel;
pub(crate) use safetensors::SafetensorsModel;

use crate::config::LlamaConfig;

/// The weights of one layer.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// RMS norm before attention, `[hidden]`.
    pub attn_norm: Tensor,
    /// Query projection, `[heads * head_dim, hidden]`.
    pub q: Tensor,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    pub k: Tensor,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    pub v: Tensor,
    /// Output projection, `[hidden, heads * head_dim]`.
    pub o: Tensor,
    /// RMS norm before the feed-forward layer, `[hidden]`.
    pub ffn_norm: Tensor,
    /// Gate projection, `[ffn, hidden]`.
    pub gate: Tensor,
    /// Up projection, `[ffn, hidden]`.
    pub up: Tensor,
    /// Down projection, `[hidden, ffn]`.
    pub down: Tensor,
    /// Biases of `q`, `k` and `v`, where the config says so.
    pub bias: Option<QkvBias>,
    /// Norms of the heads, where the config says so.
    pub head_norms: Option<HeadNorms>,
}

/// What is added to a layer's queries, keys and values.
#[derive(Debug, Clone)]
pub struct QkvBias {
    /// `[heads * head_dim]`.
    pub q: Tensor,
    /// `[kv_heads * head_dim]`.
    pub k: Tensor,
    /// `[kv_heads * head_dim]`.
    pub v: Tensor,
}

/// RMS norms of every head's queries and keys, before they are rotated.
#[derive(Debug, Clone)]
pub struct HeadNorms {
    /// `[head_dim]`.
    pub q: Tensor,
    /// `[head_dim]`.
    pub k: Tensor,
}

/// All weights of a model.
#[derive(Debug, Clone)]
pub struct LlamaWeights {
    /// The sizes that the tensors have.
    pub config: LlamaConfig,
    /// Token embeddings, `[vocab, hidden]`.
    pub embed: Tensor,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// Final RMS norm, `[hidden]`.
    pub norm: Tensor,
    /// Output head, `[vocab, hidden]`; the same storage as `embed` when tied.
    pub head: Tensor,
}

/// One matrix or vector of a layer, in the terms of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    AttnNorm,
    Q,
    K,
    V,
    O,
    FfnNorm,
    Gate,
    Up,
    Down,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
}

impl Slot {
    /// The last part of a tensor's name, in every format.
    fn kind(self) -> &'static str {
        match self {
            Self::QBias | Self::KBias | Self::VBias => "bias",
            _ => "weight",
        }
    }
}

/// Where a file keeps its tensors; one per format.
trait TensorSource {
    /// The dense tensor of a slot, any float type, in the Hugging Face row order.
    fn layer(&mut self, layer: usize, slot: Slot, config: &LlamaConfig) -> Result<Tensor, String>;
    fn embed(&mut self) -> Result<Tensor, String>;
    fn norm(&mut self) -> Result<Tensor, String>;
    /// The output head; asked for only when it is not tied.
    fn head(&mut self) -> Result<Tensor, String>;
}

/// Reads every tensor, checks its shape, and makes it f32.
fn assemble(config: LlamaConfig, source: &mut dyn TensorSource) -> Result<LlamaWeights, String> {
    config.check()?;
    let c = &config;
    let embed = dense(source.embed()?, &[c.vocab, c.hidden], "token embedding")?;
    let norm = dense(source.norm()?, &[c.hidden], "final norm")?;
    let head = match c.tied_head {
        true => embed.clone(),
        false => dense(source.head()?, &[c.vocab, c.hidden], "output head")?,
    };
    let mut layers = Vec::new();
    for index in 0..c.layers {
        let mut get = |slot, shape: &[usize]| {
            let tensor = source.layer(index, slot, c)?;
            dense(tensor, shape, &format!("layer {index} {slot:?}"))
        };
        layers.push(LayerWeights {
            attn_norm: get(Slot::AttnNorm, &[c.hidden])?,
            q: get(Slot::Q, &[c.q_width(), c.hidden])?,
            k: get(Slot::K, &[c.kv_width(), c.hidden])?,
            v: get(Slot::V, &[c.kv_width(), c.hidden])?,
            o: get(Slot::O, &[c.hidden, c.q_width()])?,
            ffn_norm: get(Slot::FfnNorm, &[c.hidden])?,
            gate: get(Slot::Gate, &[c.ffn, c.hidden])?,
            up: get(Slot::Up, &[c.ffn, c.hidden])?,
            down: get(Slot::Down, &[c.hidden, c.ffn])?,
            bias: match c.parts.qkv_bias {
                true => Some(QkvBias {
                    q: get(Slot::QBias, &[c.q_width()])?,
                    k: get(Slot::KBias, &[c.kv_width()])?,
                    v: get(Slot::VBias, &[c.kv_width()])?,
                }),
                false => None,
            },
            head_norms: match c.parts.head_norms {
                true => Some(HeadNorms {
                    q: get(Slot::QNorm, &[c.head_dim])?,
                    k: get(Slot::KNorm, &[c.head_dim])?,
                }),
                false => None,
            },
        });
    }
    Ok(LlamaWeights {
        embed,
        layers,
        norm,
        head,
        config,
    })
}

fn dense(tensor: Tensor, shape: &[usize], what: &str) -> Result<Tensor, String> {
    if tensor.dims() != shape {
        return Err(format!(
            "the {what} has shape {:?}, expected {shape:?}",
            tensor.dims()
        ));
    }
    let tensor = tensor.to_dtype(DType::F32).and_then(|t| t.contiguous());
    tensor.map_err(|e| format!("the {what} cannot be read as f32: {e}"))
}
