//! Training by a server that speaks OpenAI's fine-tuning API: the chats become a file there, the
//! training a job, and its checkpoints are models that the server keeps.
//!
//! Source of the shapes: OpenAI's API reference, *Fine-tuning*. A job is created once: its id is
//! kept, and a job whose creation was not heard of is found by its metadata.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flowrun_cache::Digest;
use flowrun_engine::step::{StepContext, StepError, StepErrorKind, StepOutcome};
use flowrun_lm::client::{Api, ApiError, OpenAiSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Params;
use crate::checkpoint::Checkpoint;
use crate::format_version::FormatVersion;
use crate::models::{Host, ModelSpec, remote};
use crate::report::LossPoint;
use crate::rows::{read_json, write_json};

/// Where the job is remembered, in the step's resume folder.
const STATE: &str = "job.json";
/// The metadata that tells one training from another.
const KEY: &str = "flowrun";
/// Things that one answer lists.
const PAGE: &str = "100";
/// Failed looks at a job in a row that are borne; each is itself several tries.
const BORNE: u32 = 5;

/// A server that trains.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OpenAiBackend {
    /// A word in the names of the models that come of it.
    suffix: Option<String>,
    /// More hyperparameters of the job, such as `learning_rate_multiplier`, besides the step's
    /// `epochs` and `batch_size`. The step's `learning_rate`, `lora` and what else the API has no field for
    /// are not sent.
    hyperparameters: BTreeMap<String, Value>,
    /// More fields of the job, for servers that take more than OpenAI's.
    job: BTreeMap<String, Value>,
    /// Seconds between two looks at the job.
    #[schemars(range(min = 0.1))]
    poll_s: f64,
    /// Whether the job goes on when the run is stopped; the next run takes it up. Otherwise it is
    /// cancelled. After a kill it goes on in any case.
    keep_when_stopped: bool,
}

impl Default for OpenAiBackend {
    fn default() -> Self {
        Self {
            suffix: None,
            hyperparameters: BTreeMap::new(),
            job: BTreeMap::new(),
            poll_s: 10.0,
            keep_when_stopped: false,
        }
    }
}

/// What is remembered of a training.
#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    file: Option<String>,
    job: Option<String>,
    /// Of this job.
    #[serde(default)]
    seen: Seen,
}

/// A job, as the server tells of it. Servers differ in what they leave out.
#[derive(Debug, Deserialize)]
struct Job {
    id: String,
    status: String,
    #[serde(default)]
    fine_tuned_model: Option<String>,
    #[serde(default)]
    error: Option<JobError>,
    #[serde(default)]
    trained_tokens: Option<u64>,
    #[serde(default)]
    metadata: Option<BTreeMap<String, Value>>,
}

#[derive(Debug, Deserialize)]
struct JobError {
    #[serde(default)]
    message: Option<String>,
}

impl Job {
    fn has_failed(&self) -> bool {
        matches!(self.status.as_str(), "failed" | "cancelled")
    }

    fn has_ended(&self) -> bool {
        self.has_failed() || self.status == "succeeded"
    }
}

#[derive(Debug, Deserialize)]
struct Page<T> {
    data: Vec<T>,
    #[serde(default)]
    has_more: bool,
}

#[derive(Debug, Clone, Deserialize)]
struct EventRow {
    id: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    data: Option<Metrics>,
}

/// The numbers of an event or of a checkpoint.
#[derive(Debug, Clone, Default, Deserialize)]
struct Metrics {
    #[serde(default)]
    step: Option<u64>,
    #[serde(default)]
    total_steps: Option<u64>,
    #[serde(default)]
    train_loss: Option<f64>,
}

#[derive(Debug, Clone, Deserialize)]
struct CheckpointRow {
    id: String,
    fine_tuned_model_checkpoint: String,
    step_number: u64,
}

pub(super) fn train(
    ctx: &StepContext,
    params: &Params,
    backend: &OpenAiBackend,
) -> Result<StepOutcome, StepError> {
    let ModelSpec::OpenAi(model) = &params.model else {
        return Err(StepError::invalid(format!(
            "`{}` is trained by no server: `backend: openai` needs a model with `provider: openai`",
            params.model.name()
        )));
    };
    params.plain_only(ctx, "OpenAI's fine-tuning API")?;
    if !model.chat_template_kwargs.is_empty() {
        ctx.reporter.warning(
            "OpenAI's fine-tuning API has no place for `chat_template_kwargs`: the server trains on \
             the prompts that its chat template makes without them",
        );
    }
    for own in ["n_epochs", "batch_size"] {
        if backend.hyperparameters.contains_key(own) {
            return Err(StepError::invalid(format!(
                "`backend.openai.hyperparameters` has `{own}`, which the step's own params say"
            ))
            .help("set `epochs` and `batch_size` of the step"));
        }
    }
    let training = Training {
        ctx,
        backend,
        model,
        api: remote::api(model, &Host::from(ctx))?,
        state: ctx.resume_dir()?.join(STATE),
        key: key(ctx, params)?,
    };
    let (job, mut state) = training.job(params)?;
    let ended = training.follow(&job, &mut state)?;
    training.outcome(params, &ended, &state.seen)
}

/// What makes two trainings the same.
fn key(ctx: &StepContext, params: &Params) -> Result<String, StepError> {
    let params = serde_json::to_string(params).map_err(|e| StepError::failed(e.to_string()))?;
    let chats = ctx.input("messages")?.digest;
    Ok(Digest::of_bytes(format!("{chats} {params}").as_bytes()).to_hex())
}

struct Training<'a> {
    ctx: &'a StepContext,
    backend: &'a OpenAiBackend,
    model: &'a OpenAiSpec,
    api: Api,
    state: PathBuf,
    key: String,
}

/// What was heard of a job. Servers keep events for a while only: it outlives a kill.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Seen {
    events: BTreeSet<String>,
    losses: BTreeMap<u64, f64>,
    total_steps: Option<u64>,
}

impl Seen {
    /// Takes a page of events, the newest first, into `fresh`; whether older ones are yet to be
    /// heard. One that was heard before ends it, and so does a server that lists the same again.
    fn take(&self, page: Page<EventRow>, fresh: &mut Vec<EventRow>) -> bool {
        let listed = page.data.len();
        let before = fresh.len();
        for event in page.data {
            let is_known = |other: &EventRow| other.id == event.id;
            if !self.events.contains(&event.id) && !fresh.iter().any(is_known) {
                fresh.push(event);
            }
        }
        page.has_more && listed > 0 && fresh.len() - before == listed
    }

    /// Steps of the whole training, as far as they were told.
    fn total_steps(&self) -> Option<u64> {
        self.total_steps
            .max(self.losses.keys().next_back().copied())
    }
}

impl Training<'_> {
    /// The id of the job, of an earlier attempt or a new one, and what is known of it.
    fn job(&self, params: &Params) -> Result<(String, State), StepError> {
        let mut state: State = match self.state.exists() {
            true => read_json(&self.state)?,
            false => State::default(),
        };
        if let Some(job) = &state.job {
            match self.look(job) {
                Ok(found) if !found.has_failed() => {
                    self.ctx
                        .reporter
                        .log(&format!("going on with the job {job}"));
                    return Ok((job.clone(), state));
                }
                Ok(_) => {}
                Err(error) if error.status() == Some(404) => {}
                Err(error) => return Err(failed(error)),
            }
            state = State {
                file: state.file,
                ..State::default()
            };
        }
        if let Some(job) = self.unheard_of()? {
            self.ctx.reporter.log(&format!(
                "going on with the job {job}, found by its metadata"
            ));
            state.job = Some(job.clone());
            self.remember(&state)?;
            return Ok((job, state));
        }
        // One of an attempt that failed may be gone.
        let file = self.upload(&self.ctx.input("messages")?.path)?;
        state.file = Some(file.clone());
        self.remember(&state)?;
        let job = self.create(params, &file)?;
        self.ctx.reporter.log(&format!("the job is {job}"));
        state.job = Some(job.clone());
        self.remember(&state)?;
        Ok((job, state))
    }

    /// A kill leaves the old state or the new one.
    fn remember(&self, state: &State) -> Result<(), StepError> {
        let new = self.state.with_extension("new");
        write_json(&new, state)?;
        std::fs::rename(&new, &self.state).map_err(|e| StepError::io(&self.state, &e))
    }

    fn upload(&self, chats: &Path) -> Result<String, StepError> {
        // Its name says what it holds: servers look at the ending.
        let named = self.ctx.work_dir.join("train.jsonl");
        std::fs::copy(chats, &named).map_err(|e| StepError::io(chats, &e))?;
        let fields = [("purpose", "fine-tune")];
        let file = self
            .api
            .upload(&["files"], &named, &fields)
            .map_err(failed)?;
        let id = file["id"].as_str().map(str::to_owned);
        id.ok_or_else(|| StepError::failed(format!("the server gave the file no id: {file}")))
    }

    fn create(&self, params: &Params, file: &str) -> Result<String, StepError> {
        let mut hyperparameters = json!({
            "n_epochs": params.epochs,
            "batch_size": params.batch_size,
        });
        merge(&mut hyperparameters, &self.backend.hyperparameters);
        let mut body = json!({
            "model": self.model.model,
            "training_file": file,
            "seed": params.seed,
            "metadata": { KEY: self.key },
            "method": { "type": "supervised", "supervised": { "hyperparameters": hyperparameters } },
        });
        if let Some(suffix) = &self.backend.suffix {
            body["suffix"] = json!(suffix);
        }
        merge(&mut body, &self.backend.job);
        let made = self.api.post(&["fine_tuning", "jobs"], &body);
        let made: Job = read(made.map_err(|error| match error.status() {
            Some(404 | 405) => no_such_api(error),
            _ => failed(error),
        })?)?;
        Ok(made.id)
    }

    /// A job of this training whose creation was not heard of. Servers without lists have none.
    fn unheard_of(&self) -> Result<Option<String>, StepError> {
        let listed = self.api.get(&["fine_tuning", "jobs"], &[("limit", PAGE)]);
        let page: Page<Job> = match listed {
            Ok(value) => read(value)?,
            Err(error) if matches!(error.status(), Some(404 | 405)) => {
                return Err(no_such_api(error));
            }
            Err(error) => return Err(failed(error)),
        };
        let own = |job: &Job| {
            let key = job.metadata.as_ref().and_then(|data| data.get(KEY));
            key.and_then(Value::as_str) == Some(&self.key) && !job.has_failed()
        };
        Ok(page.data.into_iter().find(own).map(|job| job.id))
    }

    fn look(&self, job: &str) -> Result<Job, ApiError> {
        let value = self.api.get(&["fine_tuning", "jobs", job], &[])?;
        serde_json::from_value(value).map_err(|e| ApiError::Unavailable {
            url: format!("the job {job}"),
            why: e.to_string(),
        })
    }

    /// Waits for the job's end.
    fn follow(&self, id: &str, state: &mut State) -> Result<Job, StepError> {
        let pause = Duration::from_secs_f64(self.backend.poll_s.clamp(0.1, 3600.0));
        let mut failures = 0;
        loop {
            match self.look(id) {
                Ok(job) => {
                    failures = 0;
                    let heard = self.hear(id, state)?;
                    if job.has_ended() {
                        if !heard {
                            let text = format!(
                                "the events of the job {id} cannot be read: the curve of its loss lacks steps"
                            );
                            self.ctx.reporter.warning(&text);
                        }
                        return succeeded(job);
                    }
                }
                Err(error) if error.may_pass() && failures < BORNE => failures += 1,
                Err(ApiError::Cancelled) => return Err(self.stopped(id)),
                Err(error) => return Err(failed(error)),
            }
            if self.api.pause(pause).is_err() {
                return Err(self.stopped(id));
            }
        }
    }

    /// Tells of what happened since; whether all of it could be read. Events are for people:
    /// without them a training is as good.
    fn hear(&self, id: &str, state: &mut State) -> Result<bool, StepError> {
        let seen = &mut state.seen;
        let mut fresh: Vec<EventRow> = Vec::new();
        loop {
            let after = fresh.last().map(|event| event.id.clone());
            let mut query = vec![("limit", PAGE)];
            query.extend(after.as_deref().map(|after| ("after", after)));
            let page = self.api.get(&["fine_tuning", "jobs", id, "events"], &query);
            let Ok(page) = page.map_err(failed).and_then(read::<Page<EventRow>>) else {
                // With a gap, the next look would not go back beyond what was heard now.
                return Ok(false);
            };
            if !seen.take(page, &mut fresh) {
                break;
            }
        }
        if fresh.is_empty() {
            return Ok(true);
        }
        for event in fresh.into_iter().rev() {
            seen.events.insert(event.id);
            self.ctx.reporter.log(&event.message);
            let Some(Metrics {
                step: Some(step),
                total_steps,
                train_loss,
            }) = event.data
            else {
                continue;
            };
            seen.total_steps = total_steps.or(seen.total_steps);
            let text = train_loss.map_or_else(String::new, |loss| format!("loss {loss:.4}"));
            if let Some(loss) = train_loss {
                seen.losses.insert(step, loss);
            }
            let total = seen.total_steps.unwrap_or(0);
            self.ctx.reporter.progress(step, total, "steps", &text);
        }
        self.remember(state)?;
        Ok(true)
    }

    /// The run was stopped.
    fn stopped(&self, id: &str) -> StepError {
        if self.backend.keep_when_stopped {
            let text = format!("the job {id} goes on; the next run takes it up");
            self.ctx.reporter.warning(&text);
            return StepError::cancelled();
        }
        // The run's own flag is set, and this call is to be sent all the same.
        let env = &self.ctx.world.env;
        let key = self.model.api_key_env.as_ref();
        let key = key.and_then(|name| env.get(name)).cloned();
        let cancelled = Api::new(self.model, key, Arc::new(|| false))
            .and_then(|api| api.post(&["fine_tuning", "jobs", id, "cancel"], &json!({})));
        let text = match cancelled {
            Ok(_) => format!("the job {id} was cancelled"),
            Err(error) => format!("the job {id} may go on at the server: {error}"),
        };
        self.ctx.reporter.warning(&text);
        StepError::cancelled()
    }

    fn outcome(&self, params: &Params, job: &Job, seen: &Seen) -> Result<StepOutcome, StepError> {
        let rows = self.checkpoints(&job.id)?;
        let models = models(job, rows, params.epochs, seen.total_steps())?;
        Checkpoint::base().save(&self.ctx.output("base"))?;
        let mut labels = Vec::new();
        for model in models {
            let checkpoint = Checkpoint {
                version: FormatVersion,
                name: Checkpoint::name_of(model.epoch, model.step),
                epoch: model.epoch,
                step: model.step,
                adapter: None,
                hosted: Some(model.id),
                lineage: None,
            };
            let to = self.ctx.output_item("checkpoints", &checkpoint.name)?;
            checkpoint.save(&to)?;
            labels.push(checkpoint.name);
        }
        if labels.len() < params.epochs {
            self.ctx.reporter.warning(&format!(
                "the server kept {} checkpoints of {} epochs",
                labels.len(),
                params.epochs
            ));
        }
        let all = seen.total_steps().unwrap_or(0).max(1);
        let losses: Vec<LossPoint> = (seen.losses.iter())
            .map(|(step, loss)| LossPoint {
                step: *step,
                epoch: u32::try_from((step.saturating_sub(1)) * params.epochs as u64 / all)
                    .unwrap_or(u32::MAX),
                loss: *loss,
            })
            .collect();
        write_json(&self.ctx.output("loss"), &losses)?;
        let last = losses.last();
        let mut outcome = StepOutcome::default()
            .list("checkpoints", labels)
            .metric("job", job.id.as_str())
            .metric("loss", last.map_or(Value::Null, |point| point.loss.into()));
        if let Some(tokens) = job.trained_tokens {
            outcome = outcome.metric("tokens", tokens);
        }
        Ok(outcome)
    }

    fn checkpoints(&self, id: &str) -> Result<Vec<CheckpointRow>, StepError> {
        let mut all: Vec<CheckpointRow> = Vec::new();
        loop {
            let after = all.last().map(|row| row.id.clone());
            let mut query = vec![("limit", PAGE)];
            query.extend(after.as_deref().map(|after| ("after", after)));
            let page = self
                .api
                .get(&["fine_tuning", "jobs", id, "checkpoints"], &query);
            let page: Page<CheckpointRow> = match page {
                Ok(value) => read(value)?,
                // Some servers keep only the last model.
                Err(error) if error.status() == Some(404) => return Ok(all),
                Err(error) => return Err(failed(error)),
            };
            let ends = page.data.is_empty() || !page.has_more;
            all.extend(page.data);
            if ends {
                return Ok(all);
            }
        }
    }
}

/// A model that came of a training.
#[derive(Debug, PartialEq, Eq)]
struct Model {
    id: String,
    epoch: usize,
    step: usize,
}

/// The checkpoints and the last model, by step. Where the last model is listed too, it is one.
fn models(
    job: &Job,
    mut rows: Vec<CheckpointRow>,
    epochs: usize,
    total_steps: Option<u64>,
) -> Result<Vec<Model>, StepError> {
    let last = job.fine_tuned_model.clone();
    let last = last.ok_or_else(|| {
        StepError::failed(format!(
            "the job {} succeeded without naming its model",
            job.id
        ))
    })?;
    rows.sort_by_key(|row| row.step_number);
    let listed = rows.last().map_or(0, |row| row.step_number);
    let total = total_steps.unwrap_or(listed).max(listed).max(1);
    if listed == total {
        // Its own name outlives that of a checkpoint.
        rows.pop();
    }
    let epoch = |step: u64| {
        let epoch = (step as f64 * epochs as f64 / total as f64).round() as usize;
        epoch.max(1)
    };
    let mut models: Vec<Model> = (rows.into_iter())
        .map(|row| Model {
            id: row.fine_tuned_model_checkpoint,
            epoch: epoch(row.step_number),
            step: row.step_number as usize,
        })
        .collect();
    models.push(Model {
        id: last,
        epoch: epochs,
        step: total as usize,
    });
    Ok(models)
}

fn succeeded(job: Job) -> Result<Job, StepError> {
    if !job.has_failed() {
        return Ok(job);
    }
    let why = job.error.and_then(|error| error.message);
    let why = why.unwrap_or_else(|| "the server gave no reason".to_owned());
    Err(StepError::failed(format!(
        "the job {} {}: {why}",
        job.id, job.status
    )))
}

fn merge(body: &mut Value, more: &BTreeMap<String, Value>) {
    if let Some(fields) = body.as_object_mut() {
        fields.extend(more.clone());
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, StepError> {
    let shown = value.to_string();
    let shown: String = shown.chars().take(200).collect();
    serde_json::from_value(value).map_err(|e| {
        StepError::failed(format!("the server's answer cannot be read ({e}): {shown}"))
    })
}

fn failed(error: ApiError) -> StepError {
    match error {
        ApiError::Cancelled => StepError::cancelled(),
        ApiError::Invalid(text) => StepError::invalid(text),
        error if error.may_pass() => StepError::new(StepErrorKind::Transient, error.to_string()),
        error => StepError::failed(error.to_string()),
    }
}

fn no_such_api(error: ApiError) -> StepError {
    StepError::failed(error.to_string()).help(
        "the server has no OpenAI fine-tuning API (vLLM, llama.cpp and Ray Serve have none): \
         train with `backend: command`, or with a server that has one",
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn job(model: Option<&str>) -> Job {
        let job = json!({"id": "j", "status": "succeeded", "fine_tuned_model": model});
        serde_json::from_value(job).unwrap()
    }

    fn rows(steps: &[u64]) -> Vec<CheckpointRow> {
        let row = |step: &u64| CheckpointRow {
            id: format!("c{step}"),
            fine_tuned_model_checkpoint: format!("m:ckpt-step-{step}"),
            step_number: *step,
        };
        steps.iter().map(row).collect()
    }

    fn named(models: &[Model]) -> Vec<(&str, usize, usize)> {
        let name = |model: &Model| (model.epoch, model.step);
        models
            .iter()
            .map(|model| (model.id.as_str(), name(model).0, name(model).1))
            .collect()
    }

    #[test]
    fn the_last_model_is_one_with_its_checkpoint() {
        let found = models(&job(Some("m")), rows(&[30, 10, 20]), 3, Some(30)).unwrap();
        let expected = [
            ("m:ckpt-step-10", 1, 10),
            ("m:ckpt-step-20", 2, 20),
            ("m", 3, 30),
        ];
        assert_eq!(named(&found), expected);
    }

    #[test]
    fn a_server_may_list_only_the_later_ones_or_none() {
        let found = models(&job(Some("m")), rows(&[20]), 3, Some(30)).unwrap();
        assert_eq!(named(&found), [("m:ckpt-step-20", 2, 20), ("m", 3, 30)]);
        let found = models(&job(Some("m")), vec![], 3, None).unwrap();
        assert_eq!(named(&found), [("m", 3, 1)]);
        assert!(models(&job(None), vec![], 3, None).is_err());
    }
    fn page(ids: &[&str], has_more: bool) -> Page<EventRow> {
        let data: Vec<Value> = ids.iter().map(|id| json!({"id": id})).collect();
        serde_json::from_value(json!({"data": data, "has_more": has_more})).unwrap()
    }

    #[test]
    fn events_are_heard_back_to_a_known_one() {
        let mut seen = Seen::default();
        let mut fresh = Vec::new();
        assert!(seen.take(page(&["e5", "e4"], true), &mut fresh));
        assert!(seen.take(page(&["e3", "e2"], true), &mut fresh));
        assert!(!seen.take(page(&["e1"], false), &mut fresh));
        let ids: Vec<&str> = fresh.iter().map(|event| event.id.as_str()).collect();
        assert_eq!(ids, ["e5", "e4", "e3", "e2", "e1"]);

        seen.events = ["e1", "e2"].map(str::to_owned).into();
        let mut fresh = Vec::new();
        assert!(!seen.take(page(&["e3", "e2"], true), &mut fresh));
        assert_eq!(fresh.len(), 1);
        // A server that knows no `after`.
        assert!(!seen.take(page(&["e3", "e2"], true), &mut fresh));
        assert_eq!(fresh.len(), 1);
    }

    #[test]
    fn what_was_heard_outlives_a_kill_and_says_how_long_the_training_was() {
        let old: State = serde_json::from_value(json!({"file": "f", "job": "j"})).unwrap();
        assert_eq!(old.seen.total_steps(), None);
        let seen = Seen {
            events: ["e1".to_owned()].into(),
            losses: [(10, 0.5), (30, 0.25)].into(),
            total_steps: None,
        };
        let text = serde_json::to_string(&State { seen, ..old }).unwrap();
        let State { seen, .. } = serde_json::from_str(&text).unwrap();
        assert_eq!(seen.losses[&30], 0.25);
        assert!(seen.events.contains("e1"));
        // The checkpoint of step 20 is none of the last.
        let found = models(&job(Some("m")), rows(&[20]), 3, seen.total_steps()).unwrap();
        assert_eq!(named(&found), [("m:ckpt-step-20", 2, 20), ("m", 3, 30)]);
    }
}
