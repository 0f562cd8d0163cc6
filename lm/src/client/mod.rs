//! [`OpenAi`]: any server that speaks OpenAI's chat completions (vLLM, RayLLM, llama.cpp, OpenAI).
//!
//! | file | what |
//! |---|---|
//! | `spec` | the settings, as a pipeline says them |
//! | `endpoint` | the URL |
//! | `api` | what such a server offers besides chats: files, fine-tuning jobs, adapters |
//! | `wire` | the JSON of requests and answers |
//! | `call` | what those hear who trace calls |
//! | `batch` | requests as one file, answers within a day |
//! | `gate` | what all users of an entry share: limits, places, connections |
//! | `limits` | requests and tokens per minute |
//! | `retry` | what is tried again, and when |
//!
//! Invariant: no error, log line or `Debug` text shows the key.

mod api;
mod batch;
mod call;
mod endpoint;
mod gate;
mod limits;
mod retry;
mod spec;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use tokio::time::Instant;

use crate::lm::{
    Completion, FinishReason, Ledger, Lm, LmError, OnAnswer, Patience, Refused, Request, Spending,
    Taken, prompt_tokens,
};
pub use api::{Api, ApiError};
pub use batch::{Batched, Told};
pub use call::{Call, OnCall};
use endpoint::Endpoint;
use gate::Gate;
use retry::{Failure, Pace};
pub use spec::{AdapterPlace, AdapterServer, Guided, OpenAiSpec};

pub use crate::lm::Prices;

/// Longest answer that is read.
const LARGEST_BODY: usize = 16 << 20;
/// How often a wait looks whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for a connection; a server that is there takes one at once.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Says whether to stop.
pub type Cancelled = Arc<dyn Fn() -> bool + Send + Sync>;

type Answer = Result<Completion, LmError>;

/// A model behind a server.
pub struct OpenAi {
    /// The model with the way its answers are guided: what kept answers are kept by.
    id: String,
    spec: OpenAiSpec,
    endpoint: Endpoint,
    key: Option<String>,
    cancelled: Cancelled,
    pace: Pace,
    gate: Arc<Gate>,
    /// What bounds what is spent.
    ledger: Option<Ledger>,
    /// Hears of each call that ended.
    on_call: Option<OnCall>,
    /// The last that was seen of the server is that there is none.
    unreachable: AtomicBool,
}

impl std::fmt::Debug for OpenAi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenAi")
            .field("url", &self.endpoint.shown)
            .field("model", &self.spec.model)
            .finish_non_exhaustive()
    }
}

impl OpenAi {
    /// A client; nothing is sent yet. `key` goes into the `Authorization` header.
    ///
    /// # Errors
    /// [`LmError::Rejected`] when `base_url` is no URL of a server or the key cannot be sent.
    pub fn new(
        spec: &OpenAiSpec,
        key: Option<String>,
        cancelled: Cancelled,
    ) -> Result<Self, LmError> {
        Self::with_pace(spec, key, cancelled, Pace::default())
    }

    /// The same client, which asks another model of the entry's server: a fine-tuned one.
    #[must_use]
    pub fn as_model(mut self, model: &str) -> Self {
        model.clone_into(&mut self.spec.model);
        self.id = model_id(&self.spec);
        self
    }

    /// The same client, which spends no more than `ledger` allows.
    #[must_use]
    pub fn with_ledger(mut self, ledger: Option<Ledger>) -> Self {
        self.ledger = ledger;
        self
    }

    /// The same client, which tells `on_call` of each call that ended.
    #[must_use]
    pub fn heard_by(mut self, on_call: Option<OnCall>) -> Self {
        self.on_call = on_call;
        self
    }

    fn with_pace(
        spec: &OpenAiSpec,
        key: Option<String>,
        cancelled: Cancelled,
        pace: Pace,
    ) -> Result<Self, LmError> {
        let endpoint =
            Endpoint::new(&spec.base_url, &["chat", "completions"]).map_err(LmError::Rejected)?;
        if let Some(name) = wire::misplaced(spec) {
            return Err(LmError::Rejected(format!(
                "`body` may not hold `{name}`: it is the client's own"
            )));
        }
        let key = sendable(key, spec.api_key_env.as_deref()).map_err(LmError::Rejected)?;
        let gate = Gate::of(spec, key.as_deref(), endpoint.loopback)?;
        Ok(Self {
            id: model_id(spec),
            gate,
            ledger: None,
            on_call: None,
            unreachable: AtomicBool::new(false),
            spec: spec.clone(),
            endpoint,
            key,
            cancelled,
            pace,
        })
    }

    /// [`Self::ask`], and tells who wants to hear of it.
    async fn call(&self, request: &Request, down: &std::cell::OnceCell<LmError>) -> Answer {
        let Some(on_call) = self.on_call.as_ref().filter(|_| down.get().is_none()) else {
            return self.ask(request, down).await;
        };
        let (started_at, started) = (SystemTime::now(), Instant::now());
        let answer = self.ask(request, down).await;
        on_call(&Call {
            model: &self.spec.model,
            host: self.endpoint.url.host_str().unwrap_or_default(),
            port: self
                .endpoint
                .url
                .port_or_known_default()
                .unwrap_or_default(),
            sampling: &request.sampling,
            started_at,
            took: started.elapsed(),
            answer: &answer,
        });
        answer
    }

    /// One request until it is answered, refused, or out of tries or time. `down` is set once no
    /// request of this call will be answered: the others would only hear the same.
    async fn ask(&self, request: &Request, down: &std::cell::OnceCell<LmError>) -> Answer {
        let _slot = self.unless_stopped(self.gate.slots.acquire()).await?;
        let body = wire::body(&self.spec, request);
        let estimate = prompt_tokens(request);
        let deadline = Duration::from_secs(self.spec.deadline_s.max(1));
        // What tries and the waits between them took.
        let mut spent = Duration::ZERO;
        let mut attempts = 0;
        loop {
            let left = deadline.saturating_sub(spent);
            // Both before a wait and after it: it may be a long one.
            let barred = || down.get().map_or(Ok(()), |error| Err(error.clone()));
            barred()?;
            self.place(estimate, left).await?;
            barred()?;
            let taken = self.afford(request, deadline, down).await?;
            if let Err(error) = barred() {
                if let Some(taken) = taken {
                    taken.refused();
                }
                return Err(error);
            }
            let started = Instant::now();
            let sent = self.unless_stopped(self.within(left, self.send(&body)));
            let sent = sent.await?;
            spent += started.elapsed();
            attempts += 1;
            settle(taken, &sent);
            let failure = match sent
                .and_then(|answer| fitting(&self.spec, &self.endpoint.shown, request, answer))
            {
                Ok(completion) => {
                    self.unreachable.store(false, Ordering::Relaxed);
                    self.gate.limits.settle(estimate, &completion);
                    return Ok(completion);
                }
                Err(Failure::Withheld) => return Ok(wire::withheld()),
                Err(failure) => failure,
            };
            let nobody = matches!(failure, Failure::Unreachable { .. });
            // What an earlier call waited for in vain is not waited for again.
            let known = self.unreachable.load(Ordering::Relaxed) && nobody;
            let wait = self.pace.wait(attempts, failure.after());
            if let Some(after) = failure.after() {
                self.gate.limits.hold(after);
            }
            let tried = known || attempts > failure.retries(self.spec.max_retries);
            let late = spent + wait >= deadline;
            if tried || late {
                self.unreachable.store(nobody, Ordering::Relaxed);
                let all =
                    nobody || matches!(failure, Failure::Barred { .. } | Failure::NoModel { .. });
                let tries = match late && !tried {
                    false => format!("{attempts} attempts"),
                    true => format!(
                        "{attempts} attempts; the next one, in {} s, is after `deadline_s`",
                        wait.as_secs_f64().ceil()
                    ),
                };
                let error = failure.into_error(&self.endpoint.shown, &tries);
                return Err(if all {
                    down.get_or_init(|| error).clone()
                } else {
                    error
                });
            }
            tracing::debug!(url = self.endpoint.shown, attempts, ?wait, "trying again");
            self.unless_stopped(tokio::time::sleep(wait)).await?;
            spent += wait;
        }
    }

    /// Waits until a request may be sent: for its place in the limits, and until the server, which
    /// asked one request to come later, wants to hear from any.
    async fn place(&self, estimate: u64, left: Duration) -> Result<(), LmError> {
        let wait = self.gate.limits.reserve(estimate);
        self.unless_stopped(tokio::time::sleep(wait)).await?;
        while let Some(wait) = self.gate.limits.held() {
            if wait > left {
                return Err(LmError::Unavailable(format!(
                    "{}: the server asks to come again in {} s, which is after `deadline_s`",
                    self.endpoint.shown,
                    wait.as_secs_f64().ceil()
                )));
            }
            // Not all in the same moment.
            let wait = wait.mul_f64(1.0 + rand::random::<f64>() / 10.0);
            self.unless_stopped(tokio::time::sleep(wait)).await?;
        }
        Ok(())
    }

    /// Takes the worst case of a request out of the budget. While requests under way hold too much
    /// of it back, it waits for them; each ends within `deadline`.
    async fn afford(
        &self,
        request: &Request,
        deadline: Duration,
        down: &std::cell::OnceCell<LmError>,
    ) -> Result<Option<Taken<'_>>, LmError> {
        let Some(ledger) = &self.ledger else {
            return Ok(None);
        };
        let broken = |e: std::io::Error| {
            LmError::Barred(format!("the ledger of the model's `budget` fails: {e}"))
        };
        let need = wire::worst_case(&self.spec, request);
        let mut patience = Patience::new(deadline);
        let error = loop {
            match ledger.take(need).map_err(broken)? {
                Ok(taken) => return Ok(Some(taken)),
                Err(Refused::Spent(told)) => break spent(&self.spec.model, &told),
                Err(Refused::Later(held)) if patience.is_over(ledger, held) => {
                    let told = ledger.stuck(need).map_err(broken)?;
                    break held_back(&self.spec.model, &told);
                }
                Err(Refused::Later(_)) => {
                    self.unless_stopped(tokio::time::sleep(LOOK_EVERY)).await?;
                    if let Some(error) = down.get() {
                        return Err(error.clone());
                    }
                }
            }
        };
        Err(down.get_or_init(|| error).clone())
    }

    /// `work`, given up once the request's time is over.
    async fn within<T>(
        &self,
        left: Duration,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let late = |_| {
            let why = "no answer in time (`deadline_s`)".to_owned();
            Err(Failure::Lost { why })
        };
        tokio::time::timeout(left, work).await.unwrap_or_else(late)
    }

    /// `work`, dropped as soon as the run is asked to stop.
    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, LmError> {
        let stopped = async {
            while !(self.cancelled)() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            biased;
            () = stopped => Err(LmError::Cancelled),
            done = work => Ok(done),
        }
    }

    async fn send(&self, body: &serde_json::Value) -> Result<Completion, Failure> {
        let mut call = self.gate.http.post(self.endpoint.url.clone()).json(body);
        if let Some(key) = &self.key {
            call = call.bearer_auth(key);
        }
        let response = call.send().await.map_err(|e| retry::of_error(&e))?;
        let status = response.status();
        let after = retry::after(response.headers());
        let bytes = self.read(response).await?;
        if !status.is_success() {
            let why = self.without_key(&wire::error_text(&bytes));
            let url = &self.endpoint.shown;
            let code = wire::error_code(&bytes);
            let code = code.as_deref();
            return Err(retry::of_status(status, &why, code, after, url, &self.spec));
        }
        wire::completion(&bytes).map_err(|why| Failure::Unreadable {
            why: self.without_key(&why),
        })
    }

    async fn read(&self, response: reqwest::Response) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(|e| retry::of_error(&e))?);
            if bytes.len() > LARGEST_BODY {
                return Err(Failure::Final(LmError::Rejected(format!(
                    "{}: the answer is larger than {LARGEST_BODY} bytes",
                    self.endpoint.shown
                ))));
            }
        }
        Ok(bytes)
    }

    /// Some servers repeat the key that they do not know.
    fn without_key(&self, text: &str) -> String {
        match &self.key {
            Some(key) => text.replace(key.as_str(), "[key]"),
            None => text.to_owned(),
        }
    }
}

/// What the answers of a server's model are kept by: its name, with the way they are guided and
/// what else is asked of it.
#[must_use]
pub fn model_id(spec: &OpenAiSpec) -> String {
    let mut id = spec.model.clone();
    id += match spec.guided {
        None => "",
        Some(Guided::Vllm) => " guided by vllm",
        Some(Guided::LlamaCpp) => " guided by llama_cpp",
        Some(Guided::JsonSchema) => " guided by json_schema",
    };
    if !spec.body.is_empty() {
        id += &format!(" with {}", serde_json::json!(spec.body));
    }
    if !spec.chat_template_kwargs.is_empty() {
        let told = serde_json::json!(spec.chat_template_kwargs);
        id += &format!(" with template {told}");
    }
    id
}

/// The most that one request may use, sent once: what `budget` sets aside for it.
#[must_use]
pub fn worst_case(spec: &OpenAiSpec, request: &Request) -> Spending {
    wire::worst_case(spec, request)
}

/// A budget that has no place for one more request; `told` has the sums.
fn spent(model: &str, told: &str) -> LmError {
    LmError::Barred(format!(
        "the run's `budget` for `{model}` is spent: {told}; raise it, or run again: each run has \
         the whole budget"
    ))
}

/// A budget that others hold back, who do not end.
fn held_back(model: &str, told: &str) -> LmError {
    LmError::Barred(format!(
        "the run's `budget` for `{model}` is held back by requests of which nothing is heard, \
         perhaps those of a process that was killed: {told}; raise it, or run again: each run has \
         the whole budget"
    ))
}

/// Servers that do not know a way to restrict answers ignore it without a word.
fn fitting(
    spec: &OpenAiSpec,
    shown: &str,
    request: &Request,
    mut completion: Completion,
) -> Result<Completion, Failure> {
    let allowed = wire::allowed(spec, request).unwrap_or_default();
    if !allowed.is_empty() {
        completion.text = wire::unwrapped(spec, request, completion.text);
    }
    let fits = allowed.is_empty()
        || completion.finish != FinishReason::Stop
        || allowed.contains(&completion.text);
    if fits {
        return Ok(completion);
    }
    Err(Failure::Barred {
        why: format!(
            "{shown}: the answer `{}` is none of the allowed ones, so the server ignored `guided`; \
             remove it, or name the server's own way",
            wire::shown(completion.text.as_bytes())
        ),
    })
}

/// Gives back what a request did not use.
fn settle(taken: Option<Taken<'_>>, sent: &Result<Completion, Failure>) {
    let Some(taken) = taken else {
        return;
    };
    match sent {
        Ok(answer) => taken.answered(Spending::of(answer)),
        Err(failure) if failure.may_cost() => taken.answered(None),
        Err(_) => taken.refused(),
    }
}

/// The key without the white space around it; `from` is the variable that it came from.
fn sendable(key: Option<String>, from: Option<&str>) -> Result<Option<String>, String> {
    let key = key.map(|key| key.trim().to_owned());
    let key = key.filter(|key| !key.is_empty());
    let fits = |key: &String| key.bytes().all(|byte| (b'!'..=b'~').contains(&byte));
    if key.as_ref().is_none_or(fits) {
        return Ok(key);
    }
    let name = from.unwrap_or("api_key_env");
    Err(format!(
        "the key in `{name}` holds characters that no header can carry; copy it again"
    ))
}

impl Lm for OpenAi {
    fn id(&self) -> &str {
        &self.id
    }

    /// Blocks its thread until all is answered: call it from plain threads, such as those of
    /// `spawn_blocking`; from within an async task it panics. `on_answer` is called on this thread.
    fn complete(&self, requests: &[Request], on_answer: &OnAnswer<'_>) -> Vec<Answer> {
        let mut answers: Vec<Answer> = requests.iter().map(|_| Err(LmError::Cancelled)).collect();
        let down = std::cell::OnceCell::new();
        self.gate.block_on(async {
            let calls = requests.iter().enumerate().map(|(index, request)| {
                let answer = self.call(request, &down);
                async move { (index, answer.await) }
            });
            let mut done =
                futures::stream::iter(calls).buffer_unordered(self.spec.concurrency.max(1));
            while let Some((index, answer)) = done.next().await {
                on_answer(index, &answer);
                answers[index] = answer;
            }
        });
        answers
    }
}
