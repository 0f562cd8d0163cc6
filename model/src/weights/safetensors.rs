//! Weights, tokenizer and chat template from a Hugging Face folder: `config.json`,
//! `*.safetensors`, `tokenizer.json`, `tokenizer_config.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::hub_config::{HubConfig, UNQUANTISED};
use super::{Keep, LlamaWeights, Slot, TensorSource, assemble};
use crate::architecture::Architecture;
use crate::chat_template::ChatTemplate;
use crate::config::LlamaConfig;
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
