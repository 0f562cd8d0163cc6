//! `POST /v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::Response;
use flowrun_lm::lm::{Choices, Message, Role};
use flowrun_steps::serving::{Ask, Prompt};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::answer::{Kind, Wanted, answer};
use super::drawing::{Drawing, OneOrMany, StreamOptions, refuse_unknown};
use super::schema;
use crate::serve::problem::Problem;
use crate::serve::service::Service;

/// Tokens of an answer when the caller names no limit.
const MAX_TOKENS: u32 = 1024;
/// Alternatives of a token at most, as at OpenAI.
const TOP_LOGPROBS: usize = 20;

/// A chat.
#[derive(Deserialize, JsonSchema)]
pub(in crate::serve) struct Chat {
    /// The model's id, one of `GET /v1/models`.
    model: String,
    /// The conversation; the last message is the user's.
    messages: Vec<ChatMessage>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    /// Answers to the same prompt.
    n: Option<usize>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    /// Whether to tell log-probabilities.
    #[serde(default)]
    logprobs: Option<bool>,
    /// Alternatives of each token to tell.
    top_logprobs: Option<usize>,
    /// `text`, or `json_schema` with a schema that has at most 1,000 answers.
    response_format: Option<ResponseFormat>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// vLLM's way to restrict an answer to a list.
    structured_outputs: Option<StructuredOutputs>,
    /// What else the chat template is told, as at vLLM: `{"enable_thinking": false}`.
    chat_template_kwargs: Option<BTreeMap<String, Value>>,
    #[serde(flatten)]
    further: serde_json::Map<String, Value>,
}

#[derive(Deserialize, JsonSchema)]
struct ChatMessage {
    /// `system`, `developer`, `user` or `assistant`.
    role: String,
    content: Content,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize, JsonSchema)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// vLLM's way to restrict an answer; of its kinds, only a list of choices.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct StructuredOutputs {
    choice: Vec<String>,
}

#[derive(Deserialize, JsonSchema)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<NamedSchema>,
}

#[derive(Deserialize, JsonSchema)]
struct NamedSchema {
    schema: Option<Value>,
}

impl Chat {
    /// What is wanted, and what the model is asked for it.
    pub(super) fn read(mut self) -> Result<(Wanted, Vec<Ask>), Problem> {
        let wanted = Wanted {
            kind: Kind::Chat,
            model: std::mem::take(&mut self.model),
            prompts: 1,
            stream: self.stream.unwrap_or(false),
            usage: self
                .stream_options
                .as_ref()
                .is_some_and(|options| options.include_usage),
        };
        Ok((wanted, self.asks()?))
    }

    fn asks(self) -> Result<Vec<Ask>, Problem> {
        refuse_unknown(&self.further)?;
        let messages = self.messages.iter().map(ChatMessage::read);
        let messages: Vec<Message> = messages.collect::<Result<_, _>>()?;
        if messages.last().is_none_or(|m| m.role != Role::User) {
            return Err(Problem::bad("the last message must be the user's").of("messages"));
        }
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (_, Some(top)) if top > TOP_LOGPROBS => {
                let text = format!("`top_logprobs` is from 0 to {TOP_LOGPROBS}");
                return Err(Problem::bad(text).of("top_logprobs"));
            }
            (false, Some(1..)) => {
                return Err(Problem::bad("`top_logprobs` needs `logprobs`").of("top_logprobs"));
            }
            (true, top) => Some(top.unwrap_or(0)),
            (false, _) => None,
        };
        let choices = closed_list(self.structured_outputs, self.response_format)?;
        let drawing = Drawing {
            temperature: self.temperature,
            top_p: self.top_p,
            max_tokens: self
                .max_completion_tokens
                .or(self.max_tokens)
                .unwrap_or(MAX_TOKENS),
            n: self.n,
            seed: self.seed,
            stop: self.stop,
        };
        let (samplings, top_p) = drawing.samplings()?;
        let told = self.chat_template_kwargs.unwrap_or_default();
        let ask = |sampling| Ask {
            prompt: Prompt::Chat(messages.clone()),
            chat_template_kwargs: told.clone(),
            sampling,
            top_p,
            logprobs,
            choices: choices.clone(),
        };
        Ok(samplings.into_iter().map(ask).collect())
    }
}

/// The answers that are allowed, where they are restricted.
fn closed_list(
    outputs: Option<StructuredOutputs>,
    format: Option<ResponseFormat>,
) -> Result<Option<Choices>, Problem> {
    let values = match (outputs, format) {
        (Some(StructuredOutputs { choice }), _) => {
            if choice.is_empty() || choice.len() > 1000 {
                let text = "`structured_outputs.choice` names 1 to 1000 choices";
                return Err(Problem::bad(text).of("structured_outputs"));
            }
            choice
        }
        (None, None) => return Ok(None),
        (None, Some(format)) => match format.kind.as_str() {
            "text" => return Ok(None),
            "json_schema" => {
                let schema = format.json_schema.and_then(|named| named.schema);
                schema::answers(&schema.unwrap_or_default()).map_err(|why| {
                    Problem::bad(format!("`response_format`: {why}"))
                        .of("response_format")
                        .code("unsupported_parameter")
                })?
            }
            other => {
                let text = format!("`response_format` of type `{other}`");
                return Err(Problem::unsupported(&text).of("response_format"));
            }
        },
    };
    Ok(Some(Choices {
        after: None,
        values,
        then: String::new(),
    }))
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

pub(in crate::serve) async fn chat(
    State(service): State<Arc<Service>>,
    chat: Result<Json<Chat>, JsonRejection>,
) -> Result<Response, Problem> {
    let Json(chat) = chat?;
    let (wanted, asks) = chat.read()?;
    answer(&service, wanted, asks).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chat(more: Value) -> Result<Vec<Ask>, Problem> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        serde_json::from_value::<Chat>(body).unwrap().asks()
    }

    #[test]
    fn what_clients_send_by_habit_is_taken() {
        let asks = chat(json!({
            "n": 2, "top_p": 0.5, "user": "me", "logprobs": false, "stop": "\n", "tools": null,
            "max_completion_tokens": 7, "max_tokens": 9, "seed": 3, "temperature": 0,
            "frequency_penalty": 0, "response_format": {"type": "text"}, "stream": null,
        }))
        .unwrap();
        assert_eq!(asks.len(), 2);
        assert_eq!(asks[0].sampling.max_tokens, 7);
        assert_eq!(asks[0].sampling.seed, Some(3));
        assert_ne!(asks[0].sampling.seed, asks[1].sampling.seed);
        assert_eq!(asks[0].sampling.stop, ["\n"]);
        assert_eq!(asks[0].logprobs, None);
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let asks = chat(json!({"messages": [{"role": "user", "content": parts}]})).unwrap();
        let Prompt::Chat(messages) = &asks[0].prompt else {
            unreachable!("it was a chat");
        };
        assert_eq!(messages[0].content, "ab");
        let asks = chat(json!({"logprobs": true, "top_logprobs": 3})).unwrap();
        assert_eq!(asks[0].logprobs, Some(3));
    }

    #[test]
    fn a_closed_schema_is_a_list_of_choices() {
        let format = json!({"type": "json_schema", "json_schema": {
            "name": "x", "strict": true, "schema": {"enum": ["a", "b"]},
        }});
        let asks = chat(json!({"response_format": format})).unwrap();
        assert_eq!(asks[0].choices.as_ref().unwrap().values, ["\"a\"", "\"b\""]);
    }

    #[test]
    fn what_would_change_the_answer_is_refused() {
        for more in [
            json!({"n": 0}),
            json!({"n": 99}),
            json!({"tools": [{"type": "function"}]}),
            json!({"guided_choice": ["a", "b"]}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x",
                "schema": {"type": "string"}}}}),
            json!({"temperature": 3}),
            json!({"top_p": 2}),
            json!({"max_tokens": 0}),
            json!({"messages": []}),
            json!({"top_logprobs": 2}),
            json!({"logprobs": true, "top_logprobs": 21}),
            json!({"stop": [""]}),
            json!({"structured_outputs": {"choice": []}}),
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ] {
            assert!(chat(more.clone()).is_err(), "{more}");
        }
    }
}
