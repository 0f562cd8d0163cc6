//! The frozen weights of a model, and the file formats that they come in.
//!
//! Knows no tokenizer and no forward pass. Invariant: whatever the file held, here is dense
//! contiguous f32 on the CPU (or an empty tensor, where who reads keeps a matrix in another form),
//! every matrix `[out, in]` row-major, query and key rows in the
//! Hugging Face order (rotate-half), so that PEFT adapters fit; and factors that an architecture
//! puts on embeddings and scores are in the weights, so that no pass knows of them.

mod gguf;
mod hub_config;
mod safetensors;

use candle_core::{DType, Tensor};

pub(crate) use gguf::GgufModel;
pub(crate) use safetensors::SafetensorsModel;

use crate::architecture::Architecture;
use crate::config::LlamaConfig;
use crate::lora::Module;

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
    /// Norms after the blocks, where the config says so.
    pub post_norms: Option<PostNorms>,
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

/// RMS norms of what a layer's two blocks add to the residual stream.
#[derive(Debug, Clone)]
pub struct PostNorms {
    /// Of the attention, `[hidden]`.
    pub attn: Tensor,
    /// Of the feed-forward layer, `[hidden]`.
    pub ffn: Tensor,
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
    AttnPostNorm,
    FfnPostNorm,
}

impl Slot {
    /// The last part of a tensor's name, in every format.
    fn kind(self) -> &'static str {
        match self {
            Self::QBias | Self::KBias | Self::VBias => "bias",
            _ => "weight",
        }
    }

    fn is_norm(self) -> bool {
        matches!(
            self,
            Self::AttnNorm
                | Self::FfnNorm
                | Self::QNorm
                | Self::KNorm
                | Self::AttnPostNorm
                | Self::FfnPostNorm
        )
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

/// Which layers are local where every one whose number, counted from 1, `pattern` divides is not.
fn local_layers(layers: usize, pattern: usize) -> Result<Vec<bool>, String> {
    // A file may claim more layers than memory could list.
    if layers > MOST_LAYERS || pattern == 0 {
        return Err(format!(
            "{layers} layers of which each {pattern}th sees all are not supported"
        ));
    }
    Ok((1..=layers)
        .map(|layer| !layer.is_multiple_of(pattern))
        .collect())
}

/// More than any model has.
const MOST_LAYERS: usize = 100_000;

/// What a file says of a model.
struct Shape {
    config: LlamaConfig,
    architecture: &'static Architecture,
    /// See [`Architecture::query_scalar`]; where the file names it.
    query_scalar: Option<f64>,
}

/// What becomes of a layer's matrix as soon as it is read; gives what stands in its place.
pub(crate) type Keep<'k> = dyn FnMut(usize, Module, Tensor) -> Result<Tensor, String> + 'k;

/// Keeps every matrix as it is.
pub(crate) fn keep_dense(_: usize, _: Module, matrix: Tensor) -> Result<Tensor, String> {
    Ok(matrix)
}

/// Reads every tensor, checks its shape, and makes it f32.
fn assemble(
    shape: Shape,
    source: &mut dyn TensorSource,
    keep: &mut Keep<'_>,
) -> Result<LlamaWeights, String> {
    let Shape {
        config,
        architecture,
        query_scalar,
    } = shape;
    config.check()?;
    let query_scalar = query_scalar.or(architecture.query_scalar.map(|scalar| scalar(&config)));
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
            q: keep(index, Module::Q, get(Slot::Q, &[c.q_width(), c.hidden])?)?,
            k: keep(index, Module::K, get(Slot::K, &[c.kv_width(), c.hidden])?)?,
            v: keep(index, Module::V, get(Slot::V, &[c.kv_width(), c.hidden])?)?,
            o: keep(index, Module::O, get(Slot::O, &[c.hidden, c.q_width()])?)?,
            ffn_norm: get(Slot::FfnNorm, &[c.hidden])?,
            gate: keep(index, Module::Gate, get(Slot::Gate, &[c.ffn, c.hidden])?)?,
            up: keep(index, Module::Up, get(Slot::Up, &[c.ffn, c.hidden])?)?,
            down: keep(index, Module::Down, get(Slot::Down, &[c.hidden, c.ffn])?)?,
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
            post_norms: match c.parts.post_norms {
                true => Some(PostNorms {
                    attn: get(Slot::AttnPostNorm, &[c.hidden])?,
                    ffn: get(Slot::FfnPostNorm, &[c.hidden])?,
                }),
                false => None,
            },
        });
    }
    let mut weights = LlamaWeights {
        embed,
        layers,
        norm,
        head,
        config,
    };
    let folded = match architecture.scaled_embedding {
        true => scale_embedding(&mut weights),
        false => Ok(()),
    };
    let folded = folded.and_then(|()| match query_scalar {
        Some(scalar) => scale_queries(&mut weights, scalar),
        None => Ok(()),
    });
    folded.map_err(|e| format!("a factor cannot be put into its weights: {e}"))?;
    Ok(weights)
}

/// Multiplies the embeddings by the square root of their width. A head that is the same matrix
/// grows with them, which the final norm takes back.
fn scale_embedding(weights: &mut LlamaWeights) -> candle_core::Result<()> {
    let scale = (weights.config.hidden as f64).sqrt();
    weights.embed = weights.embed.affine(scale, 0.0)?;
    if weights.config.tied_head {
        weights.head = weights.embed.clone();
        weights.norm = weights.norm.affine(1.0 / scale, 0.0)?;
    }
    Ok(())
}

/// Makes the queries such that scores divided by the square root of the head size are scores
/// divided by that of `scalar`. The norm of the queries takes the factor; rotation keeps it.
fn scale_queries(weights: &mut LlamaWeights, scalar: f64) -> candle_core::Result<()> {
    let scale = (weights.config.head_dim as f64 / scalar).sqrt();
    let norms = weights
        .layers
        .iter_mut()
        .filter_map(|l| l.head_norms.as_mut());
    for norms in norms.filter(|_| scale != 1.0) {
        norms.q = norms.q.affine(scale, 0.0)?;
    }
    Ok(())
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tiny;

    /// Logits of `weights` after some tokens, in f64.
    fn logits(weights: &LlamaWeights) -> Vec<f64> {
        let base = tiny::base_of(crate::architecture::ALL[3], 1);
        let base = crate::base_model::BaseModel::new(
            weights.clone(),
            base.tokenizer.clone(),
            crate::chat_template::ChatTemplate::chatml().unwrap(),
            "folded",
        );
        tiny::logits(&base, None, &[3, 14, 15, 92, 65])
    }

    #[test]
    fn a_scaled_embedding_scales_the_stream_and_not_a_head_that_is_the_same() {
        let mut weights = tiny::base_of(crate::architecture::ALL[3], 1)
            .weights
            .clone();
        weights.config.tied_head = true;
        weights.head = weights.embed.clone();
        // What it should be: an embedding of its own.
        let mut wanted = weights.clone();
        wanted.embed = wanted.embed.affine(4.0, 0.0).unwrap();
        assert_eq!(weights.config.hidden, 16);
        scale_embedding(&mut weights).unwrap();
        let off = logits(&weights).into_iter().zip(logits(&wanted));
        assert!(off.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) < 1e-5);
    }

    #[test]
    fn scaled_queries_scale_the_scores() {
        let weights = tiny::base_of(crate::architecture::ALL[3], 1)
            .weights
            .clone();
        let scaled = |scalar| {
            let mut weights = weights.clone();
            scale_queries(&mut weights, scalar).unwrap();
            weights.layers[0]
                .head_norms
                .as_ref()
                .unwrap()
                .q
                .to_vec1::<f32>()
                .unwrap()
        };
        // Heads are 6 wide; scores divided by √24 are half of those divided by √6.
        for (whole, half) in scaled(6.0).into_iter().zip(scaled(24.0)) {
            assert_eq!(half, whole / 2.0);
        }
    }

    #[test]
    fn local_layers_follow_the_pattern() {
        assert_eq!(
            local_layers(7, 3).unwrap(),
            [true, true, false, true, true, false, true]
        );
        assert!(local_layers(usize::MAX, 6).is_err() && local_layers(2, 0).is_err());
    }
}
