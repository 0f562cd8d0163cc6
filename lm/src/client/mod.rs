//! [`OpenAi`]: any server that speaks OpenAI's chat completions (vLLM, RayLLM, llama.cpp, OpenAI).
//!
//! | file | what |
//! |---|---|
//! | `spec` | the settings, as a pipeline says them |
//! | `endpoint` | the URL |
//! | `api` | what such a server offers besides chats: files, fine-tuning jobs, adapters |
//! | `ask` | one request until it is answered or given up |
//! | `wire` | the JSON of requests and answers |
//! | `call` | what those hear who trace calls |
//! | `batch` | requests as one file, answers within a day |
//! | `gate` | what all users of an entry share: limits, places, connections |
//! | `limits` | requests and tokens per minute |
//! | `retry` | what is tried again, and when |
//! | `outage` | when a server that is there answers nobody |
//! | `identity` | whether it answers as the model that it is asked for |
//! | `runtime` | the thread that waits for servers |
//!
//! Invariant: no error, log line or `Debug` text shows the key.

mod api;
mod ask;
mod batch;
mod call;
mod endpoint;
mod gate;
mod identity;
mod limits;
mod outage;
mod retry;
mod runtime;
mod spec;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt as _;

use crate::lm::{Completion, FinishReason, Ledger, Lm, LmError, OnAnswer, Request, Spending};
pub use api::{Api, ApiError};
pub use batch::{Batched, Told};
pub use call::{Call, OnCall};
use endpoint::Endpoint;
use gate::Gate;
use identity::Identity;
pub use identity::OnWarning;
use outage::Outage;
use retry::{Failure, Pace};
pub use spec::{AdapterPlace, AdapterServer, Guided, OpenAiSpec};

pub use crate::lm::Prices;

/// How often a wait looks whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for a connection; a server that is there takes one at once.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long requests in flight are awaited once the run was asked to stop: they may be paid for.
const GRACE: Duration = Duration::from_secs(10);

/// Says whether to stop.
pub type Cancelled = Arc<dyn Fn() -> bool + Send + Sync>;

type Answer = Result<Completion, LmError>;

/// Why no other request of a call is sent, once that is known.
type Down = std::cell::OnceCell<LmError>;

/// A model behind a server.
pub struct OpenAi {
    /// The model with the way its answers are guided: what kept answers are kept by.
    id: String,
    spec: OpenAiSpec,
    endpoint: Endpoint,
    key: Option<String>,
    cancelled: Cancelled,
    /// Whether what is in flight is to end at once.
    killed: Cancelled,
    /// How long it may take otherwise, once the run was asked to stop.
    grace: Duration,
    pace: Pace,
    gate: Arc<Gate>,
    identity: Identity,
    /// What bounds what is spent.
    ledger: Option<Ledger>,
    /// Hears of each call that ended.
    on_call: Option<OnCall>,
    /// The last that was seen of the server is that there is none.
    unreachable: AtomicBool,
    /// The requests that were given up in a row.
    outage: Outage,
    /// Why no request is sent any more, as who takes the answers has it.
    barred: OnceLock<LmError>,
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
        self.identity = self.identity.of_model(&self.spec);
        self
    }

    /// The same client, which ends at once what is in flight when `killed` says so. Else it is
    /// awaited for some seconds after the run was asked to stop.
    #[must_use]
    pub fn killed_by(mut self, killed: Cancelled) -> Self {
        self.killed = killed;
        self
    }

    /// The same client, which tells `on_warning` when another model answers than was asked for.
    #[must_use]
    pub fn warning(mut self, on_warning: Option<OnWarning>) -> Self {
        self.identity = self.identity.told_to(on_warning);
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
            outage: Outage::new(spec.concurrency),
            barred: OnceLock::new(),
            identity: Identity::new(spec),
            killed: Arc::new(|| false),
            grace: GRACE,
            spec: spec.clone(),
            endpoint,
            key,
            cancelled,
            pace,
        })
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
        let down = Down::new();
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

    fn bar(&self, why: &LmError) {
        self.barred.get_or_init(|| why.clone());
    }
}
