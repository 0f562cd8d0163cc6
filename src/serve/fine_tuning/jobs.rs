//! [`Jobs`]: what was asked for, how far it is, and what came of it; on disk after every change.
//! While another server trains them, they are read anew whenever somebody asks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;
use flowrun_engine::step::Cancel;
use flowrun_steps::finetune::tuning::Hyperparameters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::serve::kept::{is_id, new_id, now, read_all, read_one, write};
use crate::serve::problem::Problem;

const PREFIX: &str = "ftjob-";
/// Characters of a suffix, as at OpenAI.
const SUFFIX: usize = 64;
/// Metadata of a job, as at OpenAI.
const METADATA: usize = 16;
/// Epochs that one job may take.
const EPOCHS: usize = 100;
/// Rows of a batch at most.
const BATCH: usize = 1024;
/// The highest rank, as that of the adapters themselves.
const RANK: usize = 1024;
/// Times that a job is begun at most before its first step is told: one that ends the server
/// each time is not begun for ever.
const STARTS: u32 = 3;

/// What a caller asks for. Fields of OpenAI's that cannot be honoured are refused.
#[derive(Debug, Deserialize, JsonSchema)]
pub(in crate::serve) struct Order {
    model: String,
    pub(super) training_file: String,
    #[serde(default)]
    validation_file: Option<Value>,
    #[serde(default)]
    integrations: Option<Vec<Value>>,
    #[serde(default)]
    suffix: Option<String>,
    #[serde(default)]
    seed: Option<u64>,
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(default)]
    method: Option<Method>,
    /// The old place of them.
    #[serde(default)]
    hyperparameters: Option<Value>,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct Method {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    supervised: Option<Supervised>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
struct Supervised {
    #[serde(default)]
    hyperparameters: Option<Value>,
}

impl Order {
    fn hyperparameters(&self) -> Result<Hyperparameters, Problem> {
        let method = self.method.as_ref();
        if let Some(method) = method.filter(|method| method.kind != "supervised") {
            return Err(Problem::unsupported(&format!(
                "the method `{}`",
                method.kind
            )));
        }
        let given = method.and_then(|method| method.supervised.as_ref());
        let given = given.and_then(|supervised| supervised.hyperparameters.clone());
        let mut given = given
            .or_else(|| self.hyperparameters.clone())
            .unwrap_or(json!({}));
        if let Some(fields) = given.as_object_mut() {
            // What is left to the server.
            fields.retain(|_, value| value != "auto" && !value.is_null());
        }
        let bad = |text: String| Problem::bad(text).of("hyperparameters");
        let how: Hyperparameters =
            serde_json::from_value(given).map_err(|e| bad(format!("`hyperparameters`: {e}")))?;
        let rate = how.learning_rate * how.learning_rate_multiplier;
        let fits = (1..=EPOCHS).contains(&how.n_epochs)
            && (1..=BATCH).contains(&how.batch_size)
            && (1..=RANK).contains(&how.lora_rank)
            && (0.0..1.0).contains(&how.lora_dropout)
            && rate.is_finite()
            && rate > 0.0;
        if !fits {
            return Err(bad(format!(
                "`hyperparameters`: n_epochs is 1 to {EPOCHS}, batch_size 1 to {BATCH}, \
                 lora_rank 1 to {RANK}, the learning rate is above 0, lora_dropout below 1"
            )));
        }
        Ok(how)
    }

    fn check(&self, base_id: &str) -> Result<(), Problem> {
        if self.model != base_id {
            let text = format!("`{}` cannot be trained here, only `{base_id}`", self.model);
            return Err(Problem::bad(text).of("model"));
        }
        if self
            .validation_file
            .as_ref()
            .is_some_and(|file| !file.is_null())
        {
            return Err(Problem::unsupported("`validation_file`"));
        }
        if self
            .integrations
            .as_ref()
            .is_some_and(|all| !all.is_empty())
        {
            return Err(Problem::unsupported("`integrations`"));
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let suffix = self.suffix.as_deref().unwrap_or("ok");
        if suffix.is_empty() || suffix.len() > SUFFIX || !suffix.chars().all(word) {
            let text = format!("`suffix` has 1 to {SUFFIX} letters, digits, `-` or `_`");
            return Err(Problem::bad(text).of("suffix"));
        }
        if self
            .metadata
            .as_ref()
            .is_some_and(|data| data.len() > METADATA)
        {
            return Err(Problem::bad(format!("at most {METADATA} metadata")).of("metadata"));
        }
        Ok(())
    }
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl Status {
    fn has_ended(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// A job with all that is known of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) created_at: u64,
    pub(super) finished_at: Option<u64>,
    pub(super) status: Status,
    pub(super) model: String,
    pub(super) training_file: String,
    pub(super) hyperparameters: Hyperparameters,
    pub(super) seed: u64,
    pub(super) suffix: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) fine_tuned_model: Option<String>,
    pub(super) trained_tokens: Option<usize>,
    pub(super) error: Option<String>,
    /// The oldest first.
    pub(super) events: Vec<Value>,
    /// The oldest first.
    pub(super) checkpoints: Vec<Value>,
    /// How often it was begun since a step was told.
    #[serde(default)]
    pub(super) starts: u32,
}

impl Job {
    /// OpenAI's job object.
    pub(super) fn object(&self) -> Value {
        let how = json!(self.hyperparameters);
        let error = self.error.as_ref();
        json!({
            "object": "fine_tuning.job", "id": self.id, "created_at": self.created_at,
            "finished_at": self.finished_at, "status": self.status, "model": self.model,
            "fine_tuned_model": self.fine_tuned_model, "organization_id": "flowrun",
            "training_file": self.training_file, "validation_file": null, "result_files": [],
            "trained_tokens": self.trained_tokens, "seed": self.seed, "metadata": self.metadata,
            "error": error.map(|text| json!({"code": "failed", "message": text, "param": null})),
            "hyperparameters": how, "integrations": [], "estimated_finish": null,
            "method": {"type": "supervised", "supervised": {"hyperparameters": how}},
        })
    }

    /// Adds an event.
    pub(super) fn tell(&mut self, level: &str, message: &str, data: Option<Value>) {
        let kind = if data.is_some() { "metrics" } else { "message" };
        self.events.push(json!({
            "object": "fine_tuning.job.event", "id": format!("ftevent-{}-{}", self.id, self.events.len()),
            "created_at": now(), "level": level, "message": message, "type": kind, "data": data,
        }));
    }

    /// Ends it, unless it has ended.
    pub(super) fn end(&mut self, status: Status, message: &str) {
        if self.status.has_ended() {
            return;
        }
        self.status = status;
        self.finished_at = Some(now());
        let level = if status == Status::Failed {
            "error"
        } else {
            "info"
        };
        self.tell(level, message, None);
    }
}

/// All jobs of a folder.
pub(super) struct Jobs {
    folder: PathBuf,
    base_id: String,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<String, Job>,
    /// The job that is trained, and how to stop it.
    running: Option<(String, Cancel)>,
    /// Whether this server trains them, so that no other one changes them.
    mine: bool,
}

impl Jobs {
    /// Reads the jobs of a folder, which another server may be training.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn open(folder: PathBuf, base_id: &str) -> Result<Arc<Self>, Failure> {
        let state = State {
            jobs: read(&folder)?,
            ..State::default()
        };
        Ok(Arc::new(Self {
            folder,
            base_id: base_id.to_owned(),
            state: Mutex::new(state),
            arrived: Condvar::new(),
        }))
    }

    /// From now on this server trains them: its turn has come, and no other one changes them. Those
    /// that were under way wait again.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn take_over(&self) -> Result<(), Failure> {
        let mut state = self.state();
        state.jobs = read(&self.folder)?;
        state.mine = true;
        for job in state.jobs.values_mut() {
            if job.status == Status::Running && job.starts >= STARTS {
                let text = format!("the server ended {STARTS} times when it began this job");
                job.error = Some(text.clone());
                job.end(Status::Failed, &text);
            } else if job.status == Status::Running {
                job.status = Status::Queued;
                job.tell("info", "the server was started again", None);
            }
        }
        Ok(())
    }

    /// Whether this server trains them.
    pub(super) fn is_mine(&self) -> bool {
        self.state().mine
    }

    /// Takes an order on.
    pub(super) fn add(&self, order: Order) -> Result<Job, Problem> {
        order.check(&self.base_id)?;
        let mut job = Job {
            id: new_id(PREFIX),
            created_at: now(),
            finished_at: None,
            status: Status::Queued,
            hyperparameters: order.hyperparameters()?,
            model: order.model,
            training_file: order.training_file,
            seed: order.seed.unwrap_or(0),
            suffix: order.suffix,
            metadata: order.metadata.unwrap_or_default(),
            fine_tuned_model: None,
            trained_tokens: None,
            error: None,
            events: Vec::new(),
            checkpoints: Vec::new(),
            starts: 0,
        };
        job.tell("info", "the job waits for its turn", None);
        let mut state = self.fresh();
        self.keep(&job)
            .map_err(|e| Problem::internal(e.to_string()))?;
        state.jobs.insert(job.id.clone(), job.clone());
        self.arrived.notify_all();
        Ok(job)
    }

    pub(super) fn get(&self, id: &str) -> Result<Job, Problem> {
        let missing = || {
            let text = format!("there is no job `{id}` here");
            Problem::new(StatusCode::NOT_FOUND, text)
        };
        if !is_id(id, PREFIX) {
            return Err(missing());
        }
        let mut state = self.fresh();
        if let Some(job) = state.jobs.get(id) {
            return Ok(job.clone());
        }
        // One that waits for its turn may have taken the order.
        let job: Job = read_one(&self.record(id)).ok_or_else(missing)?;
        state.jobs.insert(job.id.clone(), job.clone());
        self.arrived.notify_all();
        Ok(job)
    }

    /// All of them, the newest first.
    pub(super) fn list(&self) -> Vec<Job> {
        let mut all: Vec<Job> = self.fresh().jobs.values().cloned().collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    /// Asks a job to end. One that has ended stays as it is.
    pub(super) fn cancel(&self, id: &str) -> Result<Job, Problem> {
        self.get(id)?;
        let mut state = self.state();
        if !state.mine {
            let text = "this server is not the one that trains the jobs of this folder: ask that \
                        one, or ask again when it has ended";
            return Err(Problem::new(StatusCode::CONFLICT, text).code("not_in_charge"));
        }
        match &state.running {
            Some((running, cancel)) if running == id => cancel.cancel(),
            _ => self.change_in(&mut state, id, |job| {
                job.end(Status::Cancelled, "the job was cancelled");
            }),
        }
        drop(state);
        self.get(id)
    }

    /// The next job to train, when there is one; it is running from then on.
    pub(super) fn next(&self) -> (Job, Cancel) {
        let mut state = self.state();
        loop {
            let waiting = state
                .jobs
                .values()
                .filter(|job| job.status == Status::Queued);
            let first = waiting.min_by_key(|job| (job.created_at, job.id.clone()));
            if let Some(mut job) = first.cloned() {
                let cancel = Cancel::default();
                state.running = Some((job.id.clone(), cancel.clone()));
                self.change_in(&mut state, &job.id.clone(), |kept| {
                    kept.status = Status::Running;
                    kept.starts += 1;
                    kept.tell("info", "training has begun", None);
                    job.clone_from(kept);
                });
                return (job, cancel);
            }
            let woken = self.arrived.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing is being trained.
    pub(super) fn idle(&self) {
        self.state().running = None;
    }

    /// Changes a job, in memory and on disk.
    pub(super) fn change(&self, id: &str, change: impl FnOnce(&mut Job)) {
        self.change_in(&mut self.state(), id, change);
    }

    fn change_in(&self, state: &mut State, id: &str, change: impl FnOnce(&mut Job)) {
        let Some(job) = state.jobs.get_mut(id) else {
            return;
        };
        change(job);
        if let Err(error) = self.keep(job) {
            tracing::warn!("the job {id} cannot be written: {error}");
        }
    }

    /// The folder that a job's training works in.
    pub(super) fn work(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    fn keep(&self, job: &Job) -> std::io::Result<()> {
        let bytes = serde_json::to_vec(job)?;
        write(&self.record(&job.id), &bytes)
    }

    fn record(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is by now, whoever wrote it. Reads the folder unless this server has its turn.
    fn fresh(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if !state.mine {
            match read(&self.folder) {
                Ok(jobs) => state.jobs = jobs,
                Err(failure) => tracing::warn!("{failure}"),
            }
        }
        state
    }
}

fn read(folder: &Path) -> Result<BTreeMap<String, Job>, Failure> {
    let all = read_all::<Job>(folder)?.into_iter();
    Ok(all.map(|job| (job.id.clone(), job)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_that_waits_for_its_turn_leaves_jobs_alone_until_then() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Jobs::open(dir.path().to_owned(), "tiny").unwrap();
        let order = || -> Order {
            let order = json!({"model": "tiny", "training_file": "file-1"});
            serde_json::from_value(order).unwrap()
        };
        let first = open();
        first.take_over().unwrap();
        let ended = first.add(order()).unwrap().id;
        let cut_off = first.add(order()).unwrap().id;
        for id in [&ended, &cut_off] {
            first.change(id, |job| job.status = Status::Running);
        }
        let second = open();
        let status = |id: &str| second.get(id).unwrap().status;
        assert_eq!(status(&ended), Status::Running);
        let refused = second.cancel(&ended).unwrap_err();
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        let own = second.add(order()).unwrap().id;
        assert_eq!(first.get(&own).unwrap().status, Status::Queued);
        first.change(&ended, |job| job.end(Status::Succeeded, "the job is done"));
        assert_eq!(status(&ended), Status::Succeeded);
        drop(first);
        second.take_over().unwrap();
        assert_eq!(status(&ended), Status::Succeeded);
        assert_eq!(status(&cut_off), Status::Queued);
        assert_eq!(second.cancel(&own).unwrap().status, Status::Cancelled);
    }
}
