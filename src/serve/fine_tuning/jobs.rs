//! [`Jobs`]: what was asked for, how far it is, and what came of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use flowrun_engine::step::Cancel;
use flowrun_steps::finetune::tuning::Hyperparameters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::serve::kept::{new_id, now};
use crate::serve::orders::{Order, Orders, metadata};
use crate::serve::problem::Problem;

const PREFIX: &str = "ftjob-";
/// Characters of a suffix, as at OpenAI.
const SUFFIX: usize = 64;
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
pub(in crate::serve) struct JobOrder {
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

impl JobOrder {
    /// The job that is ordered, of a server whose base model has this id.
    pub(super) fn job(self, base_id: &str) -> Result<Job, Problem> {
        self.check(base_id)?;
        let mut job = Job {
            id: new_id(PREFIX),
            created_at: now(),
            finished_at: None,
            status: Status::Queued,
            hyperparameters: self.hyperparameters()?,
            model: self.model,
            training_file: self.training_file,
            seed: self.seed.unwrap_or(0),
            suffix: self.suffix,
            metadata: metadata(self.metadata)?,
            fine_tuned_model: None,
            trained_tokens: None,
            error: None,
            events: Vec::new(),
            checkpoints: Vec::new(),
            starts: 0,
        };
        job.tell("info", "the job waits for its turn", None);
        Ok(job)
    }

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

impl Order for Job {
    const NAME: &'static str = "job";
    const NAMES: &'static str = "jobs";
    const PREFIX: &'static str = PREFIX;
    const TOO_MANY: &'static str = "too_many_jobs";
    // Each has its events in memory.
    const MOST: usize = 200;
    type Stop = Cancel;

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
        self.status = Status::Running;
        self.starts += 1;
        self.tell("info", "training has begun", None);
    }

    fn resume(&mut self) {
        if self.status != Status::Running {
            return;
        }
        if self.starts >= STARTS {
            let text = format!("the server ended {STARTS} times when it began this job");
            self.error = Some(text.clone());
            self.end(Status::Failed, &text);
            return;
        }
        self.status = Status::Queued;
        self.tell("info", "the server was started again", None);
    }

    fn cancel(&mut self, under_way: bool) {
        // One that is trained ends when its training has.
        if !under_way {
            self.end(Status::Cancelled, "the job was cancelled");
        }
    }

    fn stop(stop: &Self::Stop) {
        stop.cancel();
    }

    /// OpenAI's job object.
    fn object(&self) -> Value {
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
}

/// All jobs of a folder.
pub(super) type Jobs = Orders<Job>;

impl Jobs {
    /// The folder that a job's training works in.
    pub(super) fn work(&self, id: &str) -> PathBuf {
        self.folder().join(id)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    fn job() -> Job {
        let order = json!({"model": "tiny", "training_file": "file-1"});
        let order: JobOrder = serde_json::from_value(order).unwrap();
        order.job("tiny").unwrap()
    }

    fn add(jobs: &Jobs) -> String {
        jobs.add(job(), |_| Ok(())).unwrap().id
    }

    #[test]
    fn one_that_waits_for_its_turn_leaves_jobs_alone_until_then() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Jobs::open(dir.path().to_owned()).unwrap();
        let first = open();
        first.take_over().unwrap();
        let (ended, cut_off) = (add(&first), add(&first));
        for id in [&ended, &cut_off] {
            first.change(id, |job| job.status = Status::Running);
        }
        let second = open();
        let status = |id: &str| second.get(id).unwrap().status;
        assert_eq!(status(&ended), Status::Running);
        let refused = second.cancel(&ended).unwrap_err();
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        let own = add(&second);
        assert_eq!(first.get(&own).unwrap().status, Status::Queued);
        first.change(&ended, |job| job.end(Status::Succeeded, "the job is done"));
        assert_eq!(status(&ended), Status::Succeeded);
        drop(first);
        second.take_over().unwrap();
        assert_eq!(status(&ended), Status::Succeeded);
        assert_eq!(status(&cut_off), Status::Queued);
        assert_eq!(second.cancel(&own).unwrap().status, Status::Cancelled);
    }

    #[test]
    fn the_oldest_that_have_ended_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = Vec::new();
        for at in 0..Job::MOST {
            let mut job = job();
            job.created_at = at as u64;
            job.end(Status::Succeeded, "the job is done");
            let record = dir.path().join(format!("{}.json", job.id));
            std::fs::write(record, serde_json::to_vec(&job).unwrap()).unwrap();
            ids.push(job.id);
        }
        let jobs = Jobs::open(dir.path().to_owned()).unwrap();
        jobs.take_over().unwrap();
        assert_eq!(jobs.objects().len(), Job::MOST);
        let new = add(&jobs);
        assert_eq!(jobs.objects().len(), Job::MOST);
        let gone = jobs.get(&ids[0]).unwrap_err();
        assert_eq!(gone.status(), StatusCode::NOT_FOUND);
        assert!(jobs.get(&ids[1]).is_ok());
        assert_eq!(jobs.next().0.id, new);
    }

    #[test]
    fn one_that_ends_its_server_each_time_is_not_begun_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Jobs::open(dir.path().to_owned()).unwrap();
        let id = add(&open());
        // An end in good order is no fault of the job's.
        for _ in 0..=STARTS {
            let jobs = open();
            jobs.take_over().unwrap();
            assert_eq!(jobs.next().0.starts, 1);
            jobs.put_down(|job| job.starts = 0);
        }
        for starts in 1..=STARTS {
            let jobs = open();
            jobs.take_over().unwrap();
            assert_eq!(jobs.next().0.starts, starts);
        }
        let jobs = open();
        jobs.take_over().unwrap();
        let job = jobs.get(&id).unwrap();
        assert_eq!(job.status, Status::Failed);
        assert!(job.error.unwrap().contains("ended 3 times"));
    }
}
