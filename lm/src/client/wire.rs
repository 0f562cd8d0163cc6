//! The JSON of chat completions, as OpenAI's API reference gives it. Knows no HTTP.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Guided, OpenAiSpec};
use crate::lm::{Completion, FinishReason, Request, Spending};

/// The one field of an answer that is an object.
const ANSWER: &str = "answer";
/// Ends of an answer that its server broke off (OpenRouter, vLLM, DeepSeek): it is none.
const BROKEN_OFF: [&str; 3] = ["error", "abort", "insufficient_system_resource"];
/// Characters of a server's text that an error shows.
const SHOWN: usize = 200;
/// Characters of a server's message that an error shows.
const LONGEST_MESSAGE: usize = 1000;

/// The body of a request. `choices` have no place in OpenAI's API: they are sent only to servers
/// known to take them, where they are the whole answer (`allowed`, see there).
pub(super) fn body(spec: &OpenAiSpec, request: &Request) -> Value {
    let sampling = &request.sampling;
    let mut body = json!({
        "model": spec.model,
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
        if let Some((name, value)) = restriction(spec, request) {
            fields.insert(name.into(), value);
        }
        if !spec.chat_template_kwargs.is_empty() {
            fields.insert(TEMPLATE.into(), json!(spec.chat_template_kwargs));
        }
        for (name, value) in &spec.body {
            match value {
                Value::Null => fields.remove(name),
                value => fields.insert(name.clone(), value.clone()),
            };
        }
    }
    body
}

/// The field that has the server give one of the allowed answers, in its own way.
fn restriction(spec: &OpenAiSpec, request: &Request) -> Option<(&'static str, Value)> {
    let texts = allowed(spec, request)?;
    Some(match spec.guided? {
        Guided::Vllm => ("structured_outputs", json!({ "choice": texts })),
        Guided::LlamaCpp => {
            let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
            let grammar = format!("root ::= {}", texts.join(" | "));
            ("grammar", json!(grammar))
        }
        Guided::JsonSchema => {
            let values = request.choices.as_ref().map(|choices| &choices.values);
            let schema = json!({
                "type": "object",
                "properties": { ANSWER: { "type": "string", "enum": values } },
                "required": [ANSWER],
                "additionalProperties": false,
            });
            let named = json!({ "name": ANSWER, "strict": true, "schema": schema });
            let format = json!({ "type": "json_schema", "json_schema": named });
            ("response_format", format)
        }
    })
}

/// Fields that bound an answer's tokens.
const BOUNDS: [&str; 2] = ["max_tokens", "max_completion_tokens"];

/// The most that a request may use. A server may count a schema, or what else `body` has it read
/// (tools, a prediction), as part of the prompt.
pub(super) fn worst_case(spec: &OpenAiSpec, request: &Request) -> Spending {
    let mut need = Spending::at_most(request);
    let choices = restriction(spec, request).map(|(_, value)| value);
    let texts = |value: &&Value| value.is_string() || value.is_array() || value.is_object();
    let more = choices
        .iter()
        .chain(spec.body.values().filter(texts))
        .map(|value| value.to_string().len() as u64);
    need.prompt += more.sum::<u64>();
    // A template may write it into the prompt.
    if !spec.chat_template_kwargs.is_empty() {
        need.prompt += json!(spec.chat_template_kwargs).to_string().len() as u64;
    }
    need.completion = bound(spec).unwrap_or(need.completion);
    need
}

/// The tokens of an answer that `body` allows.
fn bound(spec: &OpenAiSpec) -> Option<u64> {
    let bounds = BOUNDS
        .iter()
        .filter_map(|name| spec.body.get(*name)?.as_u64());
    bounds.max()
}

/// As many tokens as a request can be believed to have used, thoughts that its server does not
/// count to `max_tokens` included; none where `body` takes the bound away.
pub(super) fn credible(spec: &OpenAiSpec, request: &Request) -> Option<u64> {
    let unbounded = spec.body.get(BOUNDS[0]).is_some_and(Value::is_null) && bound(spec).is_none();
    let most = worst_case(spec, request).tokens().saturating_mul(2);
    (!unbounded).then_some(most)
}

/// What a server says that a request has used, unless it is more than `most` tokens: then nobody
/// knows.
pub(super) fn believed(used: Option<Spending>, most: Option<u64>) -> Option<Spending> {
    used.filter(|used| most.is_none_or(|most| used.tokens() <= most))
}

/// Fields of the body that belong to the client.
const OWN: [&str; 4] = ["messages", "model", "n", "stream"];

/// The field of what the chat template is told.
const TEMPLATE: &str = "chat_template_kwargs";

/// The field of `body` that may not be there.
pub(super) fn misplaced(spec: &OpenAiSpec) -> Option<&'static str> {
    let told = (!spec.chat_template_kwargs.is_empty()).then_some(TEMPLATE);
    let mut own = OWN.into_iter().chain(told);
    own.find(|name| spec.body.contains_key(*name))
}

/// The text of an answer that came as an object; another one stays as it is.
pub(super) fn unwrapped(spec: &OpenAiSpec, request: &Request, text: String) -> String {
    let choices = request.choices.as_ref();
    let Some(choices) = choices.filter(|_| spec.guided == Some(Guided::JsonSchema)) else {
        return text;
    };
    let object: Value = serde_json::from_str(&text).unwrap_or_default();
    match object[ANSWER].as_str() {
        Some(value) => format!("{value}{}", choices.then),
        None => text,
    }
}

/// The only answers that the server may give; anything else when `None`.
pub(super) fn allowed(spec: &OpenAiSpec, request: &Request) -> Option<Vec<String>> {
    let choices = request.choices.as_ref().filter(|_| spec.guided.is_some())?;
    let whole = choices.after.is_none() && !choices.values.is_empty();
    let text = |value: &String| format!("{value}{}", choices.then);
    whole.then(|| choices.values.iter().map(text).collect())
}

/// A text in llama.cpp's grammar language.
fn quoted(text: &str) -> String {
    let escaped = |c: char| match c {
        '"' | '\\' => format!("\\{c}"),
        '\n' => "\\n".to_owned(),
        '\r' => "\\r".to_owned(),
        '\t' => "\\t".to_owned(),
        c => c.to_string(),
    };
    format!("\"{}\"", text.chars().map(escaped).collect::<String>())
}

#[derive(Deserialize)]
struct Body {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    /// A text, or a list of parts.
    #[serde(default)]
    content: Value,
    #[serde(default)]
    refusal: Option<String>,
}

impl Message {
    /// The text; the parts of a reasoning model's thoughts are none of it. `None` when there is no
    /// content.
    fn text(&self) -> Result<Option<String>, &'static str> {
        match &self.content {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            Value::Array(parts) => {
                let texts = parts.iter().filter(|part| part["type"] == "text");
                Ok(Some(
                    texts.filter_map(|part| part["text"].as_str()).collect(),
                ))
            }
            _ => Err("its content is no text"),
        }
    }
}

/// Reads an answer.
pub(super) fn completion(bytes: &[u8]) -> Result<Completion, String> {
    let bad = |why: &dyn std::fmt::Display| {
        format!("the answer cannot be read ({why}): {}", shown(bytes))
    };
    let whole: Value = serde_json::from_slice(bytes).map_err(|e| bad(&e))?;
    // Counted as far as it can be read: an answer is not lost for its bill.
    let used = used(&whole).unwrap_or_default();
    let body: Body = serde_json::from_value(whole).map_err(|e| bad(&e))?;
    let choice = body.choices.into_iter().next();
    let choice = choice.ok_or_else(|| bad(&"it has no choices"))?;
    let reason = choice.finish_reason.as_deref().unwrap_or_default();
    if BROKEN_OFF.contains(&reason) {
        return Err(bad(&format!("the server broke it off: `{reason}`")));
    }
    let text = choice.message.text().map_err(|why| bad(&why))?;
    let refused = text.is_none() && choice.message.refusal.is_some();
    let finish = match choice.finish_reason.as_deref() {
        _ if refused => FinishReason::ContentFilter,
        Some("length") => FinishReason::Length,
        Some("content_filter") => FinishReason::ContentFilter,
        _ => FinishReason::Stop,
    };
    Ok(Completion {
        text: text.unwrap_or_default(),
        finish,
        prompt_tokens: used.prompt,
        completion_tokens: used.completion,
        choice_probs: None,
        cached: false,
    })
}

/// The model that an answer says it is of.
pub(super) fn model(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Named {
        #[serde(default)]
        model: Value,
    }
    let named: Named = serde_json::from_slice(bytes).ok()?;
    named.model.as_str().map(str::to_owned)
}

/// What an answer says that it used; `None` where its server does not count.
pub(super) fn used(body: &Value) -> Option<Spending> {
    let count = |name: &str| {
        let count = &body["usage"][name];
        // Some write `12.0`.
        let whole = count.as_f64().filter(|count| *count >= 0.0);
        let whole = whole.map(|count| count.round() as u64);
        count.as_u64().or(whole).unwrap_or(0)
    };
    let used = Spending {
        prompt: count("prompt_tokens"),
        completion: count("completion_tokens"),
    };
    (used != Spending::default()).then_some(used)
}

/// The message in an error's body: OpenAI's, vLLM's or FastAPI's, else the text itself.
pub(super) fn error_text(bytes: &[u8]) -> String {
    let body: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let places = ["/error/message", "/message", "/detail", "/error"];
    let text = places.iter().find_map(|at| body.pointer(at)?.as_str());
    text.map_or_else(
        || shown(bytes),
        |text| text.chars().take(LONGEST_MESSAGE).collect(),
    )
}

/// The code in an error's body, which says more than the status: OpenAI's `code`, else its `type`.
pub(super) fn error_code(bytes: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(bytes).ok()?;
    let places = ["/error/code", "/error/type", "/code"];
    let code = places.iter().find_map(|at| body.pointer(at)?.as_str())?;
    Some(code.to_owned())
}

/// The answer to a prompt that the provider does not let through: it is final, and costs nothing.
pub(super) fn withheld() -> Completion {
    Completion {
        text: String::new(),
        finish: FinishReason::ContentFilter,
        prompt_tokens: 0,
        completion_tokens: 0,
        choice_probs: None,
        cached: false,
    }
}

/// The beginning of a server's text, for people.
pub(super) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().take(SHOWN).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::lm::{Choices, Sampling};

    fn spec(guided: Value) -> OpenAiSpec {
        let spec = json!({"base_url": "http://h/v1", "model": "m", "guided": guided});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn what_the_template_is_told_is_sent_and_said_in_one_place() {
        let mut spec = spec(Value::Null);
        let told = json!({"enable_thinking": false});
        spec.chat_template_kwargs = serde_json::from_value(told.clone()).unwrap();
        assert_eq!(body(&spec, &request(None))["chat_template_kwargs"], told);
        assert_eq!(misplaced(&spec), None);
        let other = json!({"chat_template_kwargs": {}});
        spec.body = serde_json::from_value(other).unwrap();
        assert_eq!(misplaced(&spec), Some("chat_template_kwargs"));
    }

    fn request(after: Option<&str>) -> Request {
        Request {
            messages: Vec::new(),
            sampling: Sampling::default(),
            choices: Some(Choices {
                after: after.map(str::to_owned),
                values: vec!["a".into(), "b \"c\"\n".into()],
                then: ".".into(),
            }),
        }
    }

    #[test]
    fn choices_are_sent_only_where_they_are_the_whole_answer_and_the_server_knows_them() {
        let plain = json!({"model": "m", "messages": [], "temperature": 0.0, "max_tokens": 1000});
        assert_eq!(body(&spec(Value::Null), &request(None)), plain);
        assert_eq!(body(&spec(json!("vllm")), &request(Some("x"))), plain);
        let sent = body(&spec(json!("vllm")), &request(None));
        let choice = json!({"choice": ["a.", "b \"c\"\n."]});
        assert_eq!(sent["structured_outputs"], choice);
        let sent = body(&spec(json!("llama_cpp")), &request(None));
        assert_eq!(sent["grammar"], r#"root ::= "a." | "b \"c\"\n.""#);
    }

    #[test]
    fn further_fields_are_sent_and_null_leaves_one_out() {
        let mut spec = spec(Value::Null);
        let more = json!({"max_tokens": null, "max_completion_tokens": 7, "top_p": 0.5});
        spec.body = serde_json::from_value(more).unwrap();
        let sent = body(&spec, &request(None));
        assert_eq!(sent.get("max_tokens"), None);
        assert_eq!(
            (&sent["max_completion_tokens"], &sent["top_p"]),
            (&json!(7), &json!(0.5))
        );
        assert_eq!(worst_case(&spec, &request(None)).completion, 7);
        let twice = 2 * worst_case(&spec, &request(None)).tokens();
        assert_eq!(credible(&spec, &request(None)), Some(twice));
        assert_eq!(misplaced(&spec), None);
        spec.body.insert("stream".to_owned(), json!(true));
        assert_eq!(misplaced(&spec), Some("stream"));
        spec.body.remove("max_completion_tokens");
        assert_eq!(credible(&spec, &request(None)), None);
    }

    #[test]
    fn the_model_of_an_answer_is_read_where_it_is_a_name() {
        let of = |body: &str| model(body.as_bytes());
        assert_eq!(of(r#"{"model": "m", "choices": []}"#).as_deref(), Some("m"));
        for other in [r#"{"choices": []}"#, r#"{"model": 3}"#, "[]", "<html>"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn all_that_a_server_may_count_is_in_the_worst_case() {
        let plain = worst_case(&spec(Value::Null), &request(None));
        for (guided, field) in [
            ("vllm", "structured_outputs"),
            ("llama_cpp", "grammar"),
            ("json_schema", "response_format"),
        ] {
            let mut spec = spec(json!(guided));
            let sent = body(&spec, &request(None))[field].to_string().len() as u64;
            let need = worst_case(&spec, &request(None));
            assert_eq!(need.prompt, plain.prompt + sent, "{guided}");
            assert_eq!(need.completion, plain.completion);
            // It is not sent.
            assert_eq!(worst_case(&spec, &request(Some("x"))), plain);
            let tools = json!([{"type": "function"}]);
            spec.body.insert("tools".to_owned(), tools.clone());
            spec.body.insert("top_p".to_owned(), json!(0.5));
            let more = worst_case(&spec, &request(None)).prompt;
            assert_eq!(more, need.prompt + tools.to_string().len() as u64);
        }
    }

    #[test]
    fn an_answer_in_an_object_is_taken_out_of_it() {
        let spec = spec(json!("json_schema"));
        let sent = body(&spec, &request(None));
        let schema = &sent["response_format"]["json_schema"]["schema"];
        let values = json!(["a", "b \"c\"\n"]);
        assert_eq!(schema["properties"]["answer"]["enum"], values);
        let read = |text: &str| unwrapped(&spec, &request(None), text.to_owned());
        assert_eq!(read(r#"{"answer": "b \"c\"\n"}"#), "b \"c\"\n.");
        for other in ["a.", "[]", r#"{"answer": 3}"#, r#"{"answer": "a"#] {
            assert_eq!(read(other), other);
        }
        assert_eq!(
            body(&spec, &request(Some("x"))).get("response_format"),
            None
        );
    }

    #[test]
    fn answers_of_many_servers_are_read() {
        let read = |body: Value| completion(body.to_string().as_bytes()).unwrap();
        let answer = read(
            json!({"choices": [{"message": {"content": "x", "reasoning": null},
            "finish_reason": "length", "stop_reason": null}], "usage": null, "timings": {}}),
        );
        assert_eq!(
            (answer.text.as_str(), answer.finish),
            ("x", FinishReason::Length)
        );
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (0, 0));
        let parts = json!([
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": "a "}, {"type": "text", "text": "label"},
        ]);
        let answer = read(json!({"choices": [{"message": {"content": parts}}],
            "usage": {"prompt_tokens": 12.0, "completion_tokens": "many"}}));
        assert_eq!(answer.text, "a label");
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (12, 0));
        let odd = json!({"choices": [{"message": {"content": 3}}]}).to_string();
        assert!(completion(odd.as_bytes()).unwrap_err().contains("no text"));
        let choice = json!({"message": {"content": "half"}, "finish_reason": "abort"});
        let broken = json!({ "choices": [choice] }).to_string();
        let why = completion(broken.as_bytes()).unwrap_err();
        assert!(why.contains("broke it off: `abort`"), "{why}");
        let answer = read(json!({"choices": [{"message": {}}], "usage": {"prompt_tokens": 3}}));
        assert_eq!(
            (answer.text.as_str(), answer.finish),
            ("", FinishReason::Stop)
        );
        assert_eq!(answer.prompt_tokens, 3);
    }

    #[test]
    fn errors_of_many_servers_are_read() {
        for (body, text) in [
            (r#"{"error": {"message": "no", "code": 404}}"#, "no"),
            (r#"{"error": "Unauthorized"}"#, "Unauthorized"),
            (r#"{"detail": "Not Found"}"#, "Not Found"),
            (" plain text ", "plain text"),
        ] {
            assert_eq!(error_text(body.as_bytes()), text);
        }
        let long = format!(r#"{{"error": {{"message": "{}"}}}}"#, "x".repeat(5000));
        assert_eq!(error_text(long.as_bytes()).len(), LONGEST_MESSAGE);
    }
}
