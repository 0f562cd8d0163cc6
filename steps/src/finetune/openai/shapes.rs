//! The shapes of the fine-tuning API. Servers differ in what they leave out.
//!
//! Source: OpenAI's API reference, *Fine-tuning*.

use std::collections::BTreeMap;

use flowrun_engine::step::{StepError, StepErrorKind};
use flowrun_lm::client::ApiError;
use serde::Deserialize;
use serde_json::Value;

/// Things that one answer lists.
pub(super) const PAGE: &str = "100";

/// A job, as the server tells of it.
#[derive(Debug, Deserialize)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) status: String,
    #[serde(default)]
    pub(super) fine_tuned_model: Option<String>,
    #[serde(default)]
    pub(super) error: Option<JobError>,
    #[serde(default)]
    pub(super) trained_tokens: Option<u64>,
    #[serde(default)]
    pub(super) metadata: Option<BTreeMap<String, Value>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct JobError {
    #[serde(default)]
    pub(super) message: Option<String>,
}

impl Job {
    pub(super) fn has_failed(&self) -> bool {
        matches!(self.status.as_str(), "failed" | "cancelled")
    }

    pub(super) fn has_ended(&self) -> bool {
        self.has_failed() || self.status == "succeeded"
    }
}

/// A part of a list.
#[derive(Debug, Deserialize)]
pub(super) struct Page<T> {
    pub(super) data: Vec<T>,
    #[serde(default)]
    pub(super) has_more: bool,
}

/// What happened to a job.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct EventRow {
    pub(super) id: String,
    #[serde(default)]
    pub(super) message: String,
    #[serde(default)]
    pub(super) data: Option<Metrics>,
}

/// The numbers of an event or of a checkpoint.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Metrics {
    #[serde(default)]
    pub(super) step: Option<u64>,
    #[serde(default)]
    pub(super) total_steps: Option<u64>,
    #[serde(default)]
    pub(super) train_loss: Option<f64>,
}

/// A model on the way.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct CheckpointRow {
    pub(super) id: String,
    pub(super) fine_tuned_model_checkpoint: String,
    pub(super) step_number: u64,
}

/// The job, unless it failed.
pub(super) fn succeeded(job: Job) -> Result<Job, StepError> {
    if !job.has_failed() {
        return Ok(job);
    }
    let why = job.error.and_then(|error| error.message);
    let why = why.unwrap_or_else(|| "the server gave no reason".to_owned());
    Err(StepError::failed(format!(
        "the job {} {}: {why}",
        job.id, job.status
    )))
}

/// What a server answered.
pub(super) fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, StepError> {
    let shown = value.to_string();
    let shown: String = shown.chars().take(200).collect();
    serde_json::from_value(value).map_err(|e| {
        StepError::failed(format!("the server's answer cannot be read ({e}): {shown}"))
    })
}

/// An error as a step says it.
pub(super) fn failed(error: ApiError) -> StepError {
    match error {
        ApiError::Cancelled => StepError::cancelled(),
        ApiError::Invalid(text) => StepError::invalid(text),
        error if error.may_pass() => StepError::new(StepErrorKind::Transient, error.to_string()),
        error => StepError::failed(error.to_string()),
    }
}

/// A server that does not train.
pub(super) fn no_such_api(error: ApiError) -> StepError {
    StepError::failed(error.to_string()).help(
        "the server has no OpenAI fine-tuning API (vLLM, llama.cpp and Ray Serve have none): \
         train with `backend: command`, or with a server that has one",
    )
}
