//! Answers in OpenAI's shapes, whole and as server-sent events.

mod streaming;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Json;
use axum::response::{IntoResponse, Response};
use flowrun_lm::lm::FinishReason;
use flowrun_steps::serving::{Ask, Ended, Event, Piece, TokenProb};
use serde_json::{Value, json};

use crate::serve::problem::{Problem, Refused};
use crate::serve::service::{Events, Service};
use streaming::Streaming;

/// Which of OpenAI's two shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Chat completions.
    Chat,
    /// Completions of a text.
    Text,
}

/// What is wanted beyond the asks themselves.
pub(super) struct Wanted {
    pub(super) kind: Kind,
    pub(super) model: String,
    /// The asks are of this many prompts, equally many each.
    pub(super) prompts: usize,
    pub(super) stream: bool,
    /// Whether a stream ends with the tokens used.
    pub(super) usage: bool,
}

/// What is the same in every part of an answer.
struct Frame {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    prompts: usize,
}

/// One of the answers, as far as it has come.
#[derive(Default)]
struct Choice {
    text: String,
    /// Characters so far, of a stream too.
    length: usize,
    /// Each with the character that it begins at.
    tokens: Vec<(usize, TokenProb)>,
    ended: Option<Ended>,
}

impl Choice {
    fn take(&mut self, piece: Piece) {
        let at = self.advance(&piece.text);
        if let Some(token) = piece.token {
            self.tokens.push((at, token));
        }
        self.text.push_str(&piece.text);
    }

    /// Counts a text that is said; the character that it begins at.
    fn advance(&mut self, text: &str) -> usize {
        let at = self.length;
        self.length += text.chars().count();
        at
    }
}

/// Asks the model once there is room, for as many answers at a time as batches may have, and gives
/// the whole answer.
pub(super) async fn batched(
    service: &Arc<Service>,
    wanted: Wanted,
    asks: Vec<Ask>,
) -> Result<Value, Problem> {
    service.takes(asks.len())?;
    let logprobs = asks.iter().any(|ask| ask.logprobs.is_some());
    let frame = Frame::new(&wanted);
    let mut choices = Vec::with_capacity(asks.len());
    let mut asks = asks.into_iter().peekable();
    while asks.peek().is_some() {
        let some: Vec<Ask> = asks.by_ref().take(service.limits.batched()).collect();
        let _places = service.admit_batched(some.len()).await?;
        let deadline = Instant::now() + service.limits.answer;
        let asked = within(deadline, service.ask(&wanted.model, some)).await;
        let events = timed(service, asked)??;
        let whole = within(deadline, whole(events)).await;
        let answered = timed(service, whole)??;
        count(service, &answered);
        choices.extend(answered);
    }
    Ok(frame.whole(&choices, logprobs))
}

/// Asks the model, and answers as wanted.
pub(super) async fn answer(
    service: &Arc<Service>,
    wanted: Wanted,
    asks: Vec<Ask>,
) -> Result<Response, Problem> {
    let started = Instant::now();
    let place = service.admit(asks.len())?;
    let logprobs = asks.iter().any(|ask| ask.logprobs.is_some());
    let deadline = started + service.limits.answer;
    let frame = Frame::new(&wanted);
    let asked = within(deadline, service.ask(&wanted.model, asks)).await;
    let events = timed(service, asked)??;
    match wanted.stream {
        false => {
            let whole = within(deadline, whole(events)).await;
            let choices = timed(service, whole)??;
            drop(place);
            count(service, &choices);
            Ok(Json(frame.whole(&choices, logprobs)).into_response())
        }
        true => {
            let streaming = Streaming {
                service: Arc::clone(service),
                frame,
                usage: wanted.usage,
                logprobs,
                deadline,
                started,
            };
            streaming.respond(events, place).await
        }
    }
}

/// The wait for something, up to a point in time.
async fn within<T>(deadline: Instant, work: impl Future<Output = T>) -> Option<T> {
    let left = deadline.saturating_duration_since(Instant::now());
    tokio::time::timeout(left, work).await.ok()
}

fn timed<T>(service: &Service, result: Option<T>) -> Result<T, Problem> {
    result.ok_or_else(|| {
        service.metrics.refused("timeout");
        Refused::TimedOut.into()
    })
}

async fn whole(events: Vec<Events>) -> Result<Vec<Choice>, Problem> {
    let mut choices = Vec::with_capacity(events.len());
    for mut events in events {
        let mut choice = Choice::default();
        loop {
            match events.recv().await {
                Some(Event::Piece(piece)) => choice.take(piece),
                Some(Event::End(ended)) => {
                    choice.ended = Some(ended?);
                    break;
                }
                None => return Err(Refused::Down.into()),
            }
        }
        choices.push(choice);
    }
    Ok(choices)
}

fn count(service: &Service, choices: &[Choice]) {
    for ended in choices.iter().filter_map(|choice| choice.ended.as_ref()) {
        let (prompt, cached) = (ended.prompt_tokens, ended.cached_tokens);
        service
            .metrics
            .tokens(prompt, cached, ended.completion_tokens);
    }
}

impl Frame {
    fn new(wanted: &Wanted) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.unwrap_or(Duration::ZERO);
        let prefix = match wanted.kind {
            Kind::Chat => "chatcmpl",
            Kind::Text => "cmpl",
        };
        Self {
            kind: wanted.kind,
            id: format!("{prefix}-{:x}-{count}", now.as_nanos()),
            created: now.as_secs(),
            model: wanted.model.clone(),
            prompts: wanted.prompts,
        }
    }

    fn around(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        })
    }

    fn whole(&self, choices: &[Choice], logprobs: bool) -> Value {
        let choice = |(index, choice): (usize, &Choice)| {
            let probs = match logprobs {
                true => self.logprobs(choice.tokens.iter().map(|(at, token)| (*at, token))),
                false => Value::Null,
            };
            let finish = choice.ended.as_ref().map(|ended| finish(ended.finish));
            match self.kind {
                Kind::Chat => json!({
                    "index": index, "logprobs": probs, "finish_reason": finish,
                    "message": {"role": "assistant", "content": choice.text, "refusal": null},
                }),
                Kind::Text => json!({
                    "index": index, "text": choice.text, "logprobs": probs,
                    "finish_reason": finish,
                }),
            }
        };
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Text => "text_completion",
        };
        let mut whole = self.around(object, choices.iter().enumerate().map(choice).collect());
        whole["usage"] = self.usage(choices);
        whole
    }

    /// Tokens of each prompt count once, however many answers there are to it.
    fn usage(&self, choices: &[Choice]) -> Value {
        let ended = |choice: &Choice| choice.ended.clone();
        let ended: Vec<Ended> = choices.iter().filter_map(ended).collect();
        let each = (choices.len() / self.prompts.max(1)).max(1);
        let prompts = ended.iter().step_by(each);
        let (prompt, cached) = prompts.fold((0, 0), |(prompt, cached), ended| {
            (prompt + ended.prompt_tokens, cached + ended.cached_tokens)
        });
        let completion: u64 = ended.iter().map(|ended| ended.completion_tokens).sum();
        json!({
            "prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    fn logprobs<'a>(&self, tokens: impl Iterator<Item = (usize, &'a TokenProb)>) -> Value {
        match self.kind {
            Kind::Chat => {
                let token = |(_, token): (usize, &TokenProb)| {
                    let mut entry = logprob(&token.text, token.logprob);
                    let top = token.top.iter().map(|(text, p)| logprob(text, *p));
                    entry["top_logprobs"] = top.collect();
                    entry
                };
                json!({"content": tokens.map(token).collect::<Vec<_>>(), "refusal": null})
            }
            Kind::Text => {
                let mut all = json!({
                    "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
                });
                let mut push = |name: &str, value: Value| {
                    if let Some(list) = all[name].as_array_mut() {
                        list.push(value);
                    }
                };
                for (at, token) in tokens {
                    push("tokens", json!(token.text));
                    push("token_logprobs", finite(token.logprob));
                    let top = token.top.iter().map(|(text, p)| (text.clone(), finite(*p)));
                    push("top_logprobs", Value::Object(top.collect()));
                    push("text_offset", json!(at));
                }
                all
            }
        }
    }

    /// `at` is the character that the piece begins at, where log-probabilities are wanted.
    fn chunk(&self, index: usize, piece: &Piece, finish: Option<&str>, at: Option<usize>) -> Value {
        let probs = match (&piece.token, at) {
            (Some(token), Some(at)) => self.logprobs(std::iter::once((at, token))),
            _ => Value::Null,
        };
        let choice = match self.kind {
            Kind::Chat => {
                let delta = match finish {
                    Some(_) => json!({}),
                    None => json!({"content": piece.text}),
                };
                json!({
                    "index": index, "delta": delta, "logprobs": probs, "finish_reason": finish,
                })
            }
            Kind::Text => json!({
                "index": index, "text": piece.text, "logprobs": probs, "finish_reason": finish,
            }),
        };
        self.around(self.chunk_object(), vec![choice])
    }

    fn chunk_object(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Text => "text_completion",
        }
    }

    /// The chunk that says who speaks.
    fn opening(&self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        let choice = json!({
            "index": index, "delta": delta, "logprobs": null, "finish_reason": null,
        });
        (self.kind == Kind::Chat).then(|| self.around(self.chunk_object(), vec![choice]))
    }
}

/// OpenAI sends bytes for tokens that are a part of a character; here they are unknown then.
fn logprob(text: &str, logprob: f32) -> Value {
    let bytes = match text.contains(char::REPLACEMENT_CHARACTER) {
        true => Value::Null,
        false => json!(text.as_bytes()),
    };
    json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
}

/// OpenAI's number for "very unlikely", where JSON has none.
fn finite(logprob: f32) -> Value {
    json!(logprob.max(-9999.0))
}

fn finish(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ContentFilter => "content_filter",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_begin_at_characters() {
        let mut choice = Choice::default();
        for text in ["é", "ab", "c"] {
            let token = TokenProb {
                text: text.to_owned(),
                logprob: -1.0,
                top: Vec::new(),
            };
            choice.take(Piece {
                text: text.to_owned(),
                token: Some(token),
            });
        }
        let starts: Vec<usize> = choice.tokens.iter().map(|(at, _)| *at).collect();
        assert_eq!(starts, [0, 1, 3]);
        assert_eq!(choice.text, "éabc");
    }
}
