//! The JSON of chat completions, as OpenAI's API reference gives it. Knows no HTTP.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::lm::{Completion, FinishReason, Request};

/// Characters of a server's text that an error shows.
const SHOWN: usize = 300;

/// The body of a request. `choices` have no place in OpenAI's API and are left out; the answer
/// is parsed as any other.
pub(super) fn body(model: &str, request: &Request) -> Value {
    let sampling = &request.sampling;
    let mut body = json!({
        "model": model,
        "messages": request.messages,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    });
    if let Some(fields) = body.as_object_mut() {
        if !sampling.stop.is_empty() {
            fields.insert("stop".into(), json!(sampling.stop));
        }
        if let Some(seed) = sampling.seed {
            fields.insert("seed".into(), json!(seed));
        }
    }
    body
}

#[derive(Deserialize)]
struct Body {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    refusal: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

/// Reads an answer.
pub(super) fn completion(bytes: &[u8]) -> Result<Completion, String> {
    let bad = |why: &dyn std::fmt::Display| {
        format!("the answer cannot be read ({why}): {}", shown(bytes))
    };
    let body: Body = serde_json::from_slice(bytes).map_err(|e| bad(&e))?;
    let choice = body.choices.into_iter().next();
    let choice = choice.ok_or_else(|| bad(&"it has no choices"))?;
    let refused = choice.message.content.is_none() && choice.message.refusal.is_some();
    let finish = match choice.finish_reason.as_deref() {
        _ if refused => FinishReason::ContentFilter,
        Some("length") => FinishReason::Length,
        Some("content_filter") => FinishReason::ContentFilter,
        _ => FinishReason::Stop,
    };
    let usage = body.usage.unwrap_or(Usage {
        prompt_tokens: 0,
        completion_tokens: 0,
    });
    Ok(Completion {
        text: choice.message.content.unwrap_or_default(),
        finish,
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        choice_probs: None,
        cached: false,
    })
}

/// The message in an error's body: OpenAI's, vLLM's or FastAPI's, else the text itself.
pub(super) fn error_text(bytes: &[u8]) -> String {
    let body: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let places = ["/error/message", "/message", "/detail", "/error"];
    let text = places.iter().find_map(|at| body.pointer(at)?.as_str());
    text.map_or_else(|| shown(bytes), str::to_owned)
}

fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().take(SHOWN).collect()
}
