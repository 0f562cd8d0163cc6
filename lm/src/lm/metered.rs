//! [`Metered`]: a model whose calls, tokens and costs are counted. Changes no answer.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Completion, Lm, LmError, OnAnswer, Request};

/// US dollars for a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Of prompts.
    pub input: f64,
    /// Of answers.
    pub output: f64,
}

impl Prices {
    /// What so many tokens cost, in US dollars.
    pub fn cost(&self, prompt: u64, completion: u64) -> f64 {
        (self.input * prompt as f64 + self.output * completion as f64) / 1e6
    }
}

/// What was used.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Requests that came to an end, cached and failed ones included.
    pub calls: u64,
    /// Of them, taken from the completion cache.
    pub cached: u64,
    /// Of them, failed.
    pub failed: u64,
    /// Of the failed ones, those that the model could not be reached for.
    pub unavailable: u64,
    /// Tokens of prompts that were computed, not cached.
    pub prompt_tokens: u64,
    /// Tokens generated, not cached.
    pub completion_tokens: u64,
    /// US dollars for these tokens, where prices are known.
    pub cost: Option<f64>,
}

impl Usage {
    /// Tokens of prompts and answers together.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.cached += other.cached;
        self.failed += other.failed;
        self.unavailable += other.unavailable;
        // Counts are the word of servers.
        self.prompt_tokens = self.prompt_tokens.saturating_add(other.prompt_tokens);
        self.completion_tokens = self
            .completion_tokens
            .saturating_add(other.completion_tokens);
        self.cost = match (self.cost, other.cost) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
    }
}

/// A model with a meter; on top of [`super::Cached`] it tells kept answers from paid ones.
pub struct Metered {
    lm: Arc<dyn Lm>,
    prices: Option<Prices>,
    counted: Mutex<Usage>,
    first_error: OnceLock<Box<LmError>>,
    barred: OnceLock<Box<LmError>>,
    lost: Mutex<Option<LmError>>,
}

impl Metered {
    /// `lm` with a meter at zero.
    pub fn new(lm: Arc<dyn Lm>, prices: Option<Prices>) -> Self {
        Self {
            lm,
            prices,
            counted: Mutex::default(),
            first_error: OnceLock::new(),
            barred: OnceLock::new(),
            lost: Mutex::default(),
        }
    }

    /// The error of all calls, where not one was answered.
    pub fn refused(&self) -> Option<&LmError> {
        let counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let none = counted.failed == counted.calls;
        self.first_error.get().filter(|_| none).map(Box::as_ref)
    }

    /// Why the model answers no more calls, if it does not.
    pub fn barred(&self) -> Option<&LmError> {
        self.barred.get().map(Box::as_ref)
    }

    /// Why the last call got no answer that the model could not be reached for: of an outage, what
    /// ended it.
    pub fn lost(&self) -> Option<LmError> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.clone()
    }

    /// What was used so far, by all threads together.
    pub fn totals(&self) -> Usage {
        let counted = *self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let cost = |prices: &Prices| prices.cost(counted.prompt_tokens, counted.completion_tokens);
        Usage {
            cost: self.prices.as_ref().map(cost),
            ..counted
        }
    }

    fn count(&self, answer: &Result<Completion, LmError>) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.calls += 1;
        match answer {
            Err(error) => {
                counted.failed += 1;
                self.first_error.get_or_init(|| Box::new(error.clone()));
                if matches!(error, LmError::Unavailable(_) | LmError::ServerError(_)) {
                    counted.unavailable += 1;
                    let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
                    *lost = Some(error.clone());
                }
                if matches!(error, LmError::Barred(_) | LmError::NoModel(_)) {
                    self.barred.get_or_init(|| Box::new(error.clone()));
                }
            }
            Ok(completion) if completion.cached => counted.cached += 1,
            Ok(completion) => {
                counted.prompt_tokens = counted
                    .prompt_tokens
                    .saturating_add(completion.prompt_tokens);
                counted.completion_tokens = counted
                    .completion_tokens
                    .saturating_add(completion.completion_tokens);
            }
        }
    }
}

impl Lm for Metered {
    fn id(&self) -> &str {
        self.lm.id()
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        self.lm.complete(requests, &|index, answer| {
            self.count(answer);
            on_answer(index, answer);
        })
    }

    fn bar(&self, why: &LmError) {
        self.lm.bar(why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::{Message, Role, Sampling};
    use crate::testing::{answer_each, completion};

    /// Says `cached` or `bad` of itself.
    struct Script;

    impl Lm for Script {
        fn id(&self) -> &str {
            "script"
        }

        fn complete(
            &self,
            requests: &[Request],
            on_answer: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            answer_each(requests, on_answer, |request| {
                match request.messages[0].content.as_str() {
                    "bad" => Err(LmError::Rejected("no".into())),
                    text => Ok(Completion {
                        prompt_tokens: 1000,
                        completion_tokens: 10,
                        cached: text == "cached",
                        ..completion(text)
                    }),
                }
            })
        }
    }

    /// Says that it used more than there can be.
    struct Liar;

    impl Lm for Liar {
        fn id(&self) -> &str {
            "liar"
        }

        fn complete(
            &self,
            requests: &[Request],
            on_answer: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            answer_each(requests, on_answer, |_| {
                Ok(Completion {
                    prompt_tokens: u64::MAX,
                    completion_tokens: u64::MAX,
                    ..completion("x")
                })
            })
        }
    }

    #[test]
    fn counts_without_measure_do_not_wrap() {
        let metered = Metered::new(Arc::new(Liar), None);
        let request = Request {
            messages: Vec::new(),
            sampling: Sampling::default(),
            choices: None,
        };
        metered.complete(&[request.clone(), request], &|_, _| {});
        let mut totals = metered.totals();
        totals += metered.totals();
        assert_eq!(
            (
                totals.prompt_tokens,
                totals.completion_tokens,
                totals.tokens()
            ),
            (u64::MAX, u64::MAX, u64::MAX)
        );
    }

    #[test]
    fn only_what_was_computed_costs() {
        let prices = Prices {
            input: 2.0,
            output: 10.0,
        };
        let metered = Metered::new(Arc::new(Script), Some(prices));
        let requests: Vec<Request> = ["a", "cached", "bad", "b"]
            .map(|text| Request {
                messages: vec![Message {
                    role: Role::User,
                    content: text.into(),
                }],
                sampling: Sampling::default(),
                choices: None,
            })
            .into();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| metered.complete(&requests, &|_, _| {}));
            }
        });
        let expected = Usage {
            calls: 16,
            cached: 4,
            failed: 4,
            unavailable: 0,
            prompt_tokens: 8000,
            completion_tokens: 80,
            cost: Some(0.0168),
        };
        assert_eq!(metered.totals(), expected);
        let unpriced = Metered::new(Arc::new(Script), None);
        assert_eq!(unpriced.totals(), Usage::default());
    }
}
