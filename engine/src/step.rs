//! [`Step`]: the implementation of one step kind, and the context it runs in.
//!
//! This module knows neither YAML nor the cache's layout: a step sees resolved
//! params, input paths, and an empty folder to write its outputs into.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use flowrun_cache::{ActionCache, CompletionCache, Digest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::estimate::{Estimate, Foresight};

/// The implementation of a step kind: what a pipeline names with `uses:`.
///
/// `run` is synchronous and called on a blocking thread; it may use as many
/// threads as it likes, and must poll [`StepContext::cancelled`] in long work.
pub trait Step: Send + Sync {
    /// The name used in `uses:`, kebab-case.
    fn kind(&self) -> &'static str;
    /// Raised whenever the same inputs and params may give other bytes.
    fn version(&self) -> u32;
    /// One sentence for `flowrun steps`.
    fn about(&self) -> &'static str;
    /// JSON Schema of `with`, generated from the Rust type of the params.
    /// A property marked `"x-flowrun-ref": "models" | "programs"` takes a name
    /// in the pipeline and reaches `run` as the entry itself.
    fn params_schema(&self) -> Value;
    /// Input ports.
    fn inputs(&self) -> Vec<Port>;
    /// Output ports.
    fn outputs(&self) -> Vec<Port>;
    /// Facts about the outside world that the result depends on (for example
    /// the digest of a file that a param names, or which source of a download is
    /// at hand). They enter the action key. Called when a step is planned, and fetches nothing
    /// then ([`World::look_only`]); called again when it is about to run, and what it gives then
    /// reaches `run` as [`StepContext::observed`].
    ///
    /// # Errors
    /// When the world makes the step impossible (a file is missing); [`StepErrorKind::Unseen`]
    /// when something would have to be fetched first, and may not be.
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        let _ = (params, world);
        Ok(BTreeMap::new())
    }
    /// What running is likely to cost, for a plan; `None` where it costs time alone.
    fn estimate(&self, given: &Foresight<'_>) -> Option<Estimate> {
        let _ = given;
        None
    }
    /// Does the work: reads inputs, writes each declared output to
    /// [`StepContext::output`] (a file or a folder).
    ///
    /// # Errors
    /// A [`StepError`] whose kind decides retry and exit code.
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError>;
}

/// One input or output of a step kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Name, `[a-z][a-z0-9_]*`.
    pub name: String,
    /// Type, for example `examples`, `messages`, `adapter`, `program`,
    /// `scores`, `json`, `report`, `bundle`, `file`. `any` fits every type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Input: may be left out.
    pub optional: bool,
    /// Input: takes a list of artifacts. Output: makes a list that exists only
    /// at run time, which `foreach` may walk.
    pub many: bool,
    /// One sentence for the docs.
    pub about: String,
}

impl Port {
    /// A required, single port.
    #[must_use]
    pub fn new(name: &str, ty: &str, about: &str) -> Self {
        Self {
            name: name.into(),
            ty: ty.into(),
            optional: false,
            many: false,
            about: about.into(),
        }
    }
    /// The same port, optional.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }
    /// The same port, for a list.
    #[must_use]
    pub fn many(mut self) -> Self {
        self.many = true;
        self
    }
}

/// What a step may know of the machine. Made by the binary, never read from
/// the environment here.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// No network may be used.
    pub offline: bool,
    /// [`Step::observe`] only looks at this machine, although a run may fetch: what it cannot know
    /// without is an error of the kind [`StepErrorKind::Unseen`].
    pub look_only: bool,
    /// Folder of files that stand in for downloads, looked up by sha256.
    pub distdir: Option<PathBuf>,
    /// The user's cache folder (`~/.cache/flowrun`): downloads and weights.
    pub user_cache: PathBuf,
    /// Project root: relative paths in a pipeline are relative to it.
    pub root: PathBuf,
    /// This program, to start `flowrun serve` or `flowrun step exec`.
    pub exe: PathBuf,
    /// The environment variables that were set when the program started.
    pub env: BTreeMap<String, String>,
}

/// One artifact handed to a step.
#[derive(Debug, Clone)]
pub struct InputArtifact {
    /// File or folder, read-only.
    pub path: PathBuf,
    /// Content digest.
    pub digest: Digest,
    /// Label of an item (`epoch-2`); in a list of outputs the output's name, else the port's.
    pub label: String,
}

/// Summary of a step that finished before this one, for reports.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepSummary {
    /// Step id, with its item: `evaluate[epoch-2]`.
    pub step: String,
    /// Step kind, `run` for shell steps.
    pub kind: String,
    /// `ran` or `cached`.
    pub status: String,
    /// Milliseconds that the work took when it was really done.
    pub took_ms: u64,
    /// Metrics the step reported (for example `tokens`, `cost_usd`, `accuracy`).
    pub metrics: BTreeMap<String, Value>,
}

/// Says whether the run was asked to stop. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Cancel {
    own: Arc<AtomicU8>,
    parent: Option<Arc<AtomicU8>>,
}

/// What [`Cancel`] says: stop, and what is under way may clean up.
const STOP: u8 = 1;
/// Stop at once.
const KILL: u8 = 2;

impl Cancel {
    /// Asks everything to stop.
    pub fn cancel(&self) {
        self.own.fetch_max(STOP, Ordering::SeqCst);
    }
    /// Asks everything to stop at once: commands are killed without time to clean up.
    pub fn kill(&self) {
        self.own.fetch_max(KILL, Ordering::SeqCst);
    }
    /// A flag that is also set by this one, but not the other way round.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            own: Arc::default(),
            parent: Some(Arc::clone(&self.own)),
        }
    }
    /// True once [`Cancel::cancel`] or [`Cancel::kill`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.level() >= STOP
    }
    /// True once [`Cancel::kill`] was called.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.level() >= KILL
    }

    fn level(&self) -> u8 {
        let parent = self.parent.as_ref();
        let parent = parent.map_or(0, |p| p.load(Ordering::SeqCst));
        self.own.load(Ordering::SeqCst).max(parent)
    }
}

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

/// Everything a running step may use.
pub struct StepContext {
    /// Step id, with its item, for messages.
    pub step: String,
    /// Resolved params (`with`), model and program names replaced by their entries.
    pub params: Value,
    /// The facts that entered the key of this work, as [`Step::observe`] gave them where the run
    /// is. Here, perhaps on another machine, the world may look otherwise; the result is kept
    /// under that key all the same, so these decide.
    pub observed: BTreeMap<String, Value>,
    /// What the machine offers.
    pub world: World,
    /// Input port to artifacts, in order.
    pub inputs: BTreeMap<String, Vec<InputArtifact>>,
    /// Empty folder for outputs, one entry per port.
    pub out_dir: PathBuf,
    /// Scratch folder, deleted afterwards.
    pub work_dir: PathBuf,
    /// See [`StepContext::resume_dir`].
    pub resume_path: PathBuf,
    /// See [`StepContext::run_dir`].
    pub run_path: PathBuf,
    /// When this attempt began. Steps read no clock of their own for what they write.
    pub started_at: SystemTime,
    /// Completed language-model calls, shared by all steps and runs.
    pub completions: Arc<CompletionCache>,
    /// Results by action key, for parts of this step that are worth an action of their own
    /// (a candidate of a search): a later attempt, or another step, finds them.
    pub actions: ActionCache,
    /// Steps that finished before this one started, in order of finishing.
    pub finished: Arc<Vec<StepSummary>>,
    /// Where to report.
    pub reporter: Arc<dyn StepReporter>,
    /// Whether to stop.
    pub cancel: Cancel,
}

impl StepContext {
    /// The params as the step's own type.
    ///
    /// # Errors
    /// [`StepErrorKind::Invalid`] when they do not fit, with the path of the field.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, StepError> {
        serde_json::from_value(self.params.clone())
            .map_err(|e| StepError::invalid(format!("params of `{}`: {e}", self.step)))
    }
    /// The one artifact of a required port.
    ///
    /// # Errors
    /// [`StepErrorKind::Invalid`] when the port has none.
    pub fn input(&self, port: &str) -> Result<&InputArtifact, StepError> {
        self.input_opt(port)
            .ok_or_else(|| StepError::invalid(format!("`{}` needs the input `{port}`", self.step)))
    }
    /// The one artifact of an optional port.
    #[must_use]
    pub fn input_opt(&self, port: &str) -> Option<&InputArtifact> {
        self.inputs.get(port).and_then(|v| v.first())
    }
    /// All artifacts of a list port.
    #[must_use]
    pub fn input_list(&self, port: &str) -> &[InputArtifact] {
        self.inputs.get(port).map_or(&[], Vec::as_slice)
    }
    /// Where to write the output `port`.
    #[must_use]
    pub fn output(&self, port: &str) -> PathBuf {
        self.out_dir.join(port)
    }
    /// Where to write the item `label` of the list output `port`. The folder is made.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn output_item(&self, port: &str, label: &str) -> Result<PathBuf, StepError> {
        let dir = self.out_dir.join(port);
        std::fs::create_dir_all(&dir).map_err(|e| StepError::io(&dir, &e))?;
        Ok(dir.join(label))
    }
    /// A folder that outlives a killed or failed attempt: the next attempt of the same action
    /// (equal params and inputs) finds what this one left there. Removed when the step succeeds.
    /// A kill may come at any moment, so replace files whole.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn resume_dir(&self) -> Result<&Path, StepError> {
        std::fs::create_dir_all(&self.resume_path)
            .map_err(|e| StepError::io(&self.resume_path, &e))?;
        Ok(&self.resume_path)
    }
    /// A folder that all steps of this run share, those in other processes of this machine
    /// included: what they add up together. It stays with the run's record.
    ///
    /// # Errors
    /// When the run is kept elsewhere: the step runs on another machine.
    pub fn run_dir(&self) -> Result<PathBuf, StepError> {
        if !self.run_path.is_dir() {
            let text = format!("{} is not here", self.run_path.display());
            return Err(StepError::invalid(text).help(
                "the step needs the run's own folder: give it `runner: inline` or `process`",
            ));
        }
        let shared = self.run_path.join("shared");
        std::fs::create_dir_all(&shared).map_err(|e| StepError::io(&shared, &e))?;
        Ok(shared)
    }
    /// Returns an error of kind `Cancelled` once the run was asked to stop.
    ///
    /// # Errors
    /// [`StepErrorKind::Cancelled`].
    pub fn check_cancelled(&self) -> Result<(), StepError> {
        if self.cancel.is_cancelled() {
            Err(StepError::cancelled())
        } else {
            Ok(())
        }
    }
}

/// What a step gives back besides the files it wrote.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StepOutcome {
    /// For each list output: its labels in order.
    pub lists: BTreeMap<String, Vec<String>>,
    /// Numbers and short facts worth a table cell: rows, tokens, loss, accuracy.
    pub metrics: BTreeMap<String, Value>,
}

impl StepOutcome {
    /// Adds one metric.
    #[must_use]
    pub fn metric(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.metrics.insert(name.into(), value.into());
        self
    }
    /// Declares the order of a list output.
    #[must_use]
    pub fn list(mut self, port: &str, labels: Vec<String>) -> Self {
        self.lists.insert(port.into(), labels);
        self
    }
}

/// What kind of failure it was: decides retry and exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepErrorKind {
    /// Input or params are wrong (exit 4 at run time, 3 when found before the run).
    Invalid,
    /// The work failed (exit 4).
    Failed,
    /// It may work when tried again (network, busy server).
    Transient,
    /// A gate (`expect:`, smoke test) was not met (exit 5).
    Gate,
    /// The run was asked to stop (exit 130).
    Cancelled,
    /// Nothing failed: what a step depends on is known only when a run fetches it. Of
    /// [`Step::observe`] alone.
    Unseen,
}

/// A step's failure.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// Decides retry and exit code.
    pub kind: StepErrorKind,
    /// What went wrong and where.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl StepError {
    /// An error of the given kind.
    #[must_use]
    pub fn new(kind: StepErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            help: None,
        }
    }
    /// Wrong input or params.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StepErrorKind::Invalid, message)
    }
    /// The work failed.
    #[must_use]
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(StepErrorKind::Failed, message)
    }
    /// The run was asked to stop.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(StepErrorKind::Cancelled, "stopped before it finished")
    }
    /// What `name` holds is known only when a run fetches it.
    #[must_use]
    pub fn unseen(name: &str) -> Self {
        let text = format!("`{name}` is not on this machine: a run looks at it first");
        Self::new(StepErrorKind::Unseen, text)
    }
    /// An input or output error on `path`.
    #[must_use]
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::failed(format!("{}: {error}", path.display()))
    }
    /// The same error with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}
