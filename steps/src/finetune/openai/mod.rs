//! Training by a server that speaks OpenAI's fine-tuning API: the chats become a file there, the
//! training a job, and its checkpoints are models that the server keeps.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the settings, and the course of a training |
//! | `shapes` | what the server says |
//! | `events` | the log and the loss on the way |
//! | `models` | the checkpoints that come of it |
//!
//! A job is created once: its id is kept, and a job whose creation was not heard of is found by its
//! metadata.

mod events;
mod models;
mod shapes;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flowrun_cache::Digest;
use flowrun_engine::step::{StepContext, StepError, StepOutcome};
use flowrun_lm::client::{Api, ApiError, OpenAiSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Params;
use crate::models::{Host, ModelSpec, UNKEYED, remote};
use crate::rows::{read_json, write_json};
use events::Seen;
use shapes::{Job, PAGE, Page, failed, no_such_api, read, succeeded};

/// Where the job is remembered, in the step's resume folder.
const STATE: &str = "job.json";
/// The metadata that tells one training from another.
const KEY: &str = "flowrun";
/// Pages of jobs that are looked through for one whose creation was not heard of.
const PAGES: usize = 100;
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

/// What tells trainings apart: all that the step says, but not where the server is reached.
fn key(ctx: &StepContext, params: &Params) -> Result<String, StepError> {
    let mut params = serde_json::to_value(params).map_err(|e| StepError::failed(e.to_string()))?;
    if let Some(model) = params["model"].as_object_mut() {
        model.retain(|name, _| !UNKEYED.contains(&name.as_str()));
    }
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
        let own = |job: &&Job| {
            let key = job.metadata.as_ref().and_then(|data| data.get(KEY));
            key.and_then(Value::as_str) == Some(&self.key) && !job.has_failed()
        };
        let mut last: Option<String> = None;
        // The newest come first; others of the account may have made many since.
        for _ in 0..PAGES {
            let mut query = vec![("limit", PAGE)];
            query.extend(last.as_deref().map(|last| ("after", last)));
            let page: Page<Job> = match self.api.get(&["fine_tuning", "jobs"], &query) {
                Ok(value) => read(value)?,
                Err(error) if matches!(error.status(), Some(404 | 405)) => {
                    return Err(no_such_api(error));
                }
                Err(error) => return Err(failed(error)),
            };
            if let Some(job) = page.data.iter().find(own) {
                return Ok(Some(job.id.clone()));
            }
            let next = page.data.last().map(|job| job.id.clone());
            // A server that knows no `after` lists the same again.
            if !page.has_more || next.is_none() || next == last {
                break;
            }
            last = next;
        }
        Ok(None)
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
}

fn merge(body: &mut Value, more: &BTreeMap<String, Value>) {
    if let Some(fields) = body.as_object_mut() {
        fields.extend(more.clone());
    }
}
