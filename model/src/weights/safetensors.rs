//! Weights, tokenizer and chat template from a Hugging Face folder: `config.json`,
//! `*.safetensors`, `tokenizer.json`, `tokenizer_config.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Deserialize;

use super::{LlamaWeights, Slot, TensorSource, assemble};
use crate::architecture::Architecture;
use crate::chat_template::ChatTemplate;
use crate::config::{Llama3RopeScaling, LlamaConfig, RopeScaling};
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;

/// What the folder holds.
pub(crate) struct SafetensorsModel {
    pub(crate) weights: LlamaWeights,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat: ChatTemplate,
}

impl SafetensorsModel {
    /// Reads the folder at `path`.
    pub(crate) fn load(path: &Path) -> Result<Self, ModelError> {
        let file = path.join("config.json");
        let config: HubConfig = json(&file)?;
        let tensors = tensors(path)?;
        let tied = config.tie_word_embeddings && !tensors.contains_key("lm_head.weight");
        let config = config
            .shape(tied)
            .map_err(|reason| ModelError::format(&file, reason))?;
        let weights = assemble(config, &mut Source { tensors })
            .map_err(|reason| ModelError::format(path, reason))?;
        let settings: TokenizerConfig = optional_json(&path.join("tokenizer_config.json"))?;
        let eos = settings.eos_token.as_ref().map_or("", SpecialToken::text);
        let bos = settings.bos_token.as_ref().map_or("", SpecialToken::text);
        let words = path.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&words, &[eos])?;
        let fits = tokenizer.check_fits(weights.config.vocab);
        fits.map_err(|reason| ModelError::format(&words, reason))?;
        let template = match chat_template(&path.join("chat_template.jinja"))? {
            Some(source) => Some(source),
            None => settings.chat_template.and_then(Templates::default),
        };
        let chat = match template {
            Some(source) => ChatTemplate::new(&source, bos, eos)?,
            None => ChatTemplate::chatml()?,
        };
        Ok(Self {
            weights,
            tokenizer,
            chat,
        })
    }
}

/// The part of `config.json` that the forward pass depends on.
#[derive(Debug, Deserialize)]
struct HubConfig {
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    /// The name of `rope_scaling` since transformers 5; both may be there.
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default)]
    use_sliding_window: bool,
    /// The kind of each layer's attention, since transformers 4.53.
    layer_types: Option<Vec<String>>,
}

fn silu() -> String {
    "silu".to_owned()
}

#[derive(Debug, Deserialize)]
struct RopeParameters {
    rope_type: Option<String>,
    /// The old name of `rope_type`; transformers writes both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

impl HubConfig {
    fn shape(self, tied_head: bool) -> Result<LlamaConfig, String> {
        let architecture = Architecture::of_model_type(&self.model_type)?;
        let windowed = |kinds: &Vec<String>| kinds.iter().any(|kind| kind != "full_attention");
        if self.use_sliding_window || self.layer_types.as_ref().is_some_and(windowed) {
            return Err("attention with a sliding window is not supported".to_owned());
        }
        if self.attention_bias || self.mlp_bias || self.hidden_act != "silu" {
            return Err("biases and activations other than `silu` are not supported".to_owned());
        }
        let (nested_theta, rope_scaling) = match self.rope_parameters.or(self.rope_scaling) {
            Some(rope) => (rope.rope_theta, rope.scaling()?),
            None => (None, None),
        };
        Ok(LlamaConfig {
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self
                .head_dim
                .or(architecture.head_dim)
                .or(self.hidden_size.checked_div(self.num_attention_heads))
                .unwrap_or(0),
            ffn: self.intermediate_size,
            vocab: self.vocab_size,
            context: self.max_position_embeddings,
            rope_theta: self.rope_theta.or(nested_theta).unwrap_or(10_000.0),
            rope_scaling,
            norm_eps: self.rms_norm_eps,
            tied_head,
            parts: architecture.parts,
        })
    }
}

impl RopeParameters {
    fn scaling(&self) -> Result<Option<RopeScaling>, String> {
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None | Some("default") => return Ok(None),
            Some("linear") => {
                let factor = self
                    .factor
                    .ok_or("the linear rope scaling lacks `factor`")?;
                return Ok(Some(RopeScaling::Linear(factor)));
            }
            Some("llama3") => {}
            Some(other) => return Err(format!("the rope type `{other}` is not supported")),
        }
        let missing = |name: &str| format!("the llama3 rope scaling lacks `{name}`");
        let scaling = Llama3RopeScaling {
            factor: self.factor.ok_or_else(|| missing("factor"))?,
            low_freq_factor: self
                .low_freq_factor
                .ok_or_else(|| missing("low_freq_factor"))?,
            high_freq_factor: self
                .high_freq_factor
                .ok_or_else(|| missing("high_freq_factor"))?,
            original_context: self
                .original_max_position_embeddings
                .ok_or_else(|| missing("original_max_position_embeddings"))?,
        };
        Ok(Some(RopeScaling::Llama3(scaling)))
    }
}

#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    chat_template: Option<Templates>,
}

/// Hugging Face writes a special token as its text or as an object.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    fn text(&self) -> &str {
        match self {
            Self::Text(content) | Self::Object { content } => content,
        }
    }
}

/// One template, or several by name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(list) => list
                .into_iter()
                .find(|t| t.name == "default")
                .map(|t| t.template),
        }
    }
}

/// A template in a file of its own. One that is there but cannot be read is an error: another
/// template in its place would make other prompts without a word.
fn chat_template(path: &Path) -> Result<Option<String>, ModelError> {
    match std::fs::read_to_string(path) {
        Ok(source) => Ok(Some(source)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ModelError::io(path)(e)),
    }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
    serde_json::from_str(&text).map_err(|e| ModelError::format(path, e))
}

fn optional_json<T: serde::de::DeserializeOwned + Default>(path: &Path) -> Result<T, ModelError> {
    match path.exists() {
        true => json(path),
        false => Ok(T::default()),
    }
}

/// Every tensor of every `*.safetensors` file in the folder.
fn tensors(folder: &Path) -> Result<HashMap<String, Tensor>, ModelError> {
    let listed = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
    let paths: Result<Vec<PathBuf>, _> = listed.map(|entry| entry.map(|e| e.path())).collect();
    let mut paths = paths.map_err(ModelError::io(folder))?;
    paths.retain(|path| {
        path.extension()
            .is_some_and(|ending| ending == "safetensors")
    });
    paths.sort();
    if paths.is_empty() {
        return Err(ModelError::format(folder, "it has no `*.safetensors` file"));
    }
    let mut tensors = HashMap::new();
    for path in paths {
        let loaded = candle_core::safetensors::load(&path, &Device::Cpu);
        tensors.extend(loaded.map_err(|e| ModelError::format(&path, e))?);
    }
    Ok(tensors)
}

struct Source {
    tensors: HashMap<String, Tensor>,
}

impl Source {
    /// Takes the tensor out, so that its original bytes are freed once it is converted.
    fn take(&mut self, name: &str) -> Result<Tensor, String> {
        self.tensors
            .remove(name)
            .ok_or_else(|| format!("the tensor `{name}` is missing"))
    }
}

impl TensorSource for Source {
    fn layer(&mut self, layer: usize, slot: Slot, _: &LlamaConfig) -> Result<Tensor, String> {
        let name = match slot {
            Slot::AttnNorm => "input_layernorm",
            Slot::Q => "self_attn.q_proj",
            Slot::K => "self_attn.k_proj",
            Slot::V => "self_attn.v_proj",
            Slot::O => "self_attn.o_proj",
            Slot::FfnNorm => "post_attention_layernorm",
            Slot::Gate => "mlp.gate_proj",
            Slot::Up => "mlp.up_proj",
            Slot::Down => "mlp.down_proj",
            Slot::QBias => "self_attn.q_proj",
            Slot::KBias => "self_attn.k_proj",
            Slot::VBias => "self_attn.v_proj",
            Slot::QNorm => "self_attn.q_norm",
            Slot::KNorm => "self_attn.k_norm",
        };
        self.take(&format!("model.layers.{layer}.{name}.{}", slot.kind()))
    }

    fn embed(&mut self) -> Result<Tensor, String> {
        self.take("model.embed_tokens.weight")
    }

    fn norm(&mut self) -> Result<Tensor, String> {
        self.take("model.norm.weight")
    }

    fn head(&mut self) -> Result<Tensor, String> {
        self.take("lm_head.weight")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rope(text: &str) -> Result<Option<RopeScaling>, String> {
        let mut config = serde_json::json!({
            "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8,
            "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
        });
        let more: serde_json::Value = serde_json::from_str(text).unwrap();
        config
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let config: HubConfig = serde_json::from_value(config).map_err(|e| e.to_string())?;
        Ok(config.shape(true)?.rope_scaling)
    }

    #[test]
    fn the_rope_is_read_in_all_spellings_of_transformers() {
        let linear = Ok(Some(RopeScaling::Linear(2.0)));
        for text in [
            r#"{"rope_scaling": {"type": "linear", "factor": 2.0}}"#,
            r#"{"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}"#,
            r#"{"rope_parameters": {"rope_type": "linear", "factor": 2.0}}"#,
            r#"{"rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0}}"#,
        ] {
            assert_eq!(rope(text), linear, "{text}");
        }
        assert_eq!(rope(r#"{"rope_scaling": null}"#), Ok(None));
        assert_eq!(
            rope(r#"{"rope_parameters": {"rope_type": "default"}}"#),
            Ok(None)
        );
        assert!(rope(r#"{"rope_scaling": {"type": "linear"}}"#).is_err());
        assert!(rope(r#"{"rope_scaling": {"type": "yarn", "factor": 2.0}}"#).is_err());
    }

    #[test]
    fn a_template_that_cannot_be_read_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chat_template.jinja");
        assert_eq!(chat_template(&path).unwrap(), None);
        std::fs::write(&path, b"{{ \xff }}").unwrap();
        let error = chat_template(&path).unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja"), "{error}");
        std::fs::write(&path, "{{ messages }}").unwrap();
        assert_eq!(chat_template(&path).unwrap().unwrap(), "{{ messages }}");
    }
}
