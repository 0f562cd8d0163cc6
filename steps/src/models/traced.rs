//! What a step's trace is told of its calls of models: the attributes of OpenTelemetry's semantic
//! conventions for generative AI. Prompts and answers are no part of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use flowrun_engine::step::{StepContext, StepReporter, TraceSpan};
use flowrun_lm::client::{Call, OnCall};
use flowrun_lm::lm::{Completion, Lm, LmError, OnAnswer, Request};
use serde_json::{Value, json};

/// Who hears of the calls of a server's model, if the step is traced.
pub(super) fn on_call(step: Option<&StepContext>) -> Option<OnCall> {
    let reporter = Arc::clone(&step?.reporter);
    if !reporter.traces() {
        return None;
    }
    Some(Arc::new(move |call: &Call<'_>| {
        reporter.span(span_of(call))
    }))
}

/// A model of this process, which tells of each batch, if the step is traced: its requests are
/// computed together, and none has a time of its own.
pub(super) fn embedded(lm: Arc<dyn Lm>, name: String, step: Option<&StepContext>) -> Arc<dyn Lm> {
    match step.map(|step| &step.reporter).filter(|r| r.traces()) {
        Some(reporter) => Arc::new(Traced {
            lm,
            name,
            reporter: Arc::clone(reporter),
        }),
        None => lm,
    }
}

fn span_of(call: &Call<'_>) -> TraceSpan {
    let sampling = call.sampling;
    let mut attributes = BTreeMap::from([
        ("gen_ai.provider.name", json!("openai")),
        ("gen_ai.request.max_tokens", json!(sampling.max_tokens)),
        ("gen_ai.request.temperature", json!(sampling.temperature)),
        ("server.address", json!(call.host)),
        ("server.port", json!(call.port)),
    ]);
    if let Some(seed) = sampling.seed {
        attributes.insert("gen_ai.request.seed", json!(seed));
    }
    if let Ok(completion) = call.answer {
        let finish = json!([completion.finish]);
        attributes.insert("gen_ai.response.finish_reasons", finish);
        let (input, output) = (completion.prompt_tokens, completion.completion_tokens);
        attributes.insert("gen_ai.usage.input_tokens", json!(input));
        attributes.insert("gen_ai.usage.output_tokens", json!(output));
    }
    let failed = call.answer.as_ref().err().map(error_type);
    span(call.model, call.started_at, call.took, failed, attributes)
}

fn span(
    model: &str,
    started_at: SystemTime,
    took: Duration,
    failed: Option<&str>,
    attributes: BTreeMap<&str, Value>,
) -> TraceSpan {
    let both = [
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.model", json!(model)),
    ];
    let attributes = attributes.into_iter().chain(both);
    TraceSpan {
        name: format!("chat {model}"),
        started_at,
        took,
        failed: failed.map(str::to_owned),
        attributes: attributes
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    }
}

/// A word for the kind of error: its text may hold what nobody should read.
fn error_type(error: &LmError) -> &'static str {
    match error {
        LmError::Unavailable(_) => "unavailable",
        LmError::ServerError(_) => "server_error",
        LmError::Rejected(_) => "rejected",
        LmError::Barred(_) => "barred",
        LmError::NoModel(_) => "no_model",
        LmError::TooLong(_) => "context_length_exceeded",
        LmError::Cancelled => "cancelled",
    }
}

struct Traced {
    lm: Arc<dyn Lm>,
    name: String,
    reporter: Arc<dyn StepReporter>,
}

impl Lm for Traced {
    fn id(&self) -> &str {
        self.lm.id()
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let (started_at, started) = (SystemTime::now(), Instant::now());
        let answers = self.lm.complete(requests, on_answer);
        let good = || answers.iter().flatten();
        let input: u64 = good().map(|answer| answer.prompt_tokens).sum();
        let output: u64 = good().map(|answer| answer.completion_tokens).sum();
        let attributes = BTreeMap::from([
            ("gen_ai.provider.name", json!("flowrun")),
            ("gen_ai.usage.input_tokens", json!(input)),
            ("gen_ai.usage.output_tokens", json!(output)),
            ("flowrun.requests", json!(requests.len())),
        ]);
        let error = answers.iter().find_map(|answer| answer.as_ref().err());
        let failed = error.map(error_type);
        let took = started.elapsed();
        let span = span(&self.name, started_at, took, failed, attributes);
        self.reporter.span(span);
        answers
    }
}

#[cfg(test)]
mod tests {
    use flowrun_lm::lm::{FinishReason, Sampling};

    use super::*;

    #[test]
    fn a_call_is_told_by_the_names_of_the_conventions() {
        let answer = Ok(Completion {
            text: "an answer".to_owned(),
            finish: FinishReason::Length,
            prompt_tokens: 12,
            completion_tokens: 3,
            choice_probs: None,
            cached: false,
        });
        let sampling = Sampling::default();
        let mut call = Call {
            model: "m",
            host: "localhost",
            port: 8000,
            sampling: &sampling,
            started_at: SystemTime::UNIX_EPOCH,
            took: Duration::from_secs(1),
            answer: &answer,
        };
        let span = span_of(&call);
        assert_eq!(
            (span.name.as_str(), span.failed.as_deref()),
            ("chat m", None)
        );
        for (name, value) in [
            ("gen_ai.operation.name", json!("chat")),
            ("gen_ai.request.model", json!("m")),
            ("gen_ai.request.max_tokens", json!(1000)),
            ("gen_ai.response.finish_reasons", json!(["length"])),
            ("gen_ai.usage.input_tokens", json!(12)),
            ("gen_ai.usage.output_tokens", json!(3)),
            ("server.port", json!(8000)),
        ] {
            assert_eq!(span.attributes[name], value, "{name}");
        }
        let shown = format!("{span:?}");
        assert!(!shown.contains("an answer"), "{shown}");
        let error = Err(LmError::Rejected("a prompt".to_owned()));
        call.answer = &error;
        let span = span_of(&call);
        assert_eq!(span.failed.as_deref(), Some("rejected"));
        assert!(!span.attributes.contains_key("gen_ai.usage.input_tokens"));
    }
}
