//! `/v1/…`: the deployed model in the shapes of OpenAI's chat completions API, so that its
//! clients work unmodified. What cannot be done is refused, never quietly left out.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use flowrun_lm::lm::{
    Choices, Completion, FinishReason, LmError, Message, Request, Role, Sampling,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Service;
use super::problem::Problem;

/// Tokens of an answer when the caller names no limit.
const MAX_TOKENS: u32 = 1024;
/// OpenAI's default.
const TEMPERATURE: f64 = 1.0;

/// A chat. What is not listed is looked at by [`Chat::refused`].
#[derive(Deserialize)]
pub(super) struct Chat {
    model: String,
    messages: Vec<ChatMessage>,
    temperature: Option<f64>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    structured_outputs: Option<StructuredOutputs>,
    #[serde(flatten)]
    further: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// vLLM's way to restrict an answer; of its kinds, only a list of choices.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StructuredOutputs {
    choice: Vec<String>,
}

impl Chat {
    /// Fields that may change the answer and are not understood: all but those about accounting
    /// and those that ask for what is done anyway.
    fn refused(&self) -> Result<(), Problem> {
        let harmless = |name: &str, value: &Value| match name {
            "user"
            | "metadata"
            | "store"
            | "service_tier"
            | "safety_identifier"
            | "prompt_cache_key"
            | "parallel_tool_calls" => true,
            "n" => value == 1,
            "top_p" => value.as_f64() == Some(1.0),
            "frequency_penalty" | "presence_penalty" => value.as_f64() == Some(0.0),
            "logprobs" => value == false,
            "response_format" => value["type"] == "text",
            _ => false,
        };
        let found = self
            .further
            .iter()
            .find(|(name, value)| !value.is_null() && !harmless(name, value));
        match found {
            Some((name, value)) => {
                let text = format!("`{name}`: {value} is not supported by this server");
                Err(Problem::bad(text).code("unsupported_parameter"))
            }
            None => Ok(()),
        }
    }

    fn request(&self) -> Result<Request, Problem> {
        self.refused()?;
        let messages: Vec<Message> = self
            .messages
            .iter()
            .map(ChatMessage::read)
            .collect::<Result<_, _>>()?;
        if messages.last().is_none_or(|m| m.role != Role::User) {
            return Err(Problem::bad("the last message must be the user's").of("messages"));
        }
        let temperature = self.temperature.unwrap_or(TEMPERATURE);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(Problem::bad("`temperature` is from 0 to 2").of("temperature"));
        }
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        let max_tokens = max_tokens.unwrap_or(MAX_TOKENS);
        if max_tokens == 0 {
            return Err(Problem::bad("`max_tokens` is at least 1").of("max_tokens"));
        }
        let choices = match &self.structured_outputs {
            Some(given) if given.choice.is_empty() => {
                let text = "`structured_outputs.choice` names no choice";
                return Err(Problem::bad(text).of("structured_outputs"));
            }
            given => given.as_ref().map(|given| Choices {
                after: None,
                values: given.choice.clone(),
                then: String::new(),
            }),
        };
        Ok(Request {
            messages,
            sampling: Sampling {
                temperature,
                max_tokens,
                stop: match &self.stop {
                    None => Vec::new(),
                    Some(OneOrMany::One(stop)) => vec![stop.clone()],
                    Some(OneOrMany::Many(stops)) => stops.clone(),
                },
                seed: Some(self.seed.map_or_else(fresh_seed, i64::cast_unsigned)),
                rollout: None,
            },
            choices,
        })
    }
}

/// Without a seed each call draws anew.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

impl ChatMessage {
    fn read(&self) -> Result<Message, Problem> {
        let role = match self.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => {
                let text = format!("the role `{other}` is not supported");
                return Err(Problem::bad(text).of("messages"));
            }
        };
        let content = match &self.content {
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => {
                let text = |part: &Part| match (part.kind.as_str(), &part.text) {
                    ("text", Some(text)) => Ok(text.clone()),
                    _ => Err(Problem::bad(format!(
                        "content of type `{}` is not supported",
                        part.kind
                    ))
                    .of("messages")),
                };
                parts.iter().map(text).collect::<Result<_, _>>()?
            }
        };
        Ok(Message { role, content })
    }
}

/// `GET /v1/models`.
pub(super) async fn models(State(service): State<Arc<Service>>) -> Json<Value> {
    let data: Vec<Value> = match service.queue.has_model() {
        true => vec![described(&service)],
        false => vec![],
    };
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{id}`.
pub(super) async fn model(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Problem> {
    known(&service, &id)?;
    Ok(Json(described(&service)))
}

fn described(service: &Service) -> Value {
    json!({
        "id": service.manifest.model_id, "object": "model",
        "created": service.started, "owned_by": "flowrun",
    })
}

fn known(service: &Service, id: &str) -> Result<(), Problem> {
    if !service.queue.has_model() {
        return Err(super::queue::Refused::NoModel.into());
    }
    let own = &service.manifest.model_id;
    if id == own {
        return Ok(());
    }
    let text = format!("the model `{id}` does not exist here; this server has `{own}`");
    let problem = Problem::new(StatusCode::NOT_FOUND, text);
    Err(problem.of("model").code("model_not_found"))
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    State(service): State<Arc<Service>>,
    chat: Result<Json<Chat>, JsonRejection>,
) -> Result<Response, Problem> {
    let Json(chat) = chat?;
    known(&service, &chat.model)?;
    let request = chat.request()?;
    let completion = service.queue.complete(request).await?;
    let completion = completion.map_err(|error| match error {
        LmError::Rejected(why) => Problem::bad(why),
        other => Problem::new(StatusCode::BAD_GATEWAY, other.to_string()),
    })?;
    let answer = Answered::new(chat.model, completion);
    Ok(match chat.stream {
        false => Json(answer.whole()).into_response(),
        true => {
            let with_usage = chat.stream_options.is_some_and(|o| o.include_usage);
            answer.streamed(with_usage).into_response()
        }
    })
}

/// An answer with what OpenAI's shapes say around it.
struct Answered {
    id: String,
    created: u64,
    model: String,
    completion: Completion,
}

impl Answered {
    fn new(model: String, completion: Completion) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            id: format!("chatcmpl-{}-{count}", std::process::id()),
            created: now.map_or(0, |since| since.as_secs()),
            model,
            completion,
        }
    }

    fn finish(&self) -> &'static str {
        match self.completion.finish {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ContentFilter => "content_filter",
        }
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (
            self.completion.prompt_tokens,
            self.completion.completion_tokens,
        );
        json!({
            "prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion,
        })
    }

    fn whole(&self) -> Value {
        json!({
            "id": self.id, "object": "chat.completion", "created": self.created,
            "model": self.model,
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": self.completion.text, "refusal": null},
                "logprobs": null, "finish_reason": self.finish(),
            }],
            "usage": self.usage(),
        })
    }

    /// Server-sent events. The answers of a small model are short: the text comes in one piece.
    fn streamed(
        &self,
        with_usage: bool,
    ) -> Sse<impl futures::Stream<Item = Result<Event, Infallible>> + use<>> {
        let chunk = |choices: Value, usage: Value| {
            let mut chunk = json!({
                "id": self.id, "object": "chat.completion.chunk", "created": self.created,
                "model": self.model, "choices": choices,
            });
            if with_usage {
                chunk["usage"] = usage;
            }
            Event::default().data(chunk.to_string())
        };
        let choice = |delta: Value, finish: Option<&str>| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
        let role = choice(json!({"role": "assistant", "content": ""}), None);
        let text = choice(json!({"content": self.completion.text}), None);
        let end = choice(json!({}), Some(self.finish()));
        let mut events: Vec<Event> = [role, text, end]
            .into_iter()
            .map(|choices| chunk(choices, Value::Null))
            .collect();
        if with_usage {
            events.push(chunk(json!([]), self.usage()));
        }
        events.push(Event::default().data("[DONE]"));
        Sse::new(futures::stream::iter(events.into_iter().map(Ok)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn chat(more: Value) -> Result<Request, Problem> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        serde_json::from_value::<Chat>(body).unwrap().request()
    }

    #[test]
    fn what_clients_send_by_habit_is_taken() {
        let request = chat(json!({
            "n": 1, "top_p": 1, "user": "me", "logprobs": false, "stop": "\n", "tools": null,
            "max_completion_tokens": 7, "max_tokens": 9, "seed": 3, "temperature": 0,
        }))
        .unwrap();
        assert_eq!(request.sampling.max_tokens, 7);
        assert_eq!(request.sampling.seed, Some(3));
        assert_eq!(request.sampling.stop, ["\n"]);
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let request = chat(json!({"messages": [{"role": "user", "content": parts}]})).unwrap();
        assert_eq!(request.messages[0].content, "ab");
    }

    #[test]
    fn what_would_change_the_answer_is_refused() {
        for more in [
            json!({"n": 2}),
            json!({"tools": [{"type": "function"}]}),
            json!({"guided_choice": ["a", "b"]}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"temperature": 3}),
            json!({"max_tokens": 0}),
            json!({"messages": []}),
            json!({"structured_outputs": {"choice": []}}),
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ] {
            assert!(chat(more.clone()).is_err(), "{more}");
        }
    }
}
