//! The shape of a model of Llama's family. Knows no file format: `weights/` fills it in.
//!
//! Invariant: a [`LlamaConfig`] that passed [`LlamaConfig::check`] describes a model that the
//! forward pass can run, so later code indexes without checking again.

use serde::{Deserialize, Serialize};

/// Sizes and constants of a model of Llama's family.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Number of tokens in the vocabulary.
    pub vocab: usize,
    /// Longest sequence, in tokens, that the model was trained for.
    pub context: usize,
    /// Base of the rotary position frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are rescaled, where the model does that.
    pub rope_scaling: Option<RopeScaling>,
    /// Epsilon of the RMS norms.
    pub norm_eps: f64,
    /// Whether the output head is the embedding matrix.
    pub tied_head: bool,
    /// What the layers have beside Llama's parts.
    #[serde(default)]
    pub parts: LayerParts,
    /// Which layers see only the last tokens; none means that all see all.
    #[serde(default)]
    pub local: Option<LocalAttention>,
}

/// Parts of a layer that not every model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerParts {
    /// Whether the query, key and value projections add a bias.
    pub qkv_bias: bool,
    /// Whether each head's queries and keys go through an RMS norm before they are rotated.
    pub head_norms: bool,
    /// Whether attention and feed-forward layer each end with an RMS norm, before their result is
    /// added to the residual stream.
    pub post_norms: bool,
    /// What the gate of the feed-forward layer goes through.
    pub activation: Activation,
}

/// The function of a gated feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// Layers that see only the last tokens, between those that see all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalAttention {
    /// How many tokens a token sees there, itself included.
    pub window: usize,
    /// Base of the rotary frequencies there; they are never rescaled.
    pub rope_theta: f64,
    /// Of each layer, whether it is such a one.
    pub layers: Vec<bool>,
}

impl LayerParts {
    /// Those of Llama.
    pub const LLAMA: Self = Self {
        qkv_bias: false,
        head_norms: false,
        post_norms: false,
        activation: Activation::Silu,
    };
}

impl Default for LayerParts {
    fn default() -> Self {
        Self::LLAMA
    }
}

/// A rescaling of the rotary frequencies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// By Llama 3's formula.
    Llama3(Llama3RopeScaling),
    /// All frequencies are divided by one number (position interpolation, Chen et al. 2023).
    Linear(f64),
    /// A divisor for each of the `head_dim / 2` frequencies; llama.cpp's files have these in
    /// place of the formula's parameters.
    Divisors(Vec<f64>),
}

/// Parameters of Llama 3's rotary frequency rescaling (`rope_type: llama3`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Llama3RopeScaling {
    /// Divides the lowest frequencies.
    pub factor: f64,
    /// Wavelengths above `original_context / low_freq_factor` are scaled in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_context / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// The context length before the rescaling.
    pub original_context: usize,
}

impl LlamaConfig {
    /// Checks that the sizes fit each other; the error is a sentence naming what does not.
    pub fn check(&self) -> Result<(), String> {
        let sizes = [
            ("hidden size", self.hidden),
            ("layer count", self.layers),
            ("head count", self.heads),
            ("key/value head count", self.kv_heads),
            ("head size", self.head_dim),
            ("feed-forward size", self.ffn),
            ("vocabulary size", self.vocab),
            ("context length", self.context),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(format!("the {name} is zero"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} query heads cannot share {} key/value heads evenly",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("the head size {} is odd", self.head_dim));
        }
        let widest = self.heads.checked_mul(self.head_dim);
        let widest = widest.map(|width| width.max(self.ffn).max(self.vocab));
        if widest.and_then(|w| w.checked_mul(self.hidden)).is_none() {
            return Err("its matrices would be larger than any memory".to_owned());
        }
        positive("rope base", self.rope_theta)?;
        positive("epsilon of the norms", self.norm_eps)?;
        if let Some(local) = &self.local {
            local.check(self.layers)?;
        }
        match &self.rope_scaling {
            None => Ok(()),
            Some(RopeScaling::Llama3(scaling)) => scaling.check(),
            Some(RopeScaling::Linear(factor)) => positive("factor of the linear rope", *factor),
            Some(RopeScaling::Divisors(divisors)) => self.check_divisors(divisors),
        }
    }

    fn check_divisors(&self, divisors: &[f64]) -> Result<(), String> {
        let wanted = self.head_dim / 2;
        if divisors.len() != wanted {
            return Err(format!(
                "the rotary frequencies have {} divisors, not {wanted}",
                divisors.len()
            ));
        }
        let mut divisors = divisors.iter();
        divisors.try_for_each(|divisor| positive("divisor of a rotary frequency", *divisor))
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The rotary inverse frequencies, `head_dim / 2` of them, in the order of the
    /// rotate-half layout: dimension `i` turns with dimension `i + head_dim / 2`.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        self.frequencies(self.rope_theta, self.rope_scaling.as_ref())
    }

    /// The inverse frequencies of layers that see all tokens, then those of local layers where
    /// there are any. [`LlamaConfig::frequency_table`] says which of the two a layer takes.
    pub fn frequency_tables(&self) -> Vec<Vec<f64>> {
        let local = self.local.as_ref();
        let local = local.map(|local| self.frequencies(local.rope_theta, None));
        std::iter::once(self.inverse_frequencies())
            .chain(local)
            .collect()
    }

    /// The place of a layer's frequencies in [`LlamaConfig::frequency_tables`].
    pub fn frequency_table(&self, layer: usize) -> usize {
        usize::from(self.window(layer).is_some())
    }

    /// How many tokens a token sees in `layer`, itself included; none means all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let local = self.local.as_ref()?;
        let is_local = local.layers.get(layer).copied().unwrap_or(false);
        is_local.then_some(local.window)
    }

    fn frequencies(&self, theta: f64, scaling: Option<&RopeScaling>) -> Vec<f64> {
        let dim = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|i| theta.powf(-(2.0 * i as f64) / dim))
            .enumerate()
            .map(|(i, f)| match scaling {
                None => f,
                Some(RopeScaling::Llama3(scaling)) => scaling.rescale(f),
                Some(RopeScaling::Linear(factor)) => f / factor,
                Some(RopeScaling::Divisors(divisors)) => f / divisors[i],
            })
            .collect()
    }
}

fn positive(name: &str, value: f64) -> Result<(), String> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(format!("the {name} is {value}, not a positive number")),
    }
}

impl LocalAttention {
    fn check(&self, layers: usize) -> Result<(), String> {
        positive("rope base of the local layers", self.rope_theta)?;
        if self.window == 0 {
            return Err("the window of the local layers is zero".to_owned());
        }
        match self.layers.len() == layers {
            true => Ok(()),
            false => Err(format!(
                "of {layers} layers, {} are said to be local or not",
                self.layers.len()
            )),
        }
    }
}

impl Llama3RopeScaling {
    fn check(&self) -> Result<(), String> {
        positive("factor of the llama3 rope", self.factor)?;
        positive(
            "low frequency factor of the llama3 rope",
            self.low_freq_factor,
        )?;
        positive(
            "high frequency factor of the llama3 rope",
            self.high_freq_factor,
        )?;
        if self.high_freq_factor <= self.low_freq_factor {
            return Err(format!(
                "the high frequency factor {} of the llama3 rope is not above the low one, {}",
                self.high_freq_factor, self.low_freq_factor
            ));
        }
        Ok(())
    }

    /// One rescaled inverse frequency, as in the reference implementation of Llama 3.1.
    fn rescale(&self, frequency: f64) -> f64 {
        let context = self.original_context as f64;
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < context / self.high_freq_factor {
            return frequency;
        }
        if wavelength > context / self.low_freq_factor {
            return frequency / self.factor;
        }
        let smooth = (context / wavelength - self.low_freq_factor)
            / (self.high_freq_factor - self.low_freq_factor);
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> LlamaConfig {
        LlamaConfig {
            hidden: 8,
            layers: 1,
            heads: 4,
            kv_heads: 2,
            head_dim: 2,
            ffn: 16,
            vocab: 10,
            context: 32,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tied_head: true,
            parts: LayerParts::LLAMA,
            local: None,
        }
    }

    #[test]
    fn a_config_that_cannot_run_is_named() {
        assert_eq!(config().check(), Ok(()));
        let odd = LlamaConfig {
            kv_heads: 3,
            ..config()
        };
        assert_eq!(
            odd.check(),
            Err("4 query heads cannot share 3 key/value heads evenly".to_owned())
        );
        assert!(
            LlamaConfig {
                head_dim: 3,
                ..config()
            }
            .check()
            .is_err()
        );
        assert!(
            LlamaConfig {
                layers: 0,
                ..config()
            }
            .check()
            .is_err()
        );
        assert!(
            LlamaConfig {
                rope_theta: f64::NAN,
                ..config()
            }
            .check()
            .is_err()
        );
    }

    #[test]
    fn numbers_that_would_make_every_logit_nan_are_named() {
        let scaled = |scaling| LlamaConfig {
            rope_scaling: Some(scaling),
            ..config()
        };
        let llama3 = |factor, low_freq_factor, high_freq_factor| {
            scaled(RopeScaling::Llama3(Llama3RopeScaling {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context: 16,
            }))
        };
        assert_eq!(llama3(8.0, 1.0, 4.0).check(), Ok(()));
        assert_eq!(scaled(RopeScaling::Linear(2.0)).check(), Ok(()));
        let epsilon = |norm_eps| LlamaConfig {
            norm_eps,
            ..config()
        };
        for (bad, name) in [
            (epsilon(f64::NAN), "epsilon"),
            (epsilon(-1e-5), "epsilon"),
            (llama3(0.0, 1.0, 4.0), "factor of the llama3"),
            (llama3(8.0, f64::NAN, 4.0), "low frequency"),
            (llama3(8.0, 1.0, 0.0), "high frequency"),
            (llama3(8.0, 4.0, 4.0), "not above the low one"),
            (scaled(RopeScaling::Linear(0.0)), "linear"),
            (
                scaled(RopeScaling::Divisors(vec![f64::INFINITY])),
                "divisor",
            ),
            (scaled(RopeScaling::Divisors(vec![1.0; 2])), "2 divisors"),
        ] {
            let error = bad.check().err().unwrap_or_default();
            assert!(error.contains(name), "{bad:?}: {error}");
        }
    }

    #[test]
    fn local_layers_turn_by_their_own_base_and_are_checked() {
        let local = LocalAttention {
            window: 3,
            rope_theta: 100.0,
            layers: vec![true, false],
        };
        let with = |local| LlamaConfig {
            layers: 2,
            head_dim: 4,
            rope_scaling: Some(RopeScaling::Linear(2.0)),
            local: Some(local),
            ..config()
        };
        let good = with(local.clone());
        assert_eq!(good.check(), Ok(()));
        assert_eq!((good.window(0), good.window(1)), (Some(3), None));
        let tables = good.frequency_tables();
        let second = |layer: usize| tables[good.frequency_table(layer)][1];
        assert!((second(0) - 0.1).abs() < 1e-12 && (second(1) - 0.005).abs() < 1e-12);
        for (bad, name) in [
            (
                LocalAttention {
                    window: 0,
                    ..local.clone()
                },
                "window",
            ),
            (
                LocalAttention {
                    rope_theta: -1.0,
                    ..local.clone()
                },
                "rope base of the local",
            ),
            (
                LocalAttention {
                    layers: vec![true],
                    ..local
                },
                "of 2 layers, 1",
            ),
        ] {
            let error = with(bad).check().err().unwrap_or_default();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn sizes_without_end_are_refused_before_anything_is_multiplied() {
        for huge in [
            LlamaConfig {
                head_dim: usize::MAX - 1,
                ..config()
            },
            LlamaConfig {
                vocab: usize::MAX / 2,
                ..config()
            },
        ] {
            let error = huge.check().err().unwrap_or_default();
            assert!(error.contains("larger than any memory"), "{error}");
        }
    }

    #[test]
    fn llama3_scaling_spares_high_frequencies_and_divides_low_ones() {
        let scaling = Llama3RopeScaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = LlamaConfig {
            head_dim: 64,
            rope_theta: 500_000.0,
            ..config()
        };
        let scaled = LlamaConfig {
            rope_scaling: Some(RopeScaling::Llama3(scaling)),
            ..plain.clone()
        };
        let (plain, scaled) = (plain.inverse_frequencies(), scaled.inverse_frequencies());
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[31] / scaled[31] - 8.0).abs() < 1e-9);
        assert!(
            plain
                .iter()
                .zip(&scaled)
                .all(|(p, s)| *s <= *p && *s >= *p / 8.0 - 1e-12)
        );
    }
}
