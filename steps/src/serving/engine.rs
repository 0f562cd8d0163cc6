//! [`Engine`]: the thread that computes. Requests join its batch as they come, and leave it when
//! they are answered, given up or cut off.
//!
//! Invariant: what waits is bounded; a request that nobody waits for any more is computed no
//! further than the step under way. The thread ends when the device fails: who asks, or waits,
//! hears that the server cannot compute.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use flowrun_engine::step::StepError;
use flowrun_lm::lm::{Completion, FinishReason, Lm, LmError, OnAnswer, Request};
use flowrun_model::{Batch, Finish, GenerateOptions, ModelError, Said, TemplateArguments};
use tokio::sync::mpsc;

use super::adapters::{Adapters, Loaded};
use super::{
    Ask, Ended, EngineSpec, Event, ModelEntry, ModelsError, Piece, Prompt, Step, TokenProb,
};
use crate::models::Host;
use crate::models::embedded::{device, generate_request, open_base};

/// Bytes of keys and values of prompts' common starts that are kept.
const PREFIX_BYTES: usize = 256 << 20;

/// The embedded model, ready for requests. Cheap to clone; the thread ends with the last one.
#[derive(Clone)]
pub struct Engine {
    jobs: mpsc::Sender<Job>,
    adapters: Arc<Adapters>,
    active: Arc<AtomicUsize>,
}

struct Job {
    model: Loaded,
    ask: Ask,
    caller: Caller,
}

/// Who waits for an answer.
struct Caller {
    events: mpsc::UnboundedSender<Event>,
    given_up: Arc<AtomicBool>,
}

impl Caller {
    fn is_gone(&self) -> bool {
        self.events.is_closed() || self.given_up.load(Ordering::Relaxed)
    }

    /// A caller that is gone is found by the next step.
    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }
}

impl Engine {
    /// Loads the model and starts the thread.
    ///
    /// # Errors
    /// When weights or the pinned adapter cannot be had or do not belong together.
    pub fn open(spec: EngineSpec<'_>, host: &Host<'_>) -> Result<Self, StepError> {
        let base = open_base(spec.model, host)?;
        let options = GenerateOptions {
            device: device(host.world)?,
            ..GenerateOptions::default()
        };
        let (pinned, folders) = (spec.pinned, &spec.folders);
        let of = (spec.base_id, spec.model.chat_template_kwargs.clone());
        let adapters = Adapters::new(base, of, pinned, folders, spec.keep, options)?;
        let (jobs, waiting) = mpsc::channel(spec.queue.max(1));
        let active = Arc::new(AtomicUsize::new(0));
        let worker = Worker {
            batch: Batch::new(spec.batch, PREFIX_BYTES),
            size: spec.batch.max(1),
            callers: BTreeMap::new(),
            active: Arc::clone(&active),
            on_step: spec.on_step,
            broken: false,
        };
        std::thread::Builder::new()
            .name("answers".to_owned())
            .spawn(move || worker.work(waiting))
            .map_err(|e| StepError::failed(format!("no thread can be started: {e}")))?;
        Ok(Self {
            jobs,
            adapters: Arc::new(adapters),
            active,
        })
    }

    /// Whether requests are answered.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !self.jobs.is_closed()
    }

    /// Requests that wait for a place in the batch.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    /// Requests in the batch.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    /// Adapters from folders that are in memory.
    #[must_use]
    pub fn adapters_in_memory(&self) -> usize {
        self.adapters.in_memory()
    }

    /// The base model's id.
    #[must_use]
    pub fn base_id(&self) -> &str {
        self.adapters.base_id()
    }

    /// All models that can be asked, the base first.
    #[must_use]
    pub fn models(&self) -> Vec<ModelEntry> {
        self.adapters.list()
    }

    /// The model of an id; may read its adapter from disk.
    ///
    /// # Errors
    /// When there is none, or its files are no adapter for the base model.
    pub fn model(&self, id: &str) -> Result<Loaded, ModelsError> {
        self.adapters.get(id)
    }

    /// Gives the adapter in `path` a name; `again` replaces what had it.
    ///
    /// # Errors
    /// When the path is not in an allowed folder, the name is taken, or the files are unusable.
    pub fn load(&self, name: &str, path: &Path, again: bool) -> Result<(), ModelsError> {
        self.adapters.name(name, path, again)
    }

    /// Takes an adapter out of memory, and its name back if it was given one.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn unload(&self, name: &str) -> Result<(), ModelsError> {
        self.adapters.forget(name)
    }

    /// Puts a request into the queue, and waits while that is full. To drop what this returns is
    /// to give the request up.
    ///
    /// # Errors
    /// Unavailable when the thread is gone.
    pub async fn ask(
        &self,
        model: Loaded,
        ask: Ask,
    ) -> Result<mpsc::UnboundedReceiver<Event>, LmError> {
        let (job, events) = job(model, ask, Arc::default());
        self.jobs.send(job).await.map_err(|_| gone())?;
        Ok(events)
    }

    /// The model behind the trait of the program layer: blocking, until `given_up` is set.
    #[must_use]
    pub fn lm(&self, model: Loaded, given_up: Arc<AtomicBool>) -> EngineLm {
        EngineLm {
            jobs: self.jobs.clone(),
            model,
            given_up,
            cached: AtomicU64::new(0),
        }
    }
}

fn job(
    model: Loaded,
    ask: Ask,
    given_up: Arc<AtomicBool>,
) -> (Job, mpsc::UnboundedReceiver<Event>) {
    let (events, heard) = mpsc::unbounded_channel();
    let caller = Caller { events, given_up };
    (Job { model, ask, caller }, heard)
}

fn gone() -> LmError {
    LmError::Unavailable("the model's thread is gone; restart the server".to_owned())
}

struct Worker {
    batch: Batch,
    size: usize,
    callers: BTreeMap<usize, Caller>,
    active: Arc<AtomicUsize>,
    on_step: Box<dyn Fn(&Step) + Send>,
    /// Whether the device failed: all that would follow fails too.
    broken: bool,
}

impl Worker {
    fn work(mut self, mut waiting: mpsc::Receiver<Job>) {
        let mut id = 0;
        loop {
            while self.batch.len() < self.size {
                let job = match self.batch.is_empty() {
                    true => waiting.blocking_recv(),
                    false => waiting.try_recv().ok(),
                };
                match job {
                    Some(job) => self.join(id, job),
                    None if self.batch.is_empty() => return,
                    None => break,
                }
                id += 1;
            }
            self.drop_the_gone();
            self.active.store(self.callers.len(), Ordering::Relaxed);
            self.step();
            if self.broken {
                // Before those who wait hear of it: they find that nothing is answered any more.
                waiting.close();
                self.active.store(0, Ordering::Relaxed);
                return;
            }
            self.active.store(self.callers.len(), Ordering::Relaxed);
        }
    }

    fn join(&mut self, id: usize, Job { model, ask, caller }: Job) {
        if caller.is_gone() {
            return;
        }
        let ask = in_model_terms(ask, &model.told);
        match self.batch.add(&model.generator, id, &ask) {
            Ok(()) => {
                self.callers.insert(id, caller);
            }
            Err(error) => caller.tell(Event::End(Err(refused(error)))),
        }
    }

    fn drop_the_gone(&mut self) {
        let batch = &mut self.batch;
        self.callers.retain(|id, caller| {
            let gone = caller.is_gone();
            if gone {
                batch.remove(*id);
            }
            !gone
        });
    }

    fn step(&mut self) {
        let rows = self.batch.len();
        if rows == 0 {
            return;
        }
        let started = Instant::now();
        let (callers, broken) = (&mut self.callers, &mut self.broken);
        self.batch.step(&mut |id, said| match said {
            Said::Piece(piece) => {
                if let Some(caller) = callers.get(&id) {
                    caller.tell(Event::Piece(in_our_terms(piece)));
                }
            }
            // No answer to the request: its caller stays until the thread ends.
            Said::End(Err(ModelError::Device(why))) => {
                if !*broken {
                    tracing::error!("GPU: {why}; nothing is answered any more, restart the server");
                }
                *broken = true;
            }
            Said::End(answer) => {
                if let Some(caller) = callers.remove(&id) {
                    caller.end(answer);
                }
            }
        });
        (self.on_step)(&Step {
            rows,
            took: started.elapsed(),
        });
    }
}

impl Caller {
    fn end(self, answer: flowrun_model::Answer) {
        let ended = answer.map(|generated| Ended {
            finish: match generated.finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            },
            prompt_tokens: generated.prompt_tokens as u64,
            cached_tokens: generated.cached_tokens as u64,
            completion_tokens: generated.completion_tokens as u64,
            choice_probs: generated.choice_probs,
        });
        self.tell(Event::End(ended.map_err(refused)));
    }
}

/// Why there is no answer.
fn refused(error: ModelError) -> LmError {
    match error {
        ModelError::TooLong(why) => LmError::TooLong(why),
        error @ (ModelError::Device(_) | ModelError::NoDevice(_)) => {
            LmError::Unavailable(error.to_string())
        }
        error => LmError::Rejected(error.to_string()),
    }
}

fn in_model_terms(ask: Ask, usual: &TemplateArguments) -> flowrun_model::Ask {
    let mut template_arguments = usual.clone();
    template_arguments.extend(ask.chat_template_kwargs);
    let (messages, text) = match ask.prompt {
        Prompt::Chat(messages) => (messages, None),
        Prompt::Text(text) => (Vec::new(), Some(text)),
    };
    let request = Request {
        messages,
        sampling: ask.sampling,
        choices: ask.choices,
    };
    flowrun_model::Ask {
        request: generate_request(request, template_arguments),
        text,
        top_p: ask.top_p,
        logprobs: ask.logprobs,
    }
}

fn in_our_terms(piece: flowrun_model::Piece) -> Piece {
    Piece {
        text: piece.text,
        token: piece.token.map(|token| TokenProb {
            text: token.text,
            logprob: token.logprob,
            top: token.top,
        }),
    }
}

/// The engine's model as prompting programs see one.
pub struct EngineLm {
    jobs: mpsc::Sender<Job>,
    model: Loaded,
    given_up: Arc<AtomicBool>,
    cached: AtomicU64,
}

impl Lm for EngineLm {
    fn id(&self) -> &str {
        "served"
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let send = |request: &Request| {
            let ask = Ask {
                prompt: Prompt::Chat(request.messages.clone()),
                chat_template_kwargs: BTreeMap::new(),
                sampling: request.sampling.clone(),
                top_p: 1.0,
                logprobs: None,
                choices: request.choices.clone(),
            };
            let (job, events) = job(self.model.clone(), ask, Arc::clone(&self.given_up));
            self.jobs.blocking_send(job).map_err(|_| gone())?;
            Ok(events)
        };
        let sent: Vec<Result<_, LmError>> = requests.iter().map(send).collect();
        sent.into_iter()
            .enumerate()
            .map(|(index, events)| {
                let answer = events.and_then(|events| self.whole(events));
                on_answer(index, &answer);
                answer
            })
            .collect()
    }
}

impl EngineLm {
    /// Tokens of the prompts so far that were computed for an earlier request.
    #[must_use]
    pub fn cached_tokens(&self) -> u64 {
        self.cached.load(Ordering::Relaxed)
    }

    fn whole(&self, mut events: mpsc::UnboundedReceiver<Event>) -> Result<Completion, LmError> {
        let mut text = String::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Piece(piece) => text.push_str(&piece.text),
                Event::End(ended) => {
                    let ended = ended?;
                    self.cached
                        .fetch_add(ended.cached_tokens, Ordering::Relaxed);
                    return Ok(Completion {
                        text,
                        finish: ended.finish,
                        prompt_tokens: ended.prompt_tokens,
                        completion_tokens: ended.completion_tokens,
                        choice_probs: ended.choice_probs,
                        cached: false,
                    });
                }
            }
        }
        match self.given_up.load(Ordering::Relaxed) {
            true => Err(LmError::Cancelled),
            false => Err(gone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_has_no_room_is_not_the_requests_fault() {
        let full = refused(ModelError::NoDevice("full".to_owned()));
        assert_eq!(full, LmError::Unavailable("GPU: full".to_owned()));
        let bad = refused(ModelError::Request("bad".to_owned()));
        assert_eq!(bad, LmError::Rejected("bad".to_owned()));
    }
}
