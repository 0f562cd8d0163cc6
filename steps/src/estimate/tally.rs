//! [`Tally`]: a model that answers nothing but what is kept, and counts what it is asked.

use std::sync::{Arc, Mutex, PoisonError};

use flowrun_cache::CompletionCache;
use flowrun_engine::estimate::Estimate;
use flowrun_lm::client::{OpenAiSpec, Prices, model_id, worst_case};
use flowrun_lm::example::Example;
use flowrun_lm::lm::{
    Cached, Completion, FinishReason, Lm, LmError, OnAnswer, Request, Spending, prompt_tokens,
};
use flowrun_lm::program::{Program, RunOptions};

use crate::answer::SamplingSpec;

/// Requests that would be sent, and kept answers.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) requests: u64,
    /// Tokens of prompts, roughly.
    prompt: u64,
    /// Each with its worst case.
    pub(super) at_most: Spending,
    /// The longest prompt in its worst case.
    pub(super) longest: u64,
    kept: u64,
    kept_completion: u64,
}

impl Seen {
    /// `bound` is what was seen in the worst case.
    pub(super) fn estimate(&self, bound: &Self, prices: Option<Prices>) -> Estimate {
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
        let completion = mean.map(|mean| mean.saturating_mul(requests).min(at_most));
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
pub(super) struct Tally<'a> {
    spec: &'a OpenAiSpec,
    kept: Cached,
    /// Whether all else is answered by what cannot be read.
    worst: bool,
    seen: Mutex<Seen>,
}

impl<'a> Tally<'a> {
    pub(super) fn new(
        spec: &'a OpenAiSpec,
        completions: Arc<CompletionCache>,
        worst: bool,
    ) -> Self {
        let id = model_id(spec);
        Self {
            spec,
            kept: Cached::new(Arc::new(Nobody { id }), completions),
            worst,
            seen: Mutex::default(),
        }
    }

    /// Counts what the program asks for rows.
    pub(super) fn ask(&self, program: &Program, sampling: SamplingSpec, rows: &[Example]) {
        program.run(self, &sampling.into(), rows, &RunOptions::default());
    }

    /// All that was counted.
    pub(super) fn seen(&self) -> Seen {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
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
                    seen.kept_completion = seen
                        .kept_completion
                        .saturating_add(completion.completion_tokens);
                }
                Err(_) => {
                    seen.requests += 1;
                    seen.prompt += prompt_tokens(request);
                    let most = worst_case(self.spec, request);
                    seen.at_most.prompt += most.prompt;
                    seen.longest = seen.longest.max(most.prompt);
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
