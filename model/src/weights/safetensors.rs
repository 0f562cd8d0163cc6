//! Weights, tokenizer and chat template from a Hugging Face folder: `config.json`,
//! `*.safetensors`, `tokenizer.json`, `tokenizer_config.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{Keep, LlamaWeights, Shape, Slot, TensorSource, assemble, local_layers};
use crate::architecture::{Architecture, LocalLayers};
use crate::chat_template::ChatTemplate;
use crate::config::{Activation, Llama3RopeScaling, LlamaConfig, LocalAttention, RopeScaling};
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;

/// What the folder holds.
pub(crate) struct SafetensorsModel {
    pub(crate) weights: LlamaWeights,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat: ChatTemplate,
}

impl SafetensorsModel {
    /// Reads the folder at `path`; the layers' matrices go through `keep`.
    pub(crate) fn load(path: &Path, keep: &mut Keep<'_>) -> Result<Self, ModelError> {
        let file = path.join("config.json");
        let config: HubConfig = json(&file)?;
        let tensors = tensors(path)?;
        check_scales(tensors.keys()).map_err(|reason| ModelError::format(path, reason))?;
        let shape = config
            .shape(tensors.contains_key("lm_head.weight"))
            .map_err(|reason| ModelError::format(&file, reason))?;
        let architecture = shape.architecture;
        let mut source = Source {
            tensors,
            architecture,
        };
        let weights = assemble(shape, &mut source, keep)
            .map_err(|reason| ModelError::format(path, reason))?;
        let settings: TokenizerConfig = optional_json(&path.join("tokenizer_config.json"))?;
        let eos = settings.eos_token.as_ref().map_or("", SpecialToken::text);
        let bos = settings.bos_token.as_ref().map_or("", SpecialToken::text);
        let words = path.join("tokenizer.json");
        let tokenizer = settings.begin(Tokenizer::from_file(&words, &[eos])?);
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
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    /// Gemma's name of `hidden_act`.
    hidden_activation: Option<String>,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    /// Before there was `layer_types`; files may have both spellings.
    sliding_window_pattern: Option<usize>,
    #[serde(rename = "_sliding_window_pattern")]
    private_pattern: Option<usize>,
    /// The kind of each layer's attention, since transformers 4.53.
    layer_types: Option<Vec<String>>,
    /// Base of the rotary frequencies of layers with a window.
    rope_local_base_freq: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<bool>,
    /// How the weights are stored, where that is not as plain numbers.
    quantization_config: Option<serde_json::Value>,
    /// The older name of it.
    compression_config: Option<serde_json::Value>,
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
    /// Those of each kind of layer, where there are two.
    full_attention: Option<Box<RopeParameters>>,
    sliding_attention: Option<Box<RopeParameters>>,
}

impl HubConfig {
    fn shape(mut self, has_head: bool) -> Result<Shape, String> {
        let architecture = Architecture::of_model_type(&self.model_type)?;
        self.check(architecture)?;
        let rope = self.rope_parameters.take().or(self.rope_scaling.take());
        let (full, sliding) = match rope {
            None => (None, None),
            Some(mut rope) => {
                let (full, sliding) = (rope.full_attention.take(), rope.sliding_attention.take());
                (Some(full.map_or(rope, |full| *full)), sliding)
            }
        };
        let local = match &architecture.local {
            Some(layers) => Some(self.local(layers, sliding.and_then(|rope| rope.rope_theta))?),
            None => None,
        };
        let nested_theta = full.as_ref().and_then(|rope| rope.rope_theta);
        let scaling = full.as_ref().map(RopeParameters::scaling).transpose()?;
        let tied = self.tie_word_embeddings.unwrap_or(architecture.tied_head);
        let config = LlamaConfig {
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
            rope_theta: self
                .rope_theta
                .or(nested_theta)
                .unwrap_or(architecture.rope_theta),
            rope_scaling: scaling.flatten(),
            norm_eps: self.rms_norm_eps,
            tied_head: tied && !has_head,
            parts: architecture.parts,
            local,
        };
        Ok(Shape {
            config,
            architecture,
            query_scalar: architecture.query_scalar.and(self.query_pre_attn_scalar),
        })
    }

    /// Refuses what would make every result another.
    fn check(&self, architecture: &Architecture) -> Result<(), String> {
        let quantised = self.quantization_config.as_ref();
        if let Some(how) = quantised.or(self.compression_config.as_ref()) {
            let method = how["quant_method"].as_str().unwrap_or("unnamed");
            return Err(format!(
                "its weights are quantised (`quantization_config`, method `{method}`), which is not \
                 supported in a folder; {UNQUANTISED}"
            ));
        }
        let wanted = match architecture.parts.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        let named = self.hidden_act.as_ref().or(self.hidden_activation.as_ref());
        if self.attention_bias || self.mlp_bias || named.is_some_and(|name| name != wanted) {
            return Err(format!(
                "`attention_bias`, `mlp_bias` and activations other than `{wanted}` are not supported"
            ));
        }
        let windowed = |kinds: &Vec<String>| kinds.iter().any(|kind| kind != FULL);
        let windows = self.use_sliding_window || self.layer_types.as_ref().is_some_and(windowed);
        if windows && architecture.local.is_none() {
            return Err("attention with a sliding window is not supported".to_owned());
        }
        let capped = self.attn_logit_softcapping.or(self.final_logit_softcapping);
        if capped.is_some() || self.use_bidirectional_attention == Some(true) {
            return Err(
                "soft-capped logits and attention in both directions are not supported".to_owned(),
            );
        }
        if self
            .query_pre_attn_scalar
            .is_some_and(|scalar| scalar.is_nan() || scalar <= 0.0)
        {
            return Err("`query_pre_attn_scalar` is not a positive number".to_owned());
        }
        Ok(())
    }

    /// The layers with a window. `theta` is the base of their rotary frequencies, where it is
    /// among those of both kinds.
    fn local(&self, layers: &LocalLayers, theta: Option<f64>) -> Result<LocalAttention, String> {
        let kind = |kind: &String| match kind.as_str() {
            FULL => Ok(false),
            "sliding_attention" => Ok(true),
            other => Err(format!("the layer type `{other}` is not supported")),
        };
        let pattern = self
            .sliding_window_pattern
            .or(self.private_pattern)
            .unwrap_or(layers.pattern);
        Ok(LocalAttention {
            window: self.sliding_window.ok_or("`sliding_window` is missing")?,
            rope_theta: self
                .rope_local_base_freq
                .or(theta)
                .unwrap_or(layers.rope_theta),
            layers: match &self.layer_types {
                Some(kinds) => kinds.iter().map(kind).collect::<Result<_, _>>()?,
                None => local_layers(self.num_hidden_layers, pattern)?,
            },
        })
    }
}

/// What to do about weights that are quantised.
const UNQUANTISED: &str = "take the model's folder in F32, F16 or BF16, or a GGUF file of it";

/// Refuses scales beside the weights, without which these would be other numbers.
fn check_scales<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), String> {
    let is_scale = |name: &&String| {
        let last = name.rsplit('.').next();
        last.is_some_and(|last| last.contains("_scale"))
    };
    match names.filter(is_scale).min() {
        None => Ok(()),
        Some(name) => Err(format!(
            "the tensor `{name}` says that the weights are quantised, which is not supported in a \
             folder; {UNQUANTISED}"
        )),
    }
}

/// A layer that sees all tokens.
const FULL: &str = "full_attention";

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
    add_bos_token: Option<bool>,
    chat_template: Option<Templates>,
}

impl TokenizerConfig {
    /// Has texts begin as the config says; where it says nothing, `tokenizer.json` does.
    fn begin(&self, tokenizer: Tokenizer) -> Tokenizer {
        let bos = self.bos_token.as_ref().map(SpecialToken::text);
        let bos = bos.and_then(|bos| tokenizer.token_id(bos));
        match (self.add_bos_token, bos) {
            (Some(true), Some(bos)) => tokenizer.with_begin(Some(bos)),
            (Some(false), _) => tokenizer.with_begin(None),
            _ => tokenizer,
        }
    }
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
    architecture: &'static Architecture,
}

impl Source {
    /// Takes the tensor out, so that its original bytes are freed once it is converted.
    fn take(&mut self, name: &str) -> Result<Tensor, String> {
        let tensor = self.tensors.remove(name);
        let tensor = tensor.ok_or_else(|| format!("the tensor `{name}` is missing"))?;
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => Ok(tensor),
            other => Err(format!(
                "the tensor `{name}` holds values of the type {}; {UNQUANTISED}",
                other.as_str()
            )),
        }
    }

    fn take_norm(&mut self, name: &str) -> Result<Tensor, String> {
        let tensor = self.take(name)?;
        if !self.architecture.norms_less_one {
            return Ok(tensor);
        }
        // Not in the file's type, which may be too coarse for what is near one.
        let whole = tensor.to_dtype(DType::F32).and_then(|t| t.affine(1.0, 1.0));
        whole.map_err(|e| format!("the tensor `{name}` cannot be read as f32: {e}"))
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
            Slot::FfnNorm => self.architecture.ffn_norm,
            Slot::Gate => "mlp.gate_proj",
            Slot::Up => "mlp.up_proj",
            Slot::Down => "mlp.down_proj",
            Slot::QBias => "self_attn.q_proj",
            Slot::KBias => "self_attn.k_proj",
            Slot::VBias => "self_attn.v_proj",
            Slot::QNorm => "self_attn.q_norm",
            Slot::KNorm => "self_attn.k_norm",
            Slot::AttnPostNorm => "post_attention_layernorm",
            Slot::FfnPostNorm => "post_feedforward_layernorm",
        };
        let name = format!("model.layers.{layer}.{name}.{}", slot.kind());
        match slot.is_norm() {
            true => self.take_norm(&name),
            false => self.take(&name),
        }
    }

    fn embed(&mut self) -> Result<Tensor, String> {
        self.take("model.embed_tokens.weight")
    }

    fn norm(&mut self) -> Result<Tensor, String> {
        self.take_norm("model.norm.weight")
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
        Ok(shape(text)?.config.rope_scaling)
    }

    /// What a small `config.json` with these entries says.
    fn shape(text: &str) -> Result<Shape, String> {
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
        config.shape(false)
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
    fn local_layers_are_read_in_all_spellings_of_transformers() {
        for text in [
            r#"{"sliding_window_pattern": 3, "rope_local_base_freq": 100.0, "rope_theta": 5000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}"#,
            r#"{"_sliding_window_pattern": 3, "sliding_window_pattern": 3, "rope_theta": 5000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}"#,
            r#"{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}}}"#,
        ] {
            let gemma = r#"{"model_type": "gemma3_text", "sliding_window": 7,
                "query_pre_attn_scalar": 9, "hidden_activation": "gelu_pytorch_tanh",
                "num_hidden_layers": 3, "#;
            let Shape {
                config,
                query_scalar,
                ..
            } = shape(&text.replacen('{', gemma, 1)).unwrap();
            let local = LocalAttention {
                window: 7,
                rope_theta: 100.0,
                layers: vec![true, true, false],
            };
            assert_eq!(config.local, Some(local), "{text}");
            assert_eq!(config.rope_theta, 5000.0);
            assert_eq!(config.rope_scaling, Some(RopeScaling::Linear(8.0)));
            assert_eq!((query_scalar, config.head_dim), (Some(9.0), 256));
            assert!(config.tied_head && config.parts.post_norms);
        }
    }

    #[test]
    fn what_would_be_computed_otherwise_is_refused() {
        for (text, why) in [
            (r#"{"use_sliding_window": true}"#, "sliding window"),
            (
                r#"{"layer_types": ["sliding_attention"]}"#,
                "sliding window",
            ),
            (r#"{"hidden_act": "relu"}"#, "activations other than `silu`"),
            (r#"{"attention_bias": true}"#, "attention_bias"),
            (r#"{"final_logit_softcapping": 30.0}"#, "soft-capped"),
            (r#"{"query_pre_attn_scalar": 0}"#, "not a positive number"),
            (
                r#"{"quantization_config": {"quant_method": "fp8"}}"#,
                "method `fp8`",
            ),
            (r#"{"compression_config": {}}"#, "are quantised"),
        ] {
            let qwen = r#"{"model_type": "qwen2", "#;
            let error = shape(&text.replacen('{', qwen, 1)).err().unwrap();
            assert!(error.contains(why), "{error}");
        }
        let lacking = shape(r#"{"model_type": "gemma3_text"}"#).err().unwrap();
        assert_eq!(lacking, "`sliding_window` is missing");
        let qwen = shape(r#"{"model_type": "qwen3", "hidden_act": "silu"}"#).unwrap();
        assert!(qwen.config.parts.head_norms && qwen.query_scalar.is_none());
    }

    #[test]
    fn a_text_begins_as_the_tokenizers_config_says() {
        let words = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/tiny/rope/tokenizer.json");
        let tokenizer = Tokenizer::from_file(&words, &[]).unwrap();
        let bos = tokenizer.token_id("<|im_start|>").unwrap();
        let begins = |config: &str| {
            let config: TokenizerConfig = serde_json::from_str(config).unwrap();
            let tokenizer = config.begin(tokenizer.clone());
            tokenizer.text_tokens("card").unwrap().first() == Some(&bos)
        };
        assert!(begins(
            r#"{"bos_token": "<|im_start|>", "add_bos_token": true}"#
        ));
        for config in [
            r#"{"bos_token": "<|im_start|>"}"#,
            r#"{"bos_token": "<|im_start|>", "add_bos_token": false}"#,
            r#"{"add_bos_token": true}"#,
        ] {
            assert!(!begins(config), "{config}");
        }
    }

    #[test]
    fn weights_that_need_scales_are_refused() {
        let values = Tensor::new(&[0.5f32, -0.25], &Device::Cpu).unwrap();
        let take = |dtype| {
            let tensor = values.to_dtype(dtype).unwrap();
            let mut source = Source {
                tensors: HashMap::from([("lm_head.weight".to_owned(), tensor)]),
                architecture: Architecture::of_model_type("llama").unwrap(),
            };
            source.head()
        };
        for plain in [DType::F32, DType::F16, DType::BF16] {
            assert!(take(plain).is_ok(), "{plain:?}");
        }
        for stored in [DType::F8E4M3, DType::U8] {
            let error = take(stored).err().unwrap();
            assert!(error.contains("`lm_head.weight`"), "{error}");
        }
        let check = |name: &str| check_scales([name.to_owned()].iter());
        for name in ["weight_scale_inv", "weight_scale", "k_scale"] {
            let name = format!("model.layers.0.self_attn.k_proj.{name}");
            let error = check(&name).unwrap_err();
            assert!(error.contains(&name), "{error}");
        }
        check("model.layers.0.self_attn.k_proj.weight").unwrap();
        let unquantised = shape(r#"{"quantization_config": null}"#);
        assert!(unquantised.is_ok());
    }

    #[test]
    fn norms_that_are_stored_less_one_are_made_whole() {
        let norm = |architecture| {
            let weight = Tensor::new(&[0.5f32, -0.25], &Device::Cpu).unwrap();
            let tensors = HashMap::from([("model.norm.weight".to_owned(), weight)]);
            let mut source = Source {
                tensors,
                architecture,
            };
            source.norm().unwrap().to_vec1::<f32>().unwrap()
        };
        let of = |name| Architecture::of_model_type(name).unwrap();
        assert_eq!(norm(of("gemma3_text")), [1.5, 0.75]);
        assert_eq!(norm(of("qwen3")), [0.5, -0.25]);
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
