//! One request until it is answered, refused, or out of tries or time.
//!
//! Invariant: no request is sent once the run was asked to stop or no other request of its call
//! will be answered; one that was sent is awaited, for its answer may have been paid for.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use tokio::time::Instant;

use super::retry::{self, Failure};
use super::{Answer, Call, Down, LOOK_EVERY, OpenAi, fitting, held_back, spent, wire};
use crate::lm::{Completion, LmError, Patience, Refused, Request, Spending, Taken, prompt_tokens};

/// Longest answer that is read.
const LARGEST_BODY: usize = 16 << 20;

impl OpenAi {
    /// [`Self::ask`], and tells who wants to hear of it.
    pub(super) async fn call(&self, request: &Request, down: &Down) -> Answer {
        let sends = down.get().is_none() && self.barred.get().is_none();
        let Some(on_call) = self.on_call.as_ref().filter(|_| sends) else {
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

    /// One request to its end. `down` is set once no request of this call will be answered: the
    /// others would only hear the same.
    async fn ask(&self, request: &Request, down: &Down) -> Answer {
        let _slot = self.unless_over(self.gate.slots.acquire(), down).await?;
        let body = wire::body(&self.spec, request);
        let estimate = prompt_tokens(request);
        let deadline = Duration::from_secs(self.spec.deadline_s.max(1));
        // What tries and the waits between them took.
        let mut spent = Duration::ZERO;
        let mut attempts = 0;
        let mut all_erred = true;
        loop {
            let left = deadline.saturating_sub(spent);
            // Both before a wait and after it: it may be a long one.
            self.over(down)?;
            self.place(estimate, left, down).await?;
            self.over(down)?;
            let taken = self.afford(request, deadline, down).await?;
            if let Err(error) = self.over(down) {
                if let Some(taken) = taken {
                    taken.refused();
                }
                return Err(error);
            }
            let started = Instant::now();
            let sent = self.awaited(self.within(left, self.send(&body))).await?;
            spent += started.elapsed();
            attempts += 1;
            settle(taken, &sent, wire::credible(&self.spec, request));
            let failure = match sent
                .and_then(|answer| fitting(&self.spec, &self.endpoint.shown, request, answer))
            {
                Ok(completion) => {
                    self.unreachable.store(false, Ordering::Relaxed);
                    self.outage.answered();
                    let most = wire::credible(&self.spec, request);
                    self.gate.limits.settle(estimate, most, &completion);
                    return Ok(completion);
                }
                Err(Failure::Withheld) => {
                    self.outage.answered();
                    return Ok(wire::withheld());
                }
                Err(failure) => failure,
            };
            all_erred &= failure.is_server_error();
            let nobody = matches!(failure, Failure::Unreachable { .. });
            let no_answer = failure.is_no_answer();
            if !no_answer && !nobody {
                self.outage.answered();
            }
            // What was waited for in vain before is not waited for again.
            let known = (nobody && self.unreachable.load(Ordering::Relaxed))
                || (no_answer && self.outage.is_on());
            let wait = self.pace.wait(attempts, failure.after());
            if let Some(after) = failure.after() {
                self.gate.limits.hold(after);
            }
            let tried = known || attempts > failure.retries(self.spec.max_retries);
            let late = spent.saturating_add(wait) >= deadline;
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
                let error = match failure.into_error(&self.endpoint.shown, &tries) {
                    // Not at every try.
                    LmError::ServerError(why) if !all_erred => LmError::Unavailable(why),
                    error => error,
                };
                let error = match self.gave_up(&error, no_answer) {
                    Some(outage) => down.get_or_init(|| outage).clone(),
                    None if all => down.get_or_init(|| error).clone(),
                    None => error,
                };
                return Err(error);
            }
            tracing::debug!(url = self.endpoint.shown, attempts, ?wait, "trying again");
            self.unless_over(tokio::time::sleep(wait), down).await?;
            spent += wait;
        }
    }

    /// Counts a request that was given up; the error of all others once so many in a row were that
    /// the server answers nobody.
    fn gave_up(&self, error: &LmError, no_answer: bool) -> Option<LmError> {
        if !no_answer {
            return None;
        }
        let told = self.outage.gave_up(&error.to_string())?;
        Some(LmError::Unavailable(told))
    }

    /// Waits until a request may be sent: for its place in the limits, and until the server, which
    /// asked one request to come later, wants to hear from any.
    async fn place(&self, estimate: u64, left: Duration, down: &Down) -> Result<(), LmError> {
        let wait = self.gate.limits.reserve(estimate);
        self.unless_over(tokio::time::sleep(wait), down).await?;
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
            self.unless_over(tokio::time::sleep(wait), down).await?;
        }
        Ok(())
    }

    /// Takes the worst case of a request out of the budget. While requests under way hold too much
    /// of it back, it waits for them; each ends within `deadline`.
    async fn afford(
        &self,
        request: &Request,
        deadline: Duration,
        down: &Down,
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
                    let wait = tokio::time::sleep(LOOK_EVERY);
                    self.unless_over(wait, down).await?;
                }
            }
        };
        Err(down.get_or_init(|| error).clone())
    }

    /// Why no request is sent any more, if that is so.
    fn over(&self, down: &Down) -> Result<(), LmError> {
        if (self.cancelled)() {
            return Err(LmError::Cancelled);
        }
        match down.get().or_else(|| self.barred.get()) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
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

    /// `work` before a request is sent, dropped as soon as none is to be sent any more.
    async fn unless_over<T>(
        &self,
        work: impl Future<Output = T>,
        down: &Down,
    ) -> Result<T, LmError> {
        let over = async {
            loop {
                if let Err(error) = self.over(down) {
                    return error;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            biased;
            error = over => Err(error),
            done = work => Ok(done),
        }
    }

    /// `work` that is in flight, dropped only when the run is to stop at once, or when it takes
    /// longer than the grace after the run was asked to stop.
    async fn awaited<T>(&self, work: impl Future<Output = T>) -> Result<T, LmError> {
        let over = async {
            let mut since: Option<Instant> = None;
            while !(self.killed)() {
                if (self.cancelled)() {
                    let asked = since.get_or_insert_with(Instant::now);
                    if asked.elapsed() >= self.grace {
                        return;
                    }
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = over => Err(LmError::Cancelled),
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
        let completion = wire::completion(&bytes).map_err(|why| Failure::Unreadable {
            why: self.without_key(&why),
        })?;
        let told = wire::model(&bytes);
        let told = told.map(|told| self.without_key(&wire::shown(told.as_bytes())));
        self.identity.check(told.as_deref());
        Ok(completion)
    }

    async fn read(&self, response: reqwest::Response) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(|e| retry::of_error(&e))?);
            if bytes.len() > LARGEST_BODY {
                let why = format!("the answer is larger than {LARGEST_BODY} bytes");
                return Err(Failure::TooLarge { why });
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

/// Gives back what a request did not use. A count of more than `most` tokens is no count.
fn settle(taken: Option<Taken<'_>>, sent: &Result<Completion, Failure>, most: Option<u64>) {
    let Some(taken) = taken else {
        return;
    };
    match sent {
        Ok(answer) => taken.answered(wire::believed(Spending::of(answer), most)),
        Err(failure) if failure.may_cost() => taken.answered(None),
        Err(_) => taken.refused(),
    }
}
