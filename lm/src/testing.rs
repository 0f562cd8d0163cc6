//! What models of this package's tests have in common.

use crate::lm::{Completion, FinishReason, LmError, OnAnswer, Request};

/// Answers one request after the other, and tells each answer as it is there.
pub(crate) fn answer_each(
    requests: &[Request],
    on_answer: &OnAnswer<'_>,
    answer: impl Fn(&Request) -> Result<Completion, LmError>,
) -> Vec<Result<Completion, LmError>> {
    let told = |(index, request): (usize, &Request)| {
        let answer = answer(request);
        on_answer(index, &answer);
        answer
    };
    requests.iter().enumerate().map(told).collect()
}

/// An answer that is complete: one token for the prompt, one for the text.
pub(crate) fn completion(text: &str) -> Completion {
    Completion {
        text: text.to_owned(),
        finish: FinishReason::Stop,
        prompt_tokens: 1,
        completion_tokens: 1,
        choice_probs: None,
        cached: false,
    }
}
