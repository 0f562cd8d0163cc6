//! What the calls of a step would cost: the program is run over its rows against nothing, so that
//! every prompt is written as it would be sent, and those with a kept answer are told apart. What is
//! likely and what is the bound are counted apart: for the bound a request has its worst case, as
//! `budget` takes it.

use std::sync::{Arc, Mutex, PoisonError};

use flowrun_cache::CompletionCache;
use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_lm::client::{OpenAiSpec, Prices, model_id, worst_case};
use flowrun_lm::lm::{
    Cached, Completion, FinishReason, Lm, LmError, OnAnswer, Request, Spending, prompt_tokens,
};
use flowrun_lm::program::{Program, RunOptions};
use serde_json::Value;

use crate::answer::{KEPT_ANSWERS, SamplingSpec, examples};
use crate::models::ModelSpec;
use crate::program_file::ProgramFile;
use crate::rows::Row;

/// What a program would ask of a model.
pub(crate) struct Calls<'a> {
    pub(crate) file: &'a ProgramFile,
    pub(crate) sampling: SamplingSpec,
    pub(crate) rows: &'a [Row],
}

/// The server that a step asks, if it asks one: a model of this machine costs time alone.
pub(crate) fn server(model: Option<&ModelSpec>) -> Option<&OpenAiSpec> {
    match model? {
        ModelSpec::OpenAi(spec) => Some(spec),
        ModelSpec::Embedded(_) | ModelSpec::SentenceEncoder(_) => None,
    }
}

/// The cost of calls, where the rows are known; else that of the nearest earlier result.
pub(crate) fn estimate(
    spec: &OpenAiSpec,
    calls: Option<Calls<'_>>,
    given: &Foresight<'_>,
) -> Estimate {
    let counted = calls.and_then(|calls| count(spec, &calls, given));
    counted.unwrap_or_else(|| as_before(spec, given))
}

fn count(spec: &OpenAiSpec, calls: &Calls<'_>, given: &Foresight<'_>) -> Option<Estimate> {
    let (saved, program) = calls.file.prompt().ok()?;
    // What demos are chosen is known only with the encoder at hand; what a later stage is asked,
    // only with the answers of the one before.
    let stages = match &program.votes {
        Some(votes) => votes.members.iter().any(|stages| *stages > 1),
        None => program.predictors.len() > 1,
    };
    if !saved.neighbours.is_empty() || stages {
        return None;
    }
    let seen = |worst| asked(spec, &program, calls, given, worst);
    let likely = seen(false);
    // An answer that cannot be read is asked for once more, in another format.
    let mut formats = program.predictors.iter().map(|p| p.adapter.fallback());
    let bound = match formats.any(|other| other.is_some()) {
        true => seen(true),
        false => likely,
    };
    Some(likely.estimate(&bound, spec.prices))
}

/// What is asked for the rows; in the `worst` case no answer can be read but those that are kept.
fn asked(
    spec: &OpenAiSpec,
    program: &Program,
    calls: &Calls<'_>,
    given: &Foresight<'_>,
    worst: bool,
) -> Seen {
    let tally = Tally::new(spec, (given.completions)(), worst);
    let rows = examples(calls.rows, calls.file.label_field());
    let options = RunOptions::default();
    program.run(&tally, &calls.sampling.into(), &rows, &options);
    tally
        .seen
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
}

fn as_before(spec: &OpenAiSpec, given: &Foresight<'_>) -> Estimate {
    let number = |name: &str| given.earlier.and_then(|metrics| metrics.get(name));
    // Where all answers were kept, nothing is known of what they cost once.
    let tokens = number("tokens").and_then(Value::as_u64).filter(|n| *n > 0);
    let unknown = |uses: String| Estimate {
        uses,
        unknown: spec.prices.is_some(),
        ..Estimate::default()
    };
    let Some(tokens) = tokens else {
        return unknown("calls of a model, how many is not known before".to_owned());
    };
    let kept = number(KEPT_ANSWERS).and_then(Value::as_u64).unwrap_or(0);
    if kept > 0 {
        return unknown(format!(
            "an earlier result of it used {tokens} tokens beside {kept} kept answers; without \
             them it uses more"
        ));
    }
    Estimate {
        uses: format!("{tokens} tokens, as an earlier result of it"),
        usd: number("cost_usd").and_then(Value::as_f64),
        ..Estimate::default()
    }
}

/// Requests that would be sent, and kept answers.
#[derive(Clone, Copy, Default)]
struct Seen {
    requests: u64,
    /// Tokens of prompts, roughly.
    prompt: u64,
    /// Each with its worst case.
    at_most: Spending,
    kept: u64,
    kept_completion: u64,
}

impl Seen {
    /// `bound` is what was seen in the worst case.
    fn estimate(&self, bound: &Self, prices: Option<Prices>) -> Estimate {
        let Self {
            requests,
            prompt,
            kept,
            ..
        } = *self;
        let at_most = bound.at_most.completion;
        if bound.requests == 0 {
            return Estimate {
                uses: format!("all {kept} answers are kept"),
                usd: prices.map(|_| 0.0),
                usd_at_most: prices.map(|_| 0.0),
                unknown: false,
            };
        }
        // As long as the kept ones, where there are some.
        let mean = self.kept_completion.checked_div(kept).filter(|n| *n > 0);
        let completion = mean.map(|mean| (mean * requests).min(at_most));
        let answers = match completion {
            Some(completion) => format!("about {completion} tokens of answers"),
            None => format!("at most {at_most} tokens of answers"),
        };
        let mut also = match bound.requests.saturating_sub(requests) {
            0 => String::new(),
            more => format!(", {more} more requests where answers cannot be read"),
        };
        if kept > 0 {
            also += &format!(", {kept} answers are kept");
        }
        let cost = |completion| prices.map(|prices| prices.cost(prompt, completion));
        Estimate {
            uses: format!("{requests} requests, about {prompt} tokens of prompts, {answers}{also}"),
            usd: completion.and_then(cost),
            usd_at_most: prices.map(|prices| prices.cost(bound.at_most.prompt, at_most)),
            unknown: false,
        }
    }
}

/// A model that answers nothing but what is kept, and counts.
struct Tally<'a> {
    spec: &'a OpenAiSpec,
    kept: Cached,
    /// Whether all else is answered by what cannot be read.
    worst: bool,
    seen: Mutex<Seen>,
}

impl<'a> Tally<'a> {
    fn new(spec: &'a OpenAiSpec, completions: Arc<CompletionCache>, worst: bool) -> Self {
        let id = model_id(spec);
        Self {
            spec,
            kept: Cached::new(Arc::new(Nobody { id }), completions),
            worst,
            seen: Mutex::default(),
        }
    }
}

impl Lm for Tally<'_> {
    fn id(&self) -> &str {
        self.kept.id()
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let answers = self.kept.complete(requests, on_answer);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (request, answer) in requests.iter().zip(&answers) {
            match answer {
                Ok(completion) => {
                    seen.kept += 1;
                    seen.kept_completion += completion.completion_tokens;
                }
                Err(_) => {
                    seen.requests += 1;
                    seen.prompt += prompt_tokens(request);
                    let most = worst_case(self.spec, request);
                    seen.at_most.prompt += most.prompt;
                    seen.at_most.completion += most.completion;
                }
            }
        }
        let answer = |answer: Result<Completion, LmError>| match answer {
            Err(_) if self.worst => Ok(unreadable()),
            answer => answer,
        };
        answers.into_iter().map(answer).collect()
    }
}

/// An answer without a field.
fn unreadable() -> Completion {
    Completion {
        text: String::new(),
        finish: FinishReason::Stop,
        prompt_tokens: 0,
        completion_tokens: 0,
        choice_probs: None,
        cached: false,
    }
}

/// Nobody to ask.
struct Nobody {
    id: String,
}

impl Lm for Nobody {
    fn id(&self) -> &str {
        &self.id
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let answer = |(index, _): (usize, &Request)| {
            let answer = Err(LmError::Rejected("it is only estimated".to_owned()));
            on_answer(index, &answer);
            answer
        };
        requests.iter().enumerate().map(answer).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use flowrun_lm::program::ProgramSpec;
    use serde_json::json;

    fn spec() -> OpenAiSpec {
        let prices = json!({"input": 1.0, "output": 10.0});
        let spec = json!({"base_url": "http://h/v1", "model": "m", "prices": prices});
        serde_json::from_value(spec).unwrap()
    }

    fn prompt(format: &str) -> Value {
        json!({"predict": {"format": format, "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}})
    }

    fn estimated(program: Value, earlier: Option<&BTreeMap<String, Value>>) -> Estimate {
        let program: ProgramSpec = serde_json::from_value(program).unwrap();
        let file = ProgramFile::plain(&program, &["a".to_owned(), "b".to_owned()]).unwrap();
        let rows: Vec<Row> = ["x", "ÄÖÜ"]
            .iter()
            .map(|text| serde_json::from_value(json!({"id": *text, "text": *text})).unwrap())
            .collect();
        let given = Foresight {
            params: &Value::Null,
            inputs: None,
            completions: &|| Arc::new(CompletionCache::in_memory()),
            earlier,
        };
        let calls = Calls {
            file: &file,
            sampling: SamplingSpec::default(),
            rows: &rows,
        };
        estimate(&spec(), Some(calls), &given)
    }

    #[test]
    fn the_bound_takes_a_token_for_each_byte_and_a_second_format_into_account() {
        let one = estimated(prompt("dspy-2.5"), None);
        assert!(one.uses.starts_with("2 requests, about"), "{}", one.uses);
        let bound = one.usd_at_most.unwrap();
        // 2,000 tokens of answers at $10, and the prompts.
        assert!(bound > 0.02 && bound < 0.03, "{bound}");
        let two = estimated(prompt("dspy-3"), None);
        assert!(two.uses.starts_with("2 requests, about"), "{}", two.uses);
        let more = "at most 4000 tokens of answers, 2 more requests where answers cannot be read";
        assert!(two.uses.contains(more), "{}", two.uses);
        assert!(two.usd_at_most.unwrap() > 0.04);
    }

    #[test]
    fn stages_are_not_counted_within_votes_either() {
        let votes = |program: Value| json!({"majority": {"samples": 3, "programs": [program]}});
        let six = estimated(votes(prompt("dspy-2.5")), None);
        assert!(six.uses.starts_with("6 requests, about"), "{}", six.uses);
        let fields = |input: &str, output: &str| json!({"inputs": [{"name": input}], "outputs": [{"name": output}]});
        let label = json!({"inputs": [{"name": "topic"}],
            "outputs": [{"name": "label", "type": "label"}]});
        let stages = json!({"stages": [
            {"name": "first", "predict": fields("text", "topic")},
            {"name": "second", "predict": label},
        ]});
        let staged = estimated(votes(stages), None);
        assert!(staged.unknown && staged.usd_at_most.is_none(), "{staged:?}");
    }

    #[test]
    fn an_earlier_result_that_took_kept_answers_says_no_price() {
        let stages = json!({"stages": [
            {"name": "first", "predict": {"inputs": [{"name": "text"}],
                "outputs": [{"name": "topic"}]}},
            {"name": "second", "predict": {"inputs": [{"name": "topic"}],
                "outputs": [{"name": "label", "type": "label"}]}},
        ]});
        let mut earlier = BTreeMap::from([
            ("tokens".to_owned(), json!(100)),
            ("cost_usd".to_owned(), json!(0.5)),
        ]);
        let before = estimated(stages.clone(), Some(&earlier));
        assert_eq!((before.usd, before.unknown), (Some(0.5), false));
        earlier.insert(KEPT_ANSWERS.to_owned(), json!(40));
        let before = estimated(stages, Some(&earlier));
        assert_eq!((before.usd, before.unknown), (None, true));
        assert!(
            before.uses.contains("beside 40 kept answers"),
            "{}",
            before.uses
        );
    }
}
