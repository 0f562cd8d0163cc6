//! [`Pipeline`]: a checked pipeline, with every name resolved. Made by
//! checking a file, taken by planning and running. Knows no YAML.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use flowrun_cache::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::hook::Hook;
use crate::language::Diagnostics;
use crate::runner::JobRunner;
use crate::step::{Port, Step};
use crate::tracking::Tracking;

/// The output of a `run` step whose file, a JSON object, gives the step's metrics.
pub const METRICS: &str = "metrics";

/// A pipeline that passed every check.
#[derive(Clone)]
pub struct Pipeline {
    /// `name:`.
    pub name: String,
    /// `about:`.
    pub about: Option<String>,
    /// The file it came from.
    pub file: PathBuf,
    /// Project root: `{file: …}` inputs and `publish` paths are relative to it.
    pub root: PathBuf,
    /// Profiles applied, in order.
    pub profiles: Vec<String>,
    /// Params after profiles and `--set`.
    pub params: BTreeMap<String, Value>,
    /// Model entries after profiles, `${{ }}` resolved.
    pub models: BTreeMap<String, Value>,
    /// Named pools: how many actions of their steps run at once.
    pub pools: BTreeMap<String, usize>,
    /// Job systems that steps run on, by name.
    pub runners: BTreeMap<String, JobRunner>,
    /// Who is told that a run ended, by name.
    pub hooks: BTreeMap<String, Hook>,
    /// What programs of others are told of a run.
    pub tracking: Tracking,
    /// Steps that used a step definition, by name. The steps of `clean` are named `clean/…`.
    pub uses: BTreeMap<String, DefinitionUse>,
    /// Steps in topological order; ties keep the file's order.
    pub steps: Vec<Arc<StepNode>>,
    /// The files that it was read from, with the digests of their texts.
    pub sources: Vec<(PathBuf, Digest)>,
    /// What may go wrong in a run, which depends on what the file does not say.
    pub warnings: Diagnostics,
}

/// A step that used a step definition, and was replaced by its steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefinitionUse {
    /// The definition's file.
    pub file: PathBuf,
    /// `about:` of the use, else of the definition.
    pub about: Option<String>,
}

impl Pipeline {
    /// The steps that a name stands for: the step itself, or all steps of a use of a definition.
    #[must_use]
    pub fn named(&self, name: &str) -> Vec<&StepNode> {
        let prefix = format!("{name}/");
        let is_meant = |s: &&Arc<StepNode>| s.name == name || s.name.starts_with(&prefix);
        let steps = self.steps.iter().filter(is_meant);
        steps.map(AsRef::as_ref).collect()
    }
}

/// What a step does.
#[derive(Clone)]
pub enum Action {
    /// A kind of the vocabulary.
    Uses(Arc<dyn Step>),
    /// A shell command.
    Run(String),
}

impl Default for Action {
    /// A command that does nothing.
    fn default() -> Self {
        Self::Run(String::new())
    }
}

/// One step of a checked pipeline.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StepNode {
    /// Name, unique in the pipeline.
    pub name: String,
    /// `about:`.
    #[serde(skip_serializing_if = "is_default")]
    pub about: Option<String>,
    /// What it does. Written apart: a kind is found by its name.
    #[serde(skip)]
    pub action: Action,
    /// `with`, resolved; defaults of the schema filled in; only `${{ … item … }}` is left as text.
    pub params: Value,
    /// As `params`, less what must not enter the action key.
    pub key_params: Value,
    /// Input port to its sources, in order.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, Vec<Source>>,
    /// Of a command: input ports that are lists, also where one artifact alone comes. A step kind
    /// says so itself.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub lists: BTreeSet<String>,
    /// Output ports (for `run`: as declared by `out`, type `file`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<Port>,
    /// For `run`: output port to its path under `out/`.
    #[serde(skip_serializing_if = "is_default")]
    pub out_paths: BTreeMap<String, String>,
    /// Steps that must finish first, without data.
    #[serde(skip_serializing_if = "is_default")]
    pub needs: Vec<String>,
    /// Fan-out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foreach: Option<Foreach>,
    /// Expression that must be true, else the step is skipped. Text inside `${{ }}`.
    #[serde(skip_serializing_if = "is_default")]
    pub when: Option<String>,
    /// Declared environment.
    #[serde(skip_serializing_if = "is_default")]
    pub env: BTreeMap<String, String>,
    /// Names of secrets (environment variables whose values never reach keys or logs).
    #[serde(skip_serializing_if = "is_default")]
    pub secrets: Vec<String>,
    /// Retry of transient errors.
    #[serde(skip_serializing_if = "is_default")]
    pub retry: Retry,
    /// Time limit of one attempt.
    #[serde(skip_serializing_if = "is_default")]
    pub timeout: Option<std::time::Duration>,
    /// Demand on the machine.
    #[serde(skip_serializing_if = "is_default")]
    pub resources: Resources,
    /// Named pool that bounds how many such steps run at once.
    #[serde(skip_serializing_if = "is_default")]
    pub pool: Option<String>,
    /// Where it runs.
    #[serde(skip_serializing_if = "is_default")]
    pub runner: RunnerKind,
    /// Whether results are reused.
    #[serde(skip_serializing_if = "is_default")]
    pub cache: CachePolicy,
    /// Output port to a path in the project tree.
    #[serde(skip_serializing_if = "is_default")]
    pub publish: BTreeMap<String, String>,
    /// Gates on metrics: expression texts that must be true (`accuracy >= 0.8`).
    #[serde(skip_serializing_if = "is_default")]
    pub expect: Vec<String>,
}

/// What most steps do not say need not be written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Foreach {
    /// What a variable walks.
    #[must_use]
    pub fn list(&self, variable: &str) -> Option<&ForeachList> {
        self.levels.iter().find_map(|l| l.vars.get(variable))
    }

    /// All lists that are walked.
    pub fn lists(&self) -> impl Iterator<Item = &ForeachList> {
        self.levels.iter().flat_map(|level| level.vars.values())
    }

    /// Its items are those of the use of a step definition.
    #[must_use]
    pub fn is_walked(&self) -> bool {
        self.levels.first().is_some_and(|l| l.walker.is_some())
    }
}

impl Level {
    /// The variables of `item` that are known from this level on.
    pub fn variables(&self) -> impl Iterator<Item = &String> {
        let bound = self.bound.iter().map(|(variable, _)| variable);
        self.vars.keys().chain(bound)
    }
}

impl StepNode {
    /// A step that does this and says nothing else: without params, with the outputs of its kind.
    #[must_use]
    pub fn new(name: impl Into<String>, action: Action) -> Self {
        let outputs = match &action {
            Action::Uses(step) => step.outputs(),
            Action::Run(_) => Vec::new(),
        };
        Self {
            name: name.into(),
            action,
            params: json!({}),
            key_params: json!({}),
            outputs,
            ..Self::default()
        }
    }

    /// It works without this input port.
    #[must_use]
    pub fn may_lack(&self, port: &str) -> bool {
        match &self.action {
            Action::Uses(step) => step.inputs().iter().any(|p| p.name == port && p.optional),
            Action::Run(_) => false,
        }
    }
}

/// Where a step runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum RunnerKind {
    /// In flowrun's own process.
    #[default]
    Inline,
    /// In a process of its own.
    Process,
    /// As a job of this one of the pipeline's [`Pipeline::runners`].
    Job(String),
}

impl RunnerKind {
    /// The job system that it is a job of.
    #[must_use]
    pub fn job(&self) -> Option<&str> {
        match self {
            Self::Job(name) => Some(name),
            Self::Inline | Self::Process => None,
        }
    }
}

/// Where an input comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// An output of another step. Of a `foreach` step, or of a list output: all items, in order.
    Output {
        /// The step.
        step: String,
        /// Its output port.
        output: String,
    },
    /// A file or folder of the project.
    File(PathBuf),
    /// The current item's value of a `foreach` variable.
    Item(String),
    /// Of a step that belongs to the same use of a definition, which is walked by `foreach`: its
    /// output for the current item.
    Sibling {
        /// The step.
        step: String,
        /// Its output port.
        output: String,
        /// How many levels of items both walk: at least one.
        levels: usize,
        /// There is a list for each such item.
        many: bool,
    },
}

/// Fan-out: lists that are walked one within the items of another, outermost first. A step by itself
/// has one level; one inside the use of a step definition with a `foreach` has that of the use, those
/// of the uses inside that it stands in, and its own.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Foreach {
    /// The levels; at least one.
    pub levels: Vec<Level>,
}

/// One level of a fan-out: several variables are walked in step (zipped), so their lists must be of
/// equal length.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Level {
    /// Variable to what it walks, for each item of the level around.
    pub vars: BTreeMap<String, ForeachList>,
    /// At most this many items at once, of one item of the level around.
    pub max_parallel: Option<usize>,
    /// The use of a step definition that walks, when it is not the step itself: its other steps
    /// walk the same items under the same labels.
    pub walker: Option<String>,
    /// Further variables of `item`, in order: the params of the definitions that differ from item
    /// to item. Each value is filled in with the variables before it.
    pub bound: Vec<(String, Value)>,
    /// Conditions of the uses around it, and of the steps that walk the same items and without which
    /// there is nothing to read for one, in order: at the first that is false the item is left out.
    pub conditions: Vec<String>,
    /// Variables of `item` that only [`Level::conditions`] name, after those that are bound:
    /// params of other definitions.
    pub handed: Vec<(String, Value)>,
}

/// What a `foreach` variable walks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ForeachList {
    /// Artifacts: outputs (lists are flattened) in the order given.
    Artifacts(Vec<Source>),
    /// Plain values known before the run.
    Values(Vec<Value>),
    /// Plain values that differ from item to item of the levels around: a list with `${{ … item … }}`
    /// in it, or an expression that gives a list.
    PerItem(Value),
}

/// Retry of transient errors with exponential backoff and jitter.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Retry {
    /// Further attempts after the first.
    pub times: u32,
    /// First wait; doubles each time.
    pub backoff: std::time::Duration,
}

/// Demand on the machine. Zero means none declared.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// CPU cores.
    pub cpu: f64,
    /// Bytes of memory.
    pub memory: u64,
    /// GPUs.
    pub gpu: f64,
    /// Others that a job system knows by name.
    pub custom: BTreeMap<String, f64>,
}

/// Whether results are reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CachePolicy {
    /// A result with the same action key is taken.
    #[default]
    Reuse,
    /// The step runs every time.
    Never,
}
