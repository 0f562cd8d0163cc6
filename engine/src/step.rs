//! [`Step`]: the implementation of one step kind, and the context it runs in.
//!
//! This module knows neither YAML nor the cache's layout: a step sees resolved
//! params, input paths, and an empty folder to write its outputs into.

mod cancel;
mod context;
mod error;
mod finished;
mod reporter;

pub use cancel::Cancel;
pub use context::{InputArtifact, StepContext, StepSummary};
pub use error::{StepError, StepErrorKind};
pub use finished::Finished;
pub use reporter::{StepReporter, TraceSpan};

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::estimate::{Estimate, Foresight};

/// The implementation of a step kind: what a pipeline names with `uses:`.
///
/// `run` is synchronous and called on a blocking thread; it may use as many
/// threads as it likes, and must poll [`StepContext::check_cancelled`] in long work.
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
    /// Ends what is fetched for the work that sees this world.
    pub cancel: Cancel,
}

impl World {
    /// The same machine, for work that `cancel` ends.
    #[must_use]
    pub fn until(&self, cancel: &Cancel) -> Self {
        Self {
            cancel: cancel.clone(),
            ..self.clone()
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
