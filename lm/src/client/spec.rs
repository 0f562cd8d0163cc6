//! [`OpenAiSpec`]: a server and its model, as a pipeline says them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::lm::{Budget, Prices};

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
    /// Requests in flight at once, of all steps in flowrun's own process together; the same goes for
    /// the limits below. Of a step that runs elsewhere (`runner`), each item has its share of them:
    /// they are divided by how many of its items may run at the same time.
    #[serde(default = "concurrency")]
    #[schemars(range(min = 1))]
    pub concurrency: usize,
    /// Seconds that one try of a request may take.
    #[serde(default = "timeout_s")]
    pub timeout_s: u64,
    /// Seconds that one request may take in all: its tries and the waits between them. A wait for
    /// a place in `requests_per_minute` or `tokens_per_minute` does not count.
    #[serde(default = "deadline_s")]
    #[schemars(range(min = 1))]
    pub deadline_s: u64,
    /// Tries after the first one, for errors that may pass (429, 5xx, no connection).
    #[serde(default = "max_retries")]
    pub max_retries: u32,
    /// What tokens cost: for the report, `plan` and `budget`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prices: Option<Prices>,
    /// What one run may spend on this model, all its steps together. A request is sent only when
    /// its worst case still fits; kept answers cost nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// How to have the server answer with one of the labels and nothing else, for prompts whose
    /// whole answer is a label. Without it the model may answer anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guided: Option<Guided>,
    /// Further fields of each request's body, such as `reasoning_effort`. `null` leaves out one that
    /// is sent otherwise: `{ max_tokens: null, temperature: null, max_completion_tokens: 2000 }` for
    /// OpenAI's reasoning models.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub body: BTreeMap<String, Value>,
    /// What else the model's chat template is told, by servers that take it (vLLM, llama.cpp,
    /// `flowrun serve`): `{ enable_thinking: false }` has Qwen 3 answer at once.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub chat_template_kwargs: BTreeMap<String, Value>,
    /// How the server comes by the adapters of fine-tuned checkpoints. Without it, it answers as
    /// `model` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<AdapterPlace>,
    /// Whether to send the requests through the server's Batch API (`/v1/batches`): answers come
    /// within a day, at OpenAI for half the price. A killed run waits for the same batch.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub batch: bool,
    /// Requests to send in a minute at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub requests_per_minute: Option<u64>,
    /// Tokens to use in a minute at most, prompts and answers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub tokens_per_minute: Option<u64>,
}

/// Where a server reads adapters from: `folder` or `url`. A checkpoint is put there under a name of
/// its own, and its model id is `<model>:<that name>`, as vLLM, Ray Serve LLM and `flowrun serve`
/// have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{ "required": ["folder"] }, { "required": ["url"] }]))]
pub struct AdapterPlace {
    /// The folder, as this machine sees it; relative to the project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// A folder of an object store (`s3://bucket/path`, `gs://bucket/path`, `az://container/path`,
    /// `file:///folder`) that the server looks into itself: Ray Serve LLM's
    /// `dynamic_lora_loading_path`. Credentials and endpoints come from the same environment
    /// variables as those of the remote cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^(s3|s3a|gs|az|azure|abfs|abfss|file)://."))]
    pub url: Option<String>,
    /// The same folder as the server sees it, where that is another path (a container's mount).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_as: Option<PathBuf>,
    /// Whether to tell the server of each one (`/load_lora_adapter`: vLLM with
    /// `VLLM_ALLOW_RUNTIME_LORA_UPDATING`, `flowrun serve`). Not for servers that look into the
    /// folder themselves, and not with `url`.
    #[serde(default)]
    pub load: bool,
    /// What the server is, so that what it cannot load is found before a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<AdapterServer>,
    /// The highest rank that it loads: vLLM's `--max-lora-rank`, 16 where that is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_rank: Option<u64>,
}

/// A server that loads adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterServer {
    /// vLLM, also where Ray Serve LLM runs it: plain LoRA alone, no activated adapters, no DoRA.
    Vllm,
    /// `flowrun serve`: plain LoRA and activated adapters, of any rank.
    Flowrun,
}

/// How a server is told to answer with one of given texts. Servers that do not know a way ignore
/// it without a word, hence it must be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guided {
    /// vLLM's `structured_outputs` (0.11 and later).
    Vllm,
    /// llama.cpp's `grammar`.
    LlamaCpp,
    /// OpenAI's `response_format` with a JSON Schema, which vLLM, llama.cpp and `flowrun serve`
    /// know too. The answer is an object with the label, some tokens longer than the label alone.
    JsonSchema,
}

impl OpenAiSpec {
    /// The entry as one of `processes` has it that share it: with its part of what may be in flight
    /// and of the limits, at least one of each.
    #[must_use]
    pub fn shared_by(&self, processes: usize) -> Self {
        let parts = u64::try_from(processes.max(1)).unwrap_or(u64::MAX);
        let part = |limit: Option<u64>| limit.map(|limit| (limit / parts).max(1));
        Self {
            concurrency: (self.concurrency / processes.max(1)).max(1),
            requests_per_minute: part(self.requests_per_minute),
            tokens_per_minute: part(self.tokens_per_minute),
            ..self.clone()
        }
    }
}

fn concurrency() -> usize {
    16
}

fn timeout_s() -> u64 {
    120
}

fn deadline_s() -> u64 {
    600
}

fn max_retries() -> u32 {
    6
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn processes_share_the_limits_of_an_entry() {
        let entry = json!({
            "base_url": "http://h/v1", "model": "m", "concurrency": 64, "tokens_per_minute": 3,
            "budget": { "tokens": 9 },
        });
        let entry: OpenAiSpec = serde_json::from_value(entry).unwrap();
        for alone in [0, 1] {
            assert_eq!(entry.shared_by(alone), entry);
        }
        let one = entry.shared_by(16);
        assert_eq!((one.concurrency, one.tokens_per_minute), (4, Some(1)));
        assert_eq!((one.requests_per_minute, one.budget), (None, entry.budget));
        assert_eq!(entry.shared_by(usize::MAX).concurrency, 1);
    }
}
