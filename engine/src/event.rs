//! [`RunEvent`]: the stream that everything a person or a program sees is a
//! fold over. One JSON object a line in `events.jsonl` and with `--json`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::step::TraceSpan;

/// The JSON Schema of one event.
#[must_use]
pub fn event_schema() -> Value {
    schemars::schema_for!(RunEvent).to_value()
}

/// Something that happened in a run.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    /// First event.
    RunStarted {
        /// Run id.
        run: String,
        /// Pipeline name.
        pipeline: String,
        /// Number of steps before fan-out.
        steps: usize,
        /// UTC, RFC 3339.
        at: String,
    },
    /// A step's items are known.
    StepExpanded {
        /// Step name.
        step: String,
        /// Item labels in order.
        items: Vec<String>,
    },
    /// An attempt began.
    StepStarted {
        /// Step id (`evaluate[epoch-2]`).
        step: String,
        /// Step kind.
        kind: String,
        /// Action key, hex.
        #[serde(default)]
        key: String,
        /// Why it runs (`never ran`, `param `lr`: 0.001 → 0.002`).
        why: String,
    },
    /// Work in progress.
    Progress {
        /// Step id.
        step: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
        /// `rows`, `tokens`, `steps`.
        unit: String,
        /// Short text (`loss 0.42`).
        text: String,
    },
    /// Something the user must see.
    Warning {
        /// Step id, if it concerns one.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        step: Option<String>,
        /// What.
        text: String,
    },
    /// A failed attempt will be repeated.
    StepRetry {
        /// Step id.
        step: String,
        /// The attempt that failed, from 1.
        attempt: u32,
        /// Milliseconds until the next.
        wait_ms: u64,
        /// Why it failed.
        error: String,
    },
    /// A step ended.
    StepFinished {
        /// Step id.
        step: String,
        /// Step kind.
        kind: String,
        /// How.
        status: StepStatus,
        /// Action key, hex; empty when none was made.
        key: String,
        /// Milliseconds of this run.
        took_ms: u64,
        /// Why it ran, was skipped or failed.
        why: String,
        /// Outputs by port.
        outputs: BTreeMap<String, OutputInfo>,
        /// Metrics.
        metrics: BTreeMap<String, Value>,
        /// The error's advice.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        help: Option<String>,
        /// Where a cached result came from, when it was not here.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        from: Option<ResultFrom>,
    },
    /// A part of a step's work ended: for those who trace the run, and in no record.
    #[serde(skip)]
    Span {
        /// Step id.
        step: String,
        /// What and when.
        span: TraceSpan,
    },
    /// Steps that ended as an earlier run recorded it, one event in JSON a line. In a record
    /// and on standard output these lines stand in its place.
    #[serde(skip)]
    Recorded {
        /// The lines.
        lines: Vec<u8>,
    },
    /// The steps are done; results are still on their way to the remote cache.
    Uploading {
        /// Objects that are there by now.
        objects: u64,
        /// Of so many.
        of_objects: u64,
        /// Their bytes.
        bytes: u64,
        /// Of so many.
        of_bytes: u64,
    },
    /// What the remote cache was sent.
    Uploaded {
        /// Its URL.
        to: String,
        /// Results that are new there.
        results: u64,
        /// Objects that are new there.
        objects: u64,
        /// Bytes that were moved.
        bytes: u64,
        /// Results that are still to be sent; a later run does.
        waiting: u64,
    },
    /// Last event.
    RunFinished {
        /// All steps ended well.
        ok: bool,
        /// Steps (items) that ran.
        ran: usize,
        /// Taken from the cache.
        cached: usize,
        /// Failed.
        failed: usize,
        /// Not run.
        skipped: usize,
        /// The run's folder.
        run_dir: String,
        /// Milliseconds in all.
        took_ms: u64,
    },
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StepStatus {
    /// Ran and succeeded.
    Ran,
    /// Taken from the cache.
    Cached,
    /// Ran and failed.
    Failed,
    /// Not run: `when` was false, something before it failed, or the run stopped.
    Skipped,
}

/// Where a result came from that was not in the local cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ResultFrom {
    /// The remote cache.
    Remote,
}

/// One output in an event.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct OutputInfo {
    /// Port type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Content digest, hex (of the list record for a list).
    pub digest: String,
    /// Path of the object in the store.
    pub path: String,
}
