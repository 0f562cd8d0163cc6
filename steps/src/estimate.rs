//! What the calls of a step would cost: the program is run over its rows against nothing, so that
//! every prompt is written as it would be sent, and those with a kept answer are told apart.

use std::sync::{Arc, Mutex, PoisonError};

use flowrun_cache::CompletionCache;
use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_lm::client::{OpenAiSpec, Prices, answer_tokens, model_id};
use flowrun_lm::lm::{Cached, Completion, Lm, LmError, OnAnswer, Request, prompt_tokens};
use flowrun_lm::program::RunOptions;
use serde_json::Value;

use crate::answer::{SamplingSpec, examples};
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
    let stages = program.predictors.len() > 1 && program.votes.is_none();
    if !saved.neighbours.is_empty() || stages {
        return None;
    }
    let tally = Tally::new(spec, (given.completions)());
    let rows = examples(calls.rows, calls.file.label_field());
    let results = program.run(
        &tally,
        &calls.sampling.into(),
        &rows,
        &RunOptions::default(),
    );
    drop(results);
    let seen = tally
        .seen
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    Some(seen.estimate(spec.prices))
}

fn as_before(spec: &OpenAiSpec, given: &Foresight<'_>) -> Estimate {
    let number = |name: &str| given.earlier.and_then(|metrics| metrics.get(name));
    // Where all answers were kept, nothing is known of what they cost once.
    let tokens = number("tokens").and_then(Value::as_u64).filter(|n| *n > 0);
    let Some(tokens) = tokens else {
        return Estimate {
            uses: "calls of a model, how many is not known before".to_owned(),
            unknown: spec.prices.is_some(),
            ..Estimate::default()
        };
    };
    Estimate {
        uses: format!("{tokens} tokens, as an earlier result of it"),
        usd: number("cost_usd").and_then(Value::as_f64),
        ..Estimate::default()
    }
}

/// Requests that would be sent, and kept answers.
#[derive(Default)]
struct Seen {
    requests: u64,
    prompt: u64,
    /// Tokens of answers at most.
    at_most: u64,
    kept: u64,
    kept_completion: u64,
}

impl Seen {
    fn estimate(&self, prices: Option<Prices>) -> Estimate {
        let Self {
            requests,
            prompt,
            at_most,
            kept,
            ..
        } = *self;
        if requests == 0 {
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
        let also = match kept {
            0 => String::new(),
            kept => format!(", {kept} answers are kept"),
        };
        let cost = |completion| prices.map(|prices| prices.cost(prompt, completion));
        Estimate {
            uses: format!("{requests} requests, about {prompt} tokens of prompts, {answers}{also}"),
            usd: completion.and_then(cost),
            usd_at_most: cost(at_most),
            unknown: false,
        }
    }
}

/// A model that answers nothing but what is kept, and counts.
struct Tally<'a> {
    spec: &'a OpenAiSpec,
    kept: Cached,
    seen: Mutex<Seen>,
}

impl<'a> Tally<'a> {
    fn new(spec: &'a OpenAiSpec, completions: Arc<CompletionCache>) -> Self {
        let id = model_id(spec);
        Self {
            spec,
            kept: Cached::new(Arc::new(Nobody { id }), completions),
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
                    seen.at_most += answer_tokens(self.spec, request);
                }
            }
        }
        answers
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
