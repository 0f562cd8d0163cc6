//! Models that the recordings were made with: a script, and the deterministic fake whose answers
//! depend on a hash of the prompt.

use super::banking77::Banking77;
use flowrun_lm::lm::{Completion, FinishReason, Lm, LmError, Message, OnAnswer, Request, Role};
use flowrun_lm::value::float_repr;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::sync::Mutex;

/// Answers by a function.
pub(crate) struct Scripted<F>(F);

impl<F: Fn(&Request) -> String + Send + Sync> Scripted<F> {
    pub(crate) fn new(answer: F) -> Self {
        Self(answer)
    }
}

impl<F: Fn(&Request) -> String + Send + Sync> Lm for Scripted<F> {
    fn id(&self) -> &str {
        "scripted"
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let answer = |(index, request): (usize, &Request)| {
            let answer = Ok(Completion {
                text: (self.0)(request),
                finish: FinishReason::Stop,
                prompt_tokens: 0,
                completion_tokens: 0,
                choice_probs: None,
                cached: false,
            });
            on_answer(index, &answer);
            answer
        };
        requests.iter().enumerate().map(answer).collect()
    }
}

/// Settings of the fake, as recorded.
#[derive(Deserialize)]
pub(crate) struct FakeSpec {
    salt: String,
    base: u64,
    per_demo: u64,
    malformed: u64,
    key: String,
    field: String,
    #[serde(default)]
    two_stage: bool,
}

/// One call: start of the prompt's hash, demos, temperature, kind of answer.
pub(crate) type Call = (String, usize, String, String);

/// The fake, with a log of its calls.
pub(crate) struct FakeLm<'a> {
    spec: &'a FakeSpec,
    data: &'a Banking77,
    pub(crate) calls: Mutex<Vec<Call>>,
}

impl<'a> FakeLm<'a> {
    pub(crate) fn new(spec: &'a FakeSpec, data: &'a Banking77) -> Self {
        Self {
            spec,
            data,
            calls: Mutex::default(),
        }
    }

    fn answer(&self, request: &Request) -> String {
        let messages = &request.messages;
        let demos = messages
            .iter()
            .filter(|m| m.role == Role::Assistant)
            .count();
        let temperature = float_repr(request.sampling.temperature);
        let (text, kind) = self.reply(messages, demos, &temperature);
        let prompt = hex(&serde_json::to_string(messages).unwrap());
        let call = (prompt[..16].to_owned(), demos, temperature, kind.to_owned());
        self.calls.lock().unwrap().push(call);
        text
    }

    fn reply(&self, messages: &[Message], demos: usize, temperature: &str) -> (String, &str) {
        if messages[0]
            .content
            .contains("Outputs will be a JSON object")
        {
            return ("not json".to_owned(), "json");
        }
        let key = self.key(messages, demos, temperature);
        if first_eight(&format!("fmt\u{1f}{key}")) % 1000 < self.spec.malformed {
            let text = "[[ ## reasoning ## ]]\nI am not sure.\n\n[[ ## completed ## ]]";
            return (text.to_owned(), "malformed");
        }
        let query = messages.last().map_or("", |m| m.content.as_str());
        let gold = self.data.row(self.user_text(query));
        let gold = gold.text("label").unwrap();
        if self.spec.two_stage && asks_for_topic(query) {
            let topic = gold.split('_').next().unwrap_or_default();
            let text = format!("[[ ## topic ## ]]\n{topic}\n\n[[ ## completed ## ]]");
            return (text, "topic");
        }
        let hash = first_eight(&key);
        let right = hash % 1000 < self.spec.base + self.spec.per_demo * demos as u64;
        let labels = &self.data.top25;
        let place = labels.iter().position(|label| label == gold).unwrap();
        let wrong = (place + 1 + (hash % 24) as usize) % labels.len();
        let label = if right { gold } else { &labels[wrong] };
        let reasoning = if self.spec.two_stage {
            String::new()
        } else {
            let spaced = label.replace('_', " ");
            format!("[[ ## reasoning ## ]]\nThe query is about {spaced}.\n\n")
        };
        let text = format!("{reasoning}[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]");
        (text, if right { "ok" } else { "wrong" })
    }

    fn key(&self, messages: &[Message], demos: usize, temperature: &str) -> String {
        let demos = demos.to_string();
        let mut parts = vec![self.spec.salt.as_str(), temperature];
        if self.spec.key == "full" {
            parts.extend(messages[1..].iter().map(|m| m.content.as_str()));
        } else {
            parts.push(&demos);
            let users = messages.iter().filter(|m| m.role == Role::User);
            parts.extend(users.map(|m| self.user_text(&m.content)));
        }
        parts.join("\u{1f}")
    }

    fn user_text<'t>(&self, content: &'t str) -> &'t str {
        let header = format!("[[ ## {} ## ]]\n", self.spec.field);
        let text = content.split_once(&header).map_or("", |(_, text)| text);
        let text = text.split("\n\n[[ ## ").next().unwrap_or_default();
        text.split("\n\nRespond with ").next().unwrap_or_default()
    }
}

impl Lm for FakeLm<'_> {
    fn id(&self) -> &str {
        "fake"
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        Scripted::new(|request: &Request| self.answer(request)).complete(requests, on_answer)
    }
}

fn asks_for_topic(query: &str) -> bool {
    ["`topic`", "`[[ ## topic ## ]]`"]
        .iter()
        .any(|name| query.contains(&format!("starting with the field {name}")))
}

/// The SHA-256 of a text, in hex.
pub(crate) fn hex(text: &str) -> String {
    let bytes = Sha256::digest(text.as_bytes());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn first_eight(text: &str) -> u64 {
    u64::from_str_radix(&hex(text)[..8], 16).unwrap()
}
