//! [`HubConfig`]: `config.json` of a Hugging Face folder, in all spellings of `transformers`.
//!
//! Knows no tensor. Invariant: a setting that would make every result another is an error.

use serde::Deserialize;

use super::{Shape, local_layers};
use crate::architecture::{Architecture, LocalLayers};
use crate::config::{Activation, Llama3RopeScaling, LlamaConfig, LocalAttention, RopeScaling};

/// The part of `config.json` that the forward pass depends on.
#[derive(Debug, Deserialize)]
pub(super) struct HubConfig {
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
    /// What it says of the model. `has_head`: there is a tensor of the head.
    ///
    /// # Errors
    /// When it asks for what is not computed, or lacks something, with the name.
    pub(super) fn shape(mut self, has_head: bool) -> Result<Shape, String> {
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
pub(super) const UNQUANTISED: &str =
    "take the model's folder in F32, F16 or BF16, or a GGUF file of it";

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
        let unquantised = shape(r#"{"quantization_config": null}"#);
        assert!(unquantised.is_ok());
        let lacking = shape(r#"{"model_type": "gemma3_text"}"#).err().unwrap();
        assert_eq!(lacking, "`sliding_window` is missing");
        let qwen = shape(r#"{"model_type": "qwen3", "hidden_act": "silu"}"#).unwrap();
        assert!(qwen.config.parts.head_norms && qwen.query_scalar.is_none());
    }
}
