//! Weights, tokenizer and chat template from one GGUF file.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};

use super::{Keep, LlamaWeights, Shape, Slot, TensorSource, assemble, local_layers};
use crate::architecture::{Architecture, LocalLayers};
use crate::chat_template::ChatTemplate;
use crate::config::{LlamaConfig, LocalAttention, RopeScaling};
use crate::error::ModelError;
use crate::gguf_header;
use crate::lora::LayerNames;
use crate::tokenizer::{self, Tokenizer};

/// What a GGUF file holds.
pub(crate) struct GgufModel {
    pub(crate) weights: LlamaWeights,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat: ChatTemplate,
    /// What the files of its adapters call its layers.
    pub(crate) layer_names: LayerNames,
}

impl GgufModel {
    /// Reads the file at `path`; every tensor is dequantised to f32, and the layers' matrices go
    /// through `keep`.
    pub(crate) fn load(path: &Path, keep: &mut Keep<'_>) -> Result<Self, ModelError> {
        let (content, mut reader) = gguf_header::open(path)?;
        let bad = |reason: String| ModelError::format(path, reason);
        let metadata = &content.metadata;
        let architecture = tokenizer::string(metadata, "general.architecture");
        let architecture = architecture.and_then(Architecture::of_gguf).map_err(bad)?;
        let mut config = config(&content, architecture).map_err(bad)?;
        let layer_names = architecture.layer_names(config.layers);
        check_biases(&content, architecture).map_err(bad)?;
        let tokenizer = tokenizer::from_gguf(metadata).map_err(bad)?;
        let chat = chat(metadata)?;
        let mut source = Source {
            content: &content,
            reader: &mut reader,
            architecture,
        };
        config.rope_scaling = source.rope_scaling().map_err(bad)?;
        let shape = Shape {
            config,
            architecture,
            query_scalar: None,
        };
        let weights = assemble(shape, &mut source, keep).map_err(bad)?;
        tokenizer.check_fits(weights.config.vocab).map_err(bad)?;
        Ok(Self {
            weights,
            tokenizer,
            chat,
            layer_names,
        })
    }
}

fn config(content: &Content, architecture: &Architecture) -> Result<LlamaConfig, String> {
    let metadata = &content.metadata;
    let named = |name: &str| entry(architecture, name);
    let optional = |name: &str| match metadata.get(&named(name)) {
        None => Ok(None),
        Some(value) => tokenizer::integer(value)
            .and_then(|v| usize::try_from(v).ok())
            .map(Some)
            .ok_or_else(|| format!("the entry `{}` is not a size", named(name))),
    };
    let missing = |name: &str| format!("the entry `{}` is missing", named(name));
    let size = |name: &str| optional(name)?.ok_or_else(|| missing(name));
    let number = |name: &str| float(metadata, &named(name));
    let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_dim = match optional("attention.key_length")? {
        Some(dim) => dim,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    if optional("rope.dimension_count")?.is_some_and(|dim| dim != head_dim) {
        return Err("partial rotary embeddings are not supported".to_owned());
    }
    let embed = content.tensor_infos.get("token_embd.weight");
    let vocab = embed.and_then(|info| info.shape.dims().first().copied());
    let layers = size("block_count")?;
    let local = |local: &LocalLayers| {
        const PATTERN: &str = "attention.sliding_window_pattern";
        let layers = match metadata.get(&named(PATTERN)) {
            Some(Value::Array(each)) => truths(each)
                .ok_or_else(|| format!("the entry `{}` is not a list of truths", named(PATTERN)))?,
            _ => local_layers(layers, optional(PATTERN)?.unwrap_or(local.pattern))?,
        };
        Ok::<_, String>(LocalAttention {
            window: size("attention.sliding_window")?,
            rope_theta: number("rope.freq_base_swa")?.unwrap_or(local.rope_theta),
            layers,
        })
    };
    Ok(LlamaConfig {
        hidden,
        layers,
        heads,
        kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn: size("feed_forward_length")?,
        vocab: vocab.ok_or("the tensor `token_embd.weight` is missing")?,
        context: size("context_length")?,
        rope_theta: number("rope.freq_base")?.unwrap_or(architecture.rope_theta),
        rope_scaling: None,
        norm_eps: number(NORM_EPS)?.ok_or_else(|| missing(NORM_EPS))?,
        tied_head: !content.tensor_infos.contains_key("output.weight"),
        parts: architecture.parts,
        local: architecture.local.as_ref().map(local).transpose()?,
    })
}

fn truths(values: &[Value]) -> Option<Vec<bool>> {
    let truth = |value: &Value| match value {
        Value::Bool(truth) => Some(*truth),
        _ => None,
    };
    values.iter().map(truth).collect()
}

const NORM_EPS: &str = "attention.layer_norm_rms_epsilon";

/// The full name of an entry that every architecture has.
fn entry(architecture: &Architecture, name: &str) -> String {
    format!("{}.{name}", architecture.gguf)
}

/// Refuses biases that the architecture has not: without them every result would be another.
fn check_biases(content: &Content, architecture: &Architecture) -> Result<(), String> {
    let qkv = [".attn_q.bias", ".attn_k.bias", ".attn_v.bias"];
    let known = |name: &str| architecture.parts.qkv_bias && qkv.iter().any(|b| name.ends_with(*b));
    let biases = content.tensor_infos.keys();
    let unknown = biases.filter(|name| name.ends_with(".bias") && !known(name));
    match unknown.min() {
        None => Ok(()),
        Some(name) => Err(format!(
            "the tensor `{name}` is not one that the architecture `{}` has",
            architecture.gguf
        )),
    }
}

/// An f32 entry as the decimal that it was written as, so that 1e-5 is 1e-5 in f64 too.
fn float(metadata: &HashMap<String, Value>, key: &str) -> Result<Option<f64>, String> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::F32(v)) => v.to_string().parse().map(Some).map_err(|e| format!("{e}")),
        Some(Value::F64(v)) => Ok(Some(*v)),
        Some(_) => Err(format!("the entry `{key}` is not a number")),
    }
}

fn chat(metadata: &HashMap<String, Value>) -> Result<ChatTemplate, ModelError> {
    let Some(Value::String(source)) = metadata.get("tokenizer.chat_template") else {
        return ChatTemplate::chatml();
    };
    let token = |key: &str| {
        let id = metadata.get(key).and_then(tokenizer::integer)?;
        let Some(Value::Array(tokens)) = metadata.get("tokenizer.ggml.tokens") else {
            return None;
        };
        match tokens.get(usize::try_from(id).ok()?) {
            Some(Value::String(text)) => Some(text.as_str()),
            _ => None,
        }
    };
    let bos = token("tokenizer.ggml.bos_token_id").unwrap_or_default();
    let eos = token("tokenizer.ggml.eos_token_id").unwrap_or_default();
    ChatTemplate::new(source, bos, eos)
}

struct Source<'a> {
    content: &'a Content,
    reader: &'a mut BufReader<File>,
    architecture: &'static Architecture,
}

impl Source<'_> {
    fn tensor(&mut self, name: &str) -> Result<Tensor, String> {
        // Candle multiplies the sizes up without a look.
        if let Some(info) = self.content.tensor_infos.get(name) {
            let mut sizes = info.shape.dims().iter();
            let bytes = sizes.try_fold(8usize, |all, size| all.checked_mul(*size));
            bytes.ok_or_else(|| format!("the tensor `{name}` is larger than any memory"))?;
        }
        let read = self.content.tensor(self.reader, name, &Device::Cpu);
        let dense = read.and_then(|quantised| quantised.dequantize(&Device::Cpu));
        dense.map_err(|e| format!("the tensor `{name}` cannot be read: {e}"))
    }

    /// The divisors of Llama 3.1 and later, or the one divisor of linear scaling.
    fn rope_scaling(&mut self) -> Result<Option<RopeScaling>, String> {
        const FREQUENCIES: &str = "rope_freqs.weight";
        if self.content.tensor_infos.contains_key(FREQUENCIES) {
            let values = self.tensor(FREQUENCIES)?.flatten_all();
            let values = values.and_then(|values| values.to_vec1::<f32>());
            let values = values.map_err(|e| format!("the tensor `{FREQUENCIES}`: {e}"))?;
            let divisors = values.into_iter().map(f64::from).collect();
            return Ok(Some(RopeScaling::Divisors(divisors)));
        }
        let metadata = &self.content.metadata;
        let named = |name: &str| entry(self.architecture, name);
        let Some(Value::String(kind)) = metadata.get(&named("rope.scaling.type")) else {
            return Ok(None);
        };
        let factor = float(metadata, &named("rope.scaling.factor"))?;
        match (kind.as_str(), factor) {
            ("none", _) => Ok(None),
            ("linear", Some(factor)) => Ok(Some(RopeScaling::Linear(factor))),
            ("linear", None) => Err("the linear rope scaling lacks its factor".to_owned()),
            (other, _) => Err(format!("the rope scaling `{other}` is not supported")),
        }
    }
}

impl TensorSource for Source<'_> {
    fn layer(&mut self, layer: usize, slot: Slot, config: &LlamaConfig) -> Result<Tensor, String> {
        let name = match slot {
            Slot::AttnNorm => "attn_norm",
            Slot::Q => "attn_q",
            Slot::K => "attn_k",
            Slot::V => "attn_v",
            Slot::O => "attn_output",
            Slot::FfnNorm => "ffn_norm",
            Slot::Gate => "ffn_gate",
            Slot::Up => "ffn_up",
            Slot::Down => "ffn_down",
            Slot::QBias => "attn_q",
            Slot::KBias => "attn_k",
            Slot::VBias => "attn_v",
            Slot::QNorm => "attn_q_norm",
            Slot::KNorm => "attn_k_norm",
            Slot::AttnPostNorm => "post_attention_norm",
            Slot::FfnPostNorm => "post_ffw_norm",
        };
        let tensor = self.tensor(&format!("blk.{layer}.{name}.{}", slot.kind()))?;
        match slot {
            Slot::Q if self.architecture.interleaved => rotate_half_rows(&tensor, config.heads),
            Slot::K if self.architecture.interleaved => rotate_half_rows(&tensor, config.kv_heads),
            _ => Ok(tensor),
        }
    }

    fn embed(&mut self) -> Result<Tensor, String> {
        self.tensor("token_embd.weight")
    }

    fn norm(&mut self) -> Result<Tensor, String> {
        self.tensor("output_norm.weight")
    }

    fn head(&mut self) -> Result<Tensor, String> {
        self.tensor("output.weight")
    }
}

/// Undoes the row order of llama.cpp's converter, which interleaves the two halves of each head
/// for its own rotary kernel.
fn rotate_half_rows(tensor: &Tensor, heads: usize) -> Result<Tensor, String> {
    let restore = || {
        let (rows, width) = tensor.dims2()?;
        let pairs = tensor.reshape((heads, rows / heads / 2, 2, width))?;
        pairs.transpose(1, 2)?.contiguous()?.reshape((rows, width))
    };
    restore().map_err(|e: candle_core::Error| e.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::weights::keep_dense;

    #[test]
    fn interleaved_rows_come_back_in_halves() {
        let rows: Vec<f32> = vec![0., 2., 1., 3., 4., 6., 5., 7.];
        let tensor = Tensor::from_vec(rows, (8, 1), &Device::Cpu).unwrap();
        let restored = rotate_half_rows(&tensor, 2).unwrap();
        let flat: Vec<f32> = restored.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(flat, [0., 1., 2., 3., 4., 5., 6., 7.]);
    }

    #[test]
    fn a_file_that_is_no_gguf_is_refused() {
        let path = std::env::temp_dir().join(format!("not-a-gguf-{}", std::process::id()));
        std::fs::write(&path, b"hello").unwrap();
        let load = || GgufModel::load(&path, &mut keep_dense).err().unwrap();
        let error = load();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(error, ModelError::Format { .. }), "{error}");
        assert!(matches!(load(), ModelError::Io { .. }));
    }
}
