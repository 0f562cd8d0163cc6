//! What runners outside of this process send and hear: one JSON object a line.
//!
//! The runner writes one [`StepRequest`] and keeps its end open; closing it asks the work to
//! stop. The other end writes any number of [`StepMessage`]s, the last of which is a response.
//! Secrets do not travel: the other end has them in its own environment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use flowrun_cache::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::child::log_in_pieces;
use crate::step::{
    InputArtifact, Step, StepContext, StepError, StepErrorKind, StepOutcome, StepReporter,
    StepSummary, TraceSpan,
};

/// Version of the protocol; both ends must have the same.
pub const PROTOCOL_VERSION: u32 = 7;

/// One attempt of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepRequest {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// Step kind.
    pub kind: String,
    /// The kind's version.
    pub version: u32,
    /// Step id, with its item.
    pub step: String,
    /// Resolved params.
    pub params: Value,
    /// The facts that entered the key.
    pub observed: BTreeMap<String, Value>,
    /// Input port to artifacts, in order.
    pub inputs: BTreeMap<String, Vec<RequestInput>>,
    /// Empty folder for outputs.
    pub out_dir: PathBuf,
    /// Scratch folder.
    pub work_dir: PathBuf,
    /// Folder that outlives a killed attempt; it may not exist.
    pub resume_path: PathBuf,
    /// Folder of the run; it may be on another machine.
    pub run_path: PathBuf,
    /// Folder of kept answers of language models.
    pub completions: Option<PathBuf>,
    /// Folder of results by action key.
    pub actions: PathBuf,
    /// Bytes of memory that the work may use; zero means no bound.
    pub memory: u64,
    /// No network may be used.
    pub offline: bool,
    /// Folder of files that stand in for downloads.
    pub distdir: Option<PathBuf>,
    /// The user's cache folder.
    pub user_cache: PathBuf,
    /// Project root.
    pub root: PathBuf,
    /// When the attempt began.
    pub started_at: SystemTime,
    /// Steps that finished before.
    pub finished: Vec<StepSummary>,
    /// Processes that may do the step's work at the same time.
    pub at_once: usize,
    /// Somebody wants to hear of spans.
    pub traced: bool,
}

/// One input artifact.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RequestInput {
    /// File or folder.
    pub path: PathBuf,
    /// Content digest.
    pub digest: Digest,
    /// Label.
    pub label: String,
}

/// What the work says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StepMessage {
    /// Work in progress.
    Progress {
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
        /// What is counted.
        unit: String,
        /// Short text.
        text: String,
    },
    /// Something the user must see.
    Warning(String),
    /// A line for the log.
    Log(String),
    /// A part of the work ended.
    Span(TraceSpan),
    /// It ended well.
    Done(StepOutcome),
    /// It failed.
    Failed(Failure),
}

/// A step's failure on the wire.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub kind: StepErrorKind,
    /// What went wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl StepMessage {
    /// Passes on what is no response.
    pub(crate) fn tell(self, reporter: &dyn StepReporter) {
        match self {
            Self::Warning(text) => reporter.warning(&text),
            Self::Log(text) => log_in_pieces(&text, reporter),
            Self::Span(span) => reporter.span(span),
            Self::Progress {
                done,
                total,
                unit,
                text,
            } => reporter.progress(done, total, &unit, &text),
            Self::Done(_) | Self::Failed(_) => {}
        }
    }
}

impl StepRequest {
    /// The request for one attempt.
    #[must_use]
    pub fn new(step: &dyn Step, ctx: &StepContext, memory: u64) -> Self {
        let inputs = ctx.inputs.iter();
        Self {
            protocol: PROTOCOL_VERSION,
            kind: step.kind().to_owned(),
            version: step.version(),
            step: ctx.step.clone(),
            params: ctx.params.clone(),
            observed: ctx.observed.clone(),
            inputs: inputs
                .map(|(port, list)| (port.clone(), list.iter().map(RequestInput::of).collect()))
                .collect(),
            out_dir: ctx.out_dir.clone(),
            work_dir: ctx.work_dir.clone(),
            resume_path: ctx.resume_path.clone(),
            run_path: ctx.run_path.clone(),
            completions: ctx.completions.folder().map(PathBuf::from),
            actions: ctx.actions.folder().to_owned(),
            memory,
            offline: ctx.world.offline,
            distdir: ctx.world.distdir.clone(),
            user_cache: ctx.world.user_cache.clone(),
            root: ctx.world.root.clone(),
            started_at: ctx.started_at,
            finished: ctx.finished.to_vec(),
            at_once: ctx.at_once,
            traced: ctx.reporter.traces(),
        }
    }
}

impl RequestInput {
    fn of(input: &InputArtifact) -> Self {
        Self {
            path: input.path.clone(),
            digest: input.digest,
            label: input.label.clone(),
        }
    }
}

impl From<RequestInput> for InputArtifact {
    fn from(input: RequestInput) -> Self {
        Self {
            path: input.path,
            digest: input.digest,
            label: input.label,
        }
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        Self {
            kind: error.kind,
            message: error.message,
            help: error.help,
        }
    }
}

impl From<Failure> for StepError {
    fn from(failure: Failure) -> Self {
        Self {
            kind: failure.kind,
            message: failure.message,
            help: failure.help,
        }
    }
}
