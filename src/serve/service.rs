//! [`Service`]: what every handler knows: what answers, and how much may be asked at once.
//!
//! Invariant: what was let in is bounded by [`Limits`]; who is let in later than that is refused
//! at once.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use flowrun_lm::example::Example;
use flowrun_lm::lm::{Lm, LmError, Request, Sampling};
use flowrun_lm::program::{Program, RowInput, RowResult, RunOptions};
use flowrun_steps::answer::Answerer;
use flowrun_steps::bundle::UNKNOWN;
use flowrun_steps::serving::{Ask, Ended, Engine, Event, Loaded, ModelEntry, Piece, Prompt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::batches::Batches;
use super::files::Files;
use super::fine_tuning::FineTuning;
use super::metrics::Metrics;
use super::problem::{Problem, Refused};

/// Bounds of a server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Requests that are computed together.
    pub(super) batch: usize,
    /// Requests that wait.
    pub(super) queue: usize,
    /// How long an answer may take, its time in the queue included.
    pub(super) answer: Duration,
    /// How long a client may take to send its request.
    pub(super) read: Duration,
    /// How long a client may take nothing of an answer that is there for it.
    pub(super) write: Duration,
    /// How long requests under way may take once the server was told to stop.
    pub(super) drain: Duration,
}

impl Limits {
    /// Answers to requests of batches at once.
    pub(super) fn batched(&self) -> usize {
        (self.batch / 2).max(1)
    }
}

/// What answers.
pub(super) enum Backend {
    /// A model in this process, with the program that is deployed on it.
    Engine {
        engine: Engine,
        program: Option<Deployed>,
    },
    /// A classifier, or a prompt that asks another server.
    Answerer(Arc<Answerer>),
}

/// A program with its model.
pub(super) struct Deployed {
    pub(super) program: Arc<Program>,
    pub(super) sampling: Sampling,
    pub(super) model: Loaded,
}

/// What is served, for people.
#[derive(Debug, Clone)]
pub(super) struct About {
    /// Name of what is deployed.
    pub(super) name: String,
    /// Id of the model that the program asks, or of the base model.
    pub(super) model_id: String,
    /// Digest of the bundle; none for a base model alone.
    pub(super) digest: Option<String>,
    /// The program's field of the label.
    pub(super) label_field: String,
    /// What the program reads.
    pub(super) inputs: Vec<RowInput>,
    /// The program's labels.
    pub(super) labels: Vec<String>,
    /// Whether its answers are these and no others.
    pub(super) closed: bool,
    /// Seconds since 1970 when the server started.
    pub(super) started: u64,
    /// Folders that adapters may come from.
    pub(super) adapters: Vec<PathBuf>,
}

impl About {
    /// Whether a label is one that the program may give.
    pub(super) fn allows(&self, label: &str) -> bool {
        !self.closed || self.labels.iter().any(|known| known == label)
    }
}

/// What every handler knows.
pub(crate) struct Service {
    pub(super) backend: Backend,
    pub(super) about: About,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<Metrics>,
    /// Trains, where it was asked to.
    pub(super) fine_tuning: Option<Arc<FineTuning>>,
    /// Answers batches, where it was asked to.
    pub(super) batches: Option<Arc<Batches>>,
    places: Arc<Semaphore>,
    /// Answers to requests of batches at once.
    batched: Arc<Semaphore>,
    /// Calls of an [`Answerer`] at once.
    callers: Arc<Semaphore>,
    draining: AtomicBool,
}

/// Sets its flag when it goes: what it stands for is given up.
pub(super) struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a request to a model hears.
pub(super) type Events = mpsc::UnboundedReceiver<Event>;

impl Service {
    pub(super) fn new(
        backend: Backend,
        about: About,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let callers = match &backend {
            // A server elsewhere computes; the bound is its client's.
            Backend::Answerer(answerer) if has_model(answerer) => limits.batch,
            _ => cores,
        };
        Self {
            backend,
            about,
            limits,
            metrics,
            fine_tuning: None,
            batches: None,
            places: Arc::new(Semaphore::new(limits.batch + limits.queue)),
            batched: Arc::new(Semaphore::new(limits.batched())),
            callers: Arc::new(Semaphore::new(callers.max(1))),
            draining: AtomicBool::new(false),
        }
    }

    /// The same, training what it is asked to.
    pub(super) fn training(mut self, fine_tuning: Option<FineTuning>) -> Self {
        self.fine_tuning = fine_tuning.map(Arc::new);
        self
    }

    /// The same, answering the batches that it is given.
    pub(super) fn batching(mut self, batches: Option<Batches>) -> Self {
        self.batches = batches.map(Arc::new);
        self
    }

    /// The folders of files.
    pub(super) fn files(&self) -> Vec<Files> {
        let of_tuning = self.fine_tuning.iter().map(|tuning| tuning.files().clone());
        let of_batches = self.batches.iter().map(|batches| batches.files().clone());
        let mut all: Vec<Files> = of_tuning.chain(of_batches).collect();
        // One folder may be named for both.
        all.dedup();
        all
    }

    /// Whether callers may upload files.
    pub(super) fn keeps_files(&self) -> bool {
        self.fine_tuning.is_some() || self.batches.is_some()
    }

    /// As a number of places, if there are so many.
    fn fitting(&self, count: usize) -> Result<u32, Problem> {
        let most = self.limits.batch + self.limits.queue;
        let count = u32::try_from(count)
            .ok()
            .filter(|count| *count as usize <= most);
        count.ok_or_else(|| {
            Problem::bad(format!("this server takes {most} answers at once, at most"))
        })
    }

    /// Places for `count` requests, until what this returns is dropped.
    pub(super) fn admit(&self, count: usize) -> Result<OwnedSemaphorePermit, Problem> {
        let count = self.fitting(count)?;
        let places = Arc::clone(&self.places).try_acquire_many_owned(count);
        places.map_err(|_| {
            self.metrics.refused("queue_full");
            Refused::Full.into()
        })
    }

    /// Places for a request of `rows` rows: as many, but half of all at most, so that a long one is
    /// let in beside others. Its rows beyond that wait for its own.
    pub(super) fn admit_rows(&self, rows: usize) -> Result<OwnedSemaphorePermit, Problem> {
        let most = self.limits.batch + self.limits.queue;
        self.admit(rows.min(most.div_ceil(2)))
    }

    /// Whether a request for `count` answers is one that this server takes.
    ///
    /// # Errors
    /// When there are more than it has places.
    pub(super) fn takes(&self, count: usize) -> Result<(), Problem> {
        self.fitting(count).map(|_| ())
    }

    /// Places for `count` answers to a request of a batch, [`Limits::batched`] at most, once they
    /// are free: nobody waits for it. All that batches ask for has half of the rows that are
    /// computed together at most, so that others find room.
    pub(super) async fn admit_batched(
        &self,
        count: usize,
    ) -> Result<[OwnedSemaphorePermit; 2], Problem> {
        let gone = |_| Problem::from(Refused::Down);
        let count = self.fitting(count.min(self.limits.batched()))?;
        let turn = Arc::clone(&self.batched).acquire_many_owned(count).await;
        let turn = turn.map_err(gone)?;
        let places = Arc::clone(&self.places).acquire_many_owned(count).await;
        Ok([turn, places.map_err(gone)?])
    }

    /// Places that are taken.
    pub(super) fn let_in(&self) -> usize {
        self.limits.batch + self.limits.queue - self.places.available_permits()
    }

    /// Whether requests can be answered.
    pub(super) fn is_up(&self) -> bool {
        match &self.backend {
            Backend::Engine { engine, .. } => engine.is_up(),
            Backend::Answerer(_) => true,
        }
    }

    /// Whether the server was told to stop.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The models that can be chatted with.
    pub(super) fn models(&self) -> Vec<ModelEntry> {
        match &self.backend {
            Backend::Engine { engine, .. } => engine.models(),
            Backend::Answerer(answerer) if has_model(answerer) => vec![ModelEntry {
                id: self.about.model_id.clone(),
                parent: None,
                loaded: true,
            }],
            Backend::Answerer(_) => vec![],
        }
    }

    /// Sends requests to the model `id`.
    pub(super) async fn ask(
        self: &Arc<Self>,
        id: &str,
        asks: Vec<Ask>,
    ) -> Result<Vec<Events>, Problem> {
        match &self.backend {
            Backend::Engine { engine, .. } if !engine.is_up() => Err(Refused::Down.into()),
            Backend::Engine { engine, .. } => {
                let (name, of) = (id.to_owned(), engine.clone());
                // An adapter may have to be read from disk.
                let model = tokio::task::spawn_blocking(move || of.model(&name)).await;
                let model = model.map_err(|_| Refused::Down)??;
                let mut events = Vec::with_capacity(asks.len());
                for ask in asks {
                    let asked = engine.ask(model.clone(), ask).await;
                    events.push(asked.map_err(|_| Refused::Down)?);
                }
                Ok(events)
            }
            Backend::Answerer(answerer) => {
                if !has_model(answerer) {
                    return Err(Refused::NoModel.into());
                }
                if id != self.about.model_id {
                    return Err(Problem::no_model(id));
                }
                let ask = |ask| self.ask_elsewhere(Arc::clone(answerer), ask);
                asks.into_iter().map(ask).collect()
            }
        }
    }

    /// Asks the server that the bundle's model is at; the answer comes in one piece.
    fn ask_elsewhere(
        self: &Arc<Self>,
        answerer: Arc<Answerer>,
        ask: Ask,
    ) -> Result<Events, Problem> {
        let Prompt::Chat(messages) = ask.prompt else {
            return Err(Problem::unsupported("text prompts"));
        };
        if ask.logprobs.is_some() {
            return Err(Problem::unsupported("`logprobs`"));
        }
        if ask.top_p < 1.0 {
            return Err(Problem::unsupported("`top_p`"));
        }
        if !ask.chat_template_kwargs.is_empty() {
            let field = "chat_template_kwargs";
            return Err(Problem::unsupported(&format!("`{field}`")).of(field));
        }
        let request = Request {
            messages,
            sampling: ask.sampling,
            choices: ask.choices,
        };
        let (tell, events) = mpsc::unbounded_channel();
        let service = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = service.callers.acquire().await;
            if tell.is_closed() {
                return;
            }
            let asked = tokio::task::spawn_blocking(move || complete(&answerer, request)).await;
            let ended = match asked {
                Ok(Ok((text, ended))) => {
                    let _ = tell.send(Event::Piece(Piece { text, token: None }));
                    Ok(ended)
                }
                Ok(Err(error)) => Err(error),
                Err(_) => Err(LmError::Unavailable("the call broke off".to_owned())),
            };
            let _ = tell.send(Event::End(ended));
        });
        Ok(events)
    }

    /// Runs the program on rows. To drop the future is to give them up.
    pub(super) async fn run(&self, rows: Vec<Example>) -> Result<Vec<RowResult>, Problem> {
        let given_up = Arc::new(AtomicBool::new(false));
        let _give_up = GiveUp(Arc::clone(&given_up));
        let work = self.run_for(rows, given_up);
        match tokio::time::timeout(self.limits.answer, work).await {
            Ok(results) => results,
            Err(_) => {
                self.metrics.refused("timeout");
                Err(Refused::TimedOut.into())
            }
        }
    }

    async fn run_for(
        &self,
        rows: Vec<Example>,
        given_up: Arc<AtomicBool>,
    ) -> Result<Vec<RowResult>, Problem> {
        let done = match &self.backend {
            Backend::Engine { program: None, .. } => {
                return Err(Problem::no_program());
            }
            Backend::Engine { engine, .. } if !engine.is_up() => {
                return Err(Refused::Down.into());
            }
            Backend::Engine {
                engine,
                program: Some(deployed),
            } => {
                let lm = engine.lm(deployed.model.clone(), given_up);
                let program = Arc::clone(&deployed.program);
                let sampling = deployed.sampling.clone();
                let run = move || {
                    let results = program.run(&lm, &sampling, &rows, &RunOptions::default());
                    (results, lm.cached_tokens())
                };
                let done = tokio::task::spawn_blocking(run).await;
                done.map(|(results, cached)| {
                    self.metrics.cached_tokens(cached);
                    Ok(results)
                })
            }
            Backend::Answerer(answerer) => {
                // The call goes on when nobody waits any more: its turn ends with it.
                let turn = Arc::clone(&self.callers).acquire_owned().await;
                let (answerer, field) = (Arc::clone(answerer), self.about.label_field.clone());
                let run = move || {
                    let _turn = turn;
                    answerer.run(&rows, &field, &|_| {}).map_err(|e| e.message)
                };
                tokio::task::spawn_blocking(run).await
            }
        };
        done.map_err(|_| Problem::from(Refused::Down))?
            .map_err(Problem::internal)
    }
}

impl Service {
    /// Counts an answer of the program. Labels come from a closed list, but not every program
    /// holds its model to it.
    pub(super) fn count_prediction(&self, label: &str, confidence: Option<f32>) {
        let known = self.about.labels.iter().any(|known| known == label);
        let label = if known || label == UNKNOWN {
            label
        } else {
            "other"
        };
        self.metrics.prediction(label, confidence);
    }
}

fn has_model(answerer: &Answerer) -> bool {
    matches!(answerer, Answerer::Prompt { .. })
}

fn complete(answerer: &Answerer, request: Request) -> Result<(String, Ended), LmError> {
    let Answerer::Prompt { lm, .. } = answerer else {
        return Err(LmError::Rejected("there is no model".to_owned()));
    };
    let answer = lm.complete(&[request], &|_, _| {}).pop();
    let missing = || LmError::Unavailable("the model left a call unanswered".to_owned());
    let completion = answer.ok_or_else(missing)??;
    let ended = Ended {
        finish: completion.finish,
        prompt_tokens: completion.prompt_tokens,
        cached_tokens: 0,
        completion_tokens: completion.completion_tokens,
        choice_probs: completion.choice_probs,
    };
    Ok((completion.text, ended))
}
