//! [`Cached`]: a model whose answers are kept, so that none is computed or paid for twice.
//!
//! An answer's key is the model's id with the whole request, the rollout included. Errors are not
//! kept. Invariant: an answer is in the store before the caller hears of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use flowrun_cache::{CompletionCache, Digest};
use serde_json::json;

use super::{Completion, Lm, LmError, OnAnswer, Request};

/// A model with a memory.
pub struct Cached {
    lm: Arc<dyn Lm>,
    store: Arc<CompletionCache>,
}

impl Cached {
    /// `lm`, asked only for what `store` does not know.
    pub fn new(lm: Arc<dyn Lm>, store: Arc<CompletionCache>) -> Self {
        Self { lm, store }
    }

    fn key(&self, request: &Request) -> Digest {
        Digest::of_record(
            "completion-v1",
            &json!({ "model": self.lm.id(), "request": request }),
        )
    }

    fn known(&self, key: &Digest) -> Option<Completion> {
        let value = self.store.get(key)?;
        let mut completion: Completion = serde_json::from_value(value).ok()?;
        completion.cached = true;
        Some(completion)
    }

    fn keep(&self, key: &Digest, answer: &Completion) {
        let stored = serde_json::to_value(answer)
            .map_err(|e| e.to_string())
            .and_then(|value| self.store.put(key, &value).map_err(|e| e.to_string()));
        if let Err(why) = stored {
            tracing::warn!("an answer could not be kept and will be asked for again: {why}");
        }
    }
}

impl Lm for Cached {
    fn id(&self) -> &str {
        self.lm.id()
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let mut answers: Vec<Option<Result<Completion, LmError>>> =
            requests.iter().map(|_| None).collect();
        let mut asked: Vec<(Digest, Vec<usize>)> = Vec::new();
        let mut places: BTreeMap<Digest, usize> = BTreeMap::new();
        for (index, request) in requests.iter().enumerate() {
            let key = self.key(request);
            if let Some(known) = self.known(&key) {
                let answer = Ok(known);
                on_answer(index, &answer);
                answers[index] = Some(answer);
                continue;
            }
            // Equal requests of one call are asked once.
            let place = *places.entry(key).or_insert_with(|| {
                asked.push((key, Vec::new()));
                asked.len() - 1
            });
            asked[place].1.push(index);
        }
        let new: Vec<Request> = asked
            .iter()
            .map(|(_, indices)| requests[indices[0]].clone())
            .collect();
        let tell = |place: usize, answer: &Result<Completion, LmError>| {
            let (key, indices) = &asked[place];
            if let Ok(completion) = answer {
                self.keep(key, completion);
            }
            for (copy, index) in indices.iter().enumerate() {
                on_answer(*index, &as_copy(answer, copy));
            }
        };
        if !new.is_empty() {
            let results = self.lm.complete(&new, &tell);
            for ((_, indices), answer) in asked.iter().zip(results) {
                for (copy, index) in indices.iter().enumerate() {
                    answers[*index] = Some(as_copy(&answer, copy));
                }
            }
        }
        let lost = || {
            Err(LmError::Unavailable(
                "the model left a call unanswered".into(),
            ))
        };
        answers
            .into_iter()
            .map(|answer| answer.unwrap_or_else(lost))
            .collect()
    }
}

/// The answer as its nth asker gets it: only the first one's was computed.
fn as_copy(answer: &Result<Completion, LmError>, copy: usize) -> Result<Completion, LmError> {
    answer.clone().map(|completion| Completion {
        cached: completion.cached || copy > 0,
        ..completion
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::lm::{FinishReason, Message, Role, Sampling};

    /// Answers with the question, and counts; refuses `bad`.
    #[derive(Default)]
    struct Echo {
        asked: Mutex<Vec<String>>,
    }

    impl Lm for Echo {
        fn id(&self) -> &str {
            "echo"
        }
        fn complete(
            &self,
            requests: &[Request],
            on_answer: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            let answer = |(index, request): (usize, &Request)| {
                let text = request.messages[0].content.clone();
                self.asked.lock().unwrap().push(text.clone());
                let answer = if text == "bad" {
                    Err(LmError::Rejected("no".into()))
                } else {
                    Ok(Completion {
                        text,
                        finish: FinishReason::Stop,
                        prompt_tokens: 3,
                        completion_tokens: 1,
                        choice_probs: Some(vec![0.25, 0.75]),
                        cached: false,
                    })
                };
                on_answer(index, &answer);
                answer
            };
            requests.iter().enumerate().map(answer).collect()
        }
    }

    fn request(text: &str, rollout: Option<u64>) -> Request {
        Request {
            messages: vec![Message {
                role: Role::User,
                content: text.into(),
            }],
            sampling: Sampling {
                rollout,
                ..Sampling::default()
            },
            choices: None,
        }
    }

    #[test]
    fn nothing_is_asked_twice() {
        let echo = Arc::new(Echo::default());
        let store = Arc::new(CompletionCache::in_memory());
        let cached = Cached::new(Arc::clone(&echo) as Arc<dyn Lm>, store);
        let told = Mutex::new(vec![0; 5]);
        let tell = |i: usize, _: &Result<Completion, LmError>| told.lock().unwrap()[i] += 1;
        let requests = [
            request("a", None),
            request("b", None),
            request("a", None),
            request("a", Some(1)),
            request("bad", None),
        ];
        let first = cached.complete(&requests, &tell);
        let texts: Vec<_> = first[..4]
            .iter()
            .map(|a| a.as_ref().unwrap().text.clone())
            .collect();
        assert_eq!(texts, ["a", "b", "a", "a"]);
        let flags: Vec<_> = first[..4]
            .iter()
            .map(|a| a.as_ref().unwrap().cached)
            .collect();
        assert_eq!(flags, [false, false, true, false]);
        assert_eq!(*echo.asked.lock().unwrap(), ["a", "b", "a", "bad"]);
        assert_eq!(*told.lock().unwrap(), vec![1; 5]);
        let again = cached.complete(&requests, &tell);
        // Only what failed is asked again.
        assert_eq!(echo.asked.lock().unwrap().len(), 5);
        let whole = Completion {
            cached: false,
            ..again[1].clone().unwrap()
        };
        assert_eq!(Ok(whole), first[1]);
        assert_eq!(*told.lock().unwrap(), vec![2; 5]);
    }
}
