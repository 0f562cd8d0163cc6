//! [`OpenAi`]: any server that speaks OpenAI's chat completions (vLLM, RayLLM, llama.cpp, OpenAI).
//!
//! | file | what |
//! |---|---|
//! | `spec` | the settings, as a pipeline says them |
//! | `wire` | the JSON of requests and answers |
//! | `retry` | what is tried again, and when |
//!
//! Invariant: no error, log line or `Debug` text shows the key.

mod retry;
mod spec;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt as _;

use crate::lm::{Completion, Lm, LmError, OnAnswer, Request};
use retry::{Failure, Pace};
pub use spec::{OpenAiSpec, Prices};

/// Longest answer that is read.
const LARGEST_BODY: usize = 16 << 20;
/// How often a wait looks whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Says whether to stop.
pub type Cancelled = Arc<dyn Fn() -> bool + Send + Sync>;

/// A model behind a server.
pub struct OpenAi {
    spec: OpenAiSpec,
    url: String,
    client: reqwest::Client,
    key: Option<String>,
    cancelled: Cancelled,
    pace: Pace,
}

impl std::fmt::Debug for OpenAi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenAi")
            .field("url", &self.url)
            .field("model", &self.spec.model)
            .finish_non_exhaustive()
    }
}

impl OpenAi {
    /// A client; nothing is sent yet. `key` goes into the `Authorization` header.
    ///
    /// # Errors
    /// [`LmError::Rejected`] when `base_url` is no URL.
    pub fn new(
        spec: &OpenAiSpec,
        key: Option<String>,
        cancelled: Cancelled,
    ) -> Result<Self, LmError> {
        Self::with_pace(spec, key, cancelled, Pace::default())
    }

    fn with_pace(
        spec: &OpenAiSpec,
        key: Option<String>,
        cancelled: Cancelled,
        pace: Pace,
    ) -> Result<Self, LmError> {
        let url = format!("{}/chat/completions", spec.base_url.trim_end_matches('/'));
        let rejected = |why: String| LmError::Rejected(format!("`{}`: {why}", spec.base_url));
        let parsed = reqwest::Url::parse(&url).map_err(|e| rejected(e.to_string()))?;
        let mut builder =
            reqwest::Client::builder().timeout(Duration::from_secs(spec.timeout_s.max(1)));
        if matches!(parsed.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|e| rejected(e.to_string()))?;
        Ok(Self {
            spec: spec.clone(),
            url,
            client,
            key,
            cancelled,
            pace,
        })
    }

    async fn ask(&self, request: &Request, down: &Mutex<Option<LmError>>) -> Answer {
        let body = wire::body(&self.spec.model, request);
        let mut attempt = 0;
        loop {
            if let Some(error) = down.lock().ok().and_then(|down| down.clone()) {
                return Err(error);
            }
            if (self.cancelled)() {
                return Err(LmError::Cancelled);
            }
            let failure = tokio::select! {
                answer = self.send(&body) => match answer {
                    Ok(completion) => return Ok(completion),
                    Err(failure) => failure,
                },
                () = self.stopped() => return Err(LmError::Cancelled),
            };
            attempt += 1;
            match failure {
                Failure::Final(error) => return Err(error),
                Failure::Again { why, .. } if attempt > self.spec.max_retries => {
                    let error =
                        LmError::Unavailable(format!("{}: {why} ({attempt} attempts)", self.url));
                    return Err(error);
                }
                Failure::Unreachable { why } if attempt > self.spec.max_retries => {
                    let error = LmError::Unavailable(format!(
                        "{} cannot be reached: {why} ({attempt} attempts); is the server running?",
                        self.url
                    ));
                    // The others would only wait for the same.
                    if let Ok(mut down) = down.lock() {
                        *down = Some(error.clone());
                    }
                    return Err(error);
                }
                Failure::Again { after, why } => {
                    tracing::debug!(url = self.url, attempt, why, "trying again");
                    self.wait(after.unwrap_or_else(|| self.pace.backoff(attempt)))
                        .await?;
                }
                Failure::Unreachable { why } => {
                    tracing::debug!(url = self.url, attempt, why, "trying again");
                    self.wait(self.pace.backoff(attempt)).await?;
                }
            }
        }
    }

    async fn stopped(&self) {
        while !(self.cancelled)() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn wait(&self, time: Duration) -> Result<(), LmError> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            () = self.stopped() => Err(LmError::Cancelled),
        }
    }

    async fn send(&self, body: &serde_json::Value) -> Result<Completion, Failure> {
        let mut request = self.client.post(&self.url).json(body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(|e| retry::of_error(&e))?;
        let status = response.status();
        let after = retry::after(response.headers());
        let mut bytes = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(|e| retry::of_error(&e))?);
            if bytes.len() > LARGEST_BODY {
                return Err(Failure::Final(LmError::Rejected(format!(
                    "{}: the answer is larger than {LARGEST_BODY} bytes",
                    self.url
                ))));
            }
        }
        if !status.is_success() {
            let why = wire::error_text(&bytes);
            return Err(retry::of_status(status, &why, after, &self.url, &self.spec));
        }
        wire::completion(&bytes).map_err(|why| Failure::Again { why, after: None })
    }
}

type Answer = Result<Completion, LmError>;

impl Lm for OpenAi {
    fn id(&self) -> &str {
        &self.spec.model
    }

    /// Blocks; must not be called from within an async task.
    fn complete(&self, requests: &[Request], on_answer: &OnAnswer<'_>) -> Vec<Answer> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(e) => {
                let failed: Answer = Err(LmError::Unavailable(format!("no async runtime: {e}")));
                (0..requests.len()).for_each(|index| on_answer(index, &failed));
                return requests.iter().map(|_| failed.clone()).collect();
            }
        };
        let down = Mutex::new(None);
        let mut answers: Vec<Answer> = requests.iter().map(|_| Err(LmError::Cancelled)).collect();
        runtime.block_on(async {
            let calls = requests.iter().enumerate().map(|(index, request)| {
                let answer = self.ask(request, &down);
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
