//! [`OpenAiSpec`]: a server and its model, as a pipeline says them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A model behind an OpenAI-compatible server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenAiSpec {
    /// Where the API is, such as `http://localhost:8000/v1`.
    pub base_url: String,
    /// The model's id at the server.
    pub model: String,
    /// The environment variable that holds the key; none is sent without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// Requests in flight at once.
    #[serde(default = "concurrency")]
    #[schemars(range(min = 1))]
    pub concurrency: usize,
    /// Seconds that one request may take.
    #[serde(default = "timeout_s")]
    pub timeout_s: u64,
    /// Tries after the first one, for errors that may pass (429, 5xx, no connection).
    #[serde(default = "max_retries")]
    pub max_retries: u32,
    /// What tokens cost, for the report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prices: Option<Prices>,
}

/// US dollars for a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Of prompts.
    pub input: f64,
    /// Of answers.
    pub output: f64,
}

impl Prices {
    /// What so many tokens cost, in US dollars.
    pub fn cost(&self, prompt: u64, completion: u64) -> f64 {
        (self.input * prompt as f64 + self.output * completion as f64) / 1e6
    }
}

fn concurrency() -> usize {
    16
}

fn timeout_s() -> u64 {
    120
}

fn max_retries() -> u32 {
    6
}
