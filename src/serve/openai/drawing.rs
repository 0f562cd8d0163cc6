//! [`Drawing`]: what a request says about how tokens are drawn.

use flowrun_lm::lm::Sampling;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::serve::problem::Problem;

/// OpenAI's default.
const TEMPERATURE: f64 = 1.0;
/// Answers to one prompt at most.
const ANSWERS: usize = 16;
/// Texts that end an answer at most.
const STOPS: usize = 16;

/// One text or several.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// How a stream is wanted.
#[derive(Deserialize, JsonSchema)]
pub(in crate::serve) struct StreamOptions {
    /// Whether a last chunk says how many tokens were used.
    #[serde(default)]
    pub(super) include_usage: bool,
}

/// How tokens are drawn.
pub(super) struct Drawing {
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) max_tokens: u32,
    pub(super) n: Option<usize>,
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<OneOrMany>,
}

impl Drawing {
    /// One sampling an answer, and the share of probability to draw from.
    pub(super) fn samplings(self) -> Result<(Vec<Sampling>, f64), Problem> {
        let temperature = self.temperature.unwrap_or(TEMPERATURE);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(Problem::bad("`temperature` is from 0 to 2").of("temperature"));
        }
        let top_p = self.top_p.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&top_p) {
            return Err(Problem::bad("`top_p` is from 0 to 1").of("top_p"));
        }
        if self.max_tokens == 0 {
            return Err(Problem::bad("`max_tokens` is at least 1").of("max_tokens"));
        }
        let n = self.n.unwrap_or(1);
        if !(1..=ANSWERS).contains(&n) {
            return Err(Problem::bad(format!("`n` is from 1 to {ANSWERS}")).of("n"));
        }
        let stop = self.stop.map_or_else(Vec::new, OneOrMany::into_vec);
        if stop.len() > STOPS || stop.iter().any(|text| text.is_empty() || text.len() > 256) {
            let text = format!("`stop` is up to {STOPS} texts of 1 to 256 bytes");
            return Err(Problem::bad(text).of("stop"));
        }
        let seed = self.seed.map_or_else(fresh_seed, i64::cast_unsigned);
        let sampling = |at: usize| Sampling {
            temperature,
            max_tokens: self.max_tokens,
            stop: stop.clone(),
            seed: Some(seed.wrapping_add(at as u64)),
            rollout: None,
        };
        Ok(((0..n).map(sampling).collect(), top_p))
    }
}

/// Without a seed each call draws anew.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

/// Refuses fields that may change the answer and are not understood: all but those about
/// accounting and those that ask for what is done anyway.
pub(super) fn refuse_unknown(further: &Map<String, Value>) -> Result<(), Problem> {
    let harmless = |name: &str, value: &Value| match name {
        "user"
        | "metadata"
        | "store"
        | "service_tier"
        | "safety_identifier"
        | "prompt_cache_key"
        | "prompt_cache_retention"
        | "parallel_tool_calls" => true,
        "frequency_penalty" | "presence_penalty" => value.as_f64() == Some(0.0),
        "best_of" => value == 1,
        "echo" => value == false,
        "suffix" => value == "",
        "logit_bias" => value.as_object().is_some_and(Map::is_empty),
        "tools" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" => value == "none" || value == "auto",
        "modalities" => value == &serde_json::json!(["text"]),
        _ => false,
    };
    let found = further
        .iter()
        .find(|(name, value)| !value.is_null() && !harmless(name, value));
    match found {
        Some((name, value)) => Err(Problem::unsupported(&format!("`{name}`: {value}"))),
        None => Ok(()),
    }
}
