//! [`Batch`]: a file of requests that is answered, and how far it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::serve::files::Files;
use crate::serve::kept::{new_id, now};
use crate::serve::openai::Endpoint;
use crate::serve::orders::{Order, metadata};
use crate::serve::problem::Problem;

const PREFIX: &str = "batch_";
/// The only window that is offered, and its seconds.
const WINDOW: (&str, u64) = ("24h", 24 * 60 * 60);

/// What a caller asks for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct BatchOrder {
    /// A file that was uploaded with the purpose `batch`: one request a line.
    pub(super) input_file_id: String,
    /// `/v1/chat/completions` or `/v1/completions`.
    endpoint: String,
    /// `24h`.
    completion_window: String,
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
}

/// Where a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    /// It waits for its turn, or its requests are being read.
    Validating,
    /// Its file cannot be answered.
    Failed,
    /// It is being answered.
    InProgress,
    /// Its answers are being put together.
    Finalizing,
    /// Every request has an answer or an error.
    Completed,
    /// Its time was over before that.
    Expired,
    /// It was asked to end.
    Cancelling,
    /// It has ended before that.
    Cancelled,
}

impl Status {
    fn has_ended(self) -> bool {
        matches!(
            self,
            Self::Failed | Self::Completed | Self::Expired | Self::Cancelled
        )
    }
}

/// Its requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) total: usize,
    /// Those that have an answer.
    pub(super) completed: usize,
    /// Those that have an error.
    pub(super) failed: usize,
}

/// A batch with all that is known of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Batch {
    pub(super) id: String,
    pub(super) endpoint: Endpoint,
    /// The file of its requests.
    pub(super) input: String,
    /// The file of the answers, from the first one on; callers see it when the batch ends.
    pub(super) output: String,
    /// The file of the errors, likewise.
    pub(super) failures: String,
    pub(super) created_at: u64,
    pub(super) status: Status,
    /// Seconds since 1970 when it came to each status.
    pub(super) since: BTreeMap<Status, u64>,
    pub(super) counts: Counts,
    /// Which of the two files callers see.
    pub(super) shown: Shown,
    /// Why it failed.
    pub(super) errors: Vec<Value>,
    pub(super) metadata: BTreeMap<String, String>,
    /// How often it was begun since a request of it was answered.
    pub(super) starts: u32,
}

/// Which files of a batch callers see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shown {
    pub(super) output: bool,
    pub(super) failures: bool,
}

impl BatchOrder {
    /// The batch that is ordered.
    pub(super) fn batch(self) -> Result<Batch, Problem> {
        let endpoint = Endpoint::of(&self.endpoint).ok_or_else(|| {
            let all = Endpoint::ALL.map(Endpoint::path).join("` or `");
            let text = format!("`endpoint` is `{all}` here, not `{}`", self.endpoint);
            Problem::bad(text).of("endpoint")
        })?;
        if self.completion_window != WINDOW.0 {
            let text = format!("`completion_window` must be `{}`", WINDOW.0);
            return Err(Problem::bad(text).of("completion_window"));
        }
        let metadata = metadata(self.metadata)?;
        let now = now();
        Ok(Batch {
            id: new_id(PREFIX),
            endpoint,
            input: self.input_file_id,
            output: Files::next_id(),
            failures: Files::next_id(),
            created_at: now,
            status: Status::Validating,
            since: BTreeMap::from([(Status::Validating, now)]),
            counts: Counts::default(),
            shown: Shown::default(),
            errors: Vec::new(),
            metadata,
            starts: 0,
        })
    }
}

impl Batch {
    /// Comes to a status, unless it has ended.
    pub(super) fn enter(&mut self, status: Status) {
        if !self.status.has_ended() {
            self.status = status;
            self.since.insert(status, now());
        }
    }

    /// Ends it without all answers.
    pub(super) fn fail(&mut self, errors: Vec<Value>) {
        if !self.status.has_ended() {
            self.errors = errors;
            self.enter(Status::Failed);
        }
    }

    /// Seconds since 1970 when its time is over.
    pub(super) fn expires_at(&self) -> u64 {
        self.created_at.saturating_add(WINDOW.1)
    }
}

impl Order for Batch {
    const NAME: &'static str = "batch";
    const NAMES: &'static str = "batches";
    const PREFIX: &'static str = PREFIX;
    const TOO_MANY: &'static str = "too_many_batches";
    const MOST: usize = 1000;
    type Stop = Arc<Notify>;

    fn id(&self) -> &str {
        &self.id
    }

    fn created_at(&self) -> u64 {
        self.created_at
    }

    fn has_ended(&self) -> bool {
        self.status.has_ended()
    }

    fn begin(&mut self) {
        self.starts += 1;
    }

    fn cancel(&mut self, under_way: bool) {
        // What has answers already is put together first.
        self.enter(match (under_way, self.status) {
            (false, Status::Validating) => Status::Cancelled,
            _ => Status::Cancelling,
        });
    }

    fn stop(stop: &Self::Stop) {
        stop.notify_one();
    }

    /// OpenAI's batch object.
    fn object(&self) -> Value {
        let at = |status: Status| self.since.get(&status);
        let errors = match self.errors.as_slice() {
            [] => Value::Null,
            errors => json!({"object": "list", "data": errors}),
        };
        json!({
            "id": self.id, "object": "batch", "endpoint": self.endpoint,
            "input_file_id": self.input, "completion_window": WINDOW.0, "status": self.status,
            "output_file_id": self.shown.output.then_some(&self.output),
            "error_file_id": self.shown.failures.then_some(&self.failures),
            "errors": errors, "request_counts": self.counts, "metadata": self.metadata,
            "created_at": self.created_at, "expires_at": self.expires_at(),
            "in_progress_at": at(Status::InProgress), "finalizing_at": at(Status::Finalizing),
            "completed_at": at(Status::Completed), "failed_at": at(Status::Failed),
            "expired_at": at(Status::Expired), "cancelling_at": at(Status::Cancelling),
            "cancelled_at": at(Status::Cancelled),
        })
    }
}

/// One of the reasons why a batch failed, in OpenAI's shape.
pub(super) fn reason(code: &str, message: &str, line: Option<usize>) -> Value {
    json!({"code": code, "message": message, "line": line, "param": null})
}
