//! [`StepReporter`]: what a step says while it works.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A part of a step's work that took a time of its own, such as a call of a model: for traces
/// alone, and in no record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceSpan {
    /// What it is, in few different words (`chat gpt-4o`).
    pub name: String,
    /// When it began.
    pub started_at: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// A word for what went wrong; `None` when it ended well.
    pub failed: Option<String>,
    /// What it was about, by the names of OpenTelemetry's semantic conventions. Nothing that is
    /// to be hidden.
    pub attributes: BTreeMap<String, Value>,
}

/// Where a step reports what it is doing; the engine turns it into events.
pub trait StepReporter: Send + Sync {
    /// `done` of `total` units (`rows`, `tokens`, `steps`) with a short text such as `loss 0.42`.
    fn progress(&self, done: u64, total: u64, unit: &str, text: &str);
    /// Something the user must see (a stand-in data set, dropped rows).
    fn warning(&self, text: &str);
    /// One line for the step's log file.
    fn log(&self, text: &str);

    /// Somebody wants to hear of spans.
    fn traces(&self) -> bool {
        false
    }

    /// A part of the work ended.
    fn span(&self, span: TraceSpan) {
        let _ = span;
    }

    /// Where a long line of output is cut in two for [`StepReporter::log`], at `at` bytes or
    /// before; `None` while more must be read to tell. Never cuts what is to be hidden in two.
    fn cut(&self, line: &[u8], at: usize) -> Option<usize> {
        let _ = line;
        Some(at)
    }
}
