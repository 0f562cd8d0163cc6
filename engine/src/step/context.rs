//! [`StepContext`]: what a step has at hand while it runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use flowrun_cache::{ActionCache, CompletionCache, Digest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Cancel, Finished, StepError, StepReporter, World};

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

/// Everything a running step may use.
pub struct StepContext {
    /// Step id, with its item, for messages.
    pub step: String,
    /// Resolved params (`with`), model and program names replaced by their entries.
    pub params: Value,
    /// The facts that entered the key of this work, as [`observe`](super::Step::observe) gave them
    /// where the run is. Here, perhaps on another machine, the world may look otherwise; the result
    /// is kept under that key all the same, so these decide.
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
    pub finished: Finished,
    /// How many processes may do this step's work at the same time, item by item, this one included;
    /// 1 where all of it is done in flowrun's own. What is allowed to all together (requests in a
    /// minute), each has its part of.
    pub at_once: usize,
    /// Where to report.
    pub reporter: Arc<dyn StepReporter>,
    /// Whether to stop.
    pub cancel: Cancel,
}

impl StepContext {
    /// The params as the step's own type.
    ///
    /// # Errors
    /// [`Invalid`](super::StepErrorKind::Invalid) when they do not fit, with the path of the field.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, StepError> {
        serde_json::from_value(self.params.clone())
            .map_err(|e| StepError::invalid(format!("params of `{}`: {e}", self.step)))
    }
    /// The one artifact of a required port.
    ///
    /// # Errors
    /// [`Invalid`](super::StepErrorKind::Invalid) when the port has none.
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
    /// [`Cancelled`](super::StepErrorKind::Cancelled).
    pub fn check_cancelled(&self) -> Result<(), StepError> {
        if self.cancel.is_cancelled() {
            Err(StepError::cancelled())
        } else {
            Ok(())
        }
    }
}
