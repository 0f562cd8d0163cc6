//! [`Cached`]: a model whose answers are kept, so that none is computed or paid for twice.
//!
//! An answer's key is the model's id with the whole request, the rollout included. Errors are not
//! kept. What another thread of this process is asking for is waited for. Invariant: an answer is in
//! the store before the caller hears of it; once one could not be kept, no other is asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use flowrun_cache::{CompletionCache, Digest};
use serde_json::json;

use super::{Completion, Lm, LmError, OnAnswer, Request};

/// A model with a memory.
pub struct Cached {
    lm: Arc<dyn Lm>,
    store: Arc<CompletionCache>,
    cancelled: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
    /// Why answers cannot be kept.
    unkept: OnceLock<LmError>,
}

impl Cached {
    /// `lm`, asked only for what `store` does not know.
    pub fn new(lm: Arc<dyn Lm>, store: Arc<CompletionCache>) -> Self {
        Self {
            lm,
            store,
            cancelled: None,
            unkept: OnceLock::new(),
        }
    }

    /// Waits for another thread's answer, or a remote cache's, no longer than until `cancelled`.
    #[must_use]
    pub fn until(self, cancelled: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self {
            cancelled: Some(Arc::new(cancelled)),
            ..self
        }
    }

    fn key(&self, request: &Request) -> Digest {
        Digest::of_record(
            "completion-v1",
            &json!({ "model": self.lm.id(), "request": request }),
        )
    }

    fn known(&self, key: &Digest) -> Option<Completion> {
        let value = self.store.get_until(key, &|| self.is_cancelled())?;
        let mut completion: Completion = serde_json::from_value(value).ok()?;
        completion.cached = true;
        Some(completion)
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.as_ref().is_some_and(|cancelled| cancelled())
    }

    /// Stores an answer. When that fails, the model is asked for no other: it would be paid for
    /// again.
    fn keep(&self, key: &Digest, answer: &Completion) {
        let stored = serde_json::to_value(answer)
            .map_err(|e| e.to_string())
            .and_then(|value| self.store.put(key, &value).map_err(|e| e.to_string()));
        let Err(why) = stored else {
            return;
        };
        let error = self.unkept.get_or_init(|| {
            tracing::warn!("an answer could not be kept and will be asked for again: {why}");
            LmError::Barred(format!(
                "an answer could not be kept ({why}), so no other is asked for; see to the disk of \
                 the cache folder"
            ))
        });
        self.lm.bar(error);
    }
}

impl Cached {
    /// Answers what is known, and asks for what no other thread is asking for; returns the rest.
    fn ask_those_that_nobody_asks(
        &self,
        requests: &[Request],
        open: Vec<(Digest, Vec<usize>)>,
        tell: &Tell<'_>,
    ) -> Vec<(Digest, Vec<usize>)> {
        let (mut own, mut others) = (Vec::new(), Vec::new());
        for (key, indices) in open {
            let claim = self.store.claim(&key);
            // Once the right is there, no other thread is about to store it.
            match (self.known(&key), claim) {
                (Some(known), _) => {
                    let known = Ok(known);
                    indices.iter().for_each(|index| tell(&[*index], &known));
                }
                (None, Some(claim)) => own.push((key, indices, Mutex::new(Some(claim)))),
                (None, None) => others.push((key, indices)),
            }
        }
        if own.is_empty() {
            return others;
        }
        let new: Vec<Request> = own
            .iter()
            .map(|(_, indices, _)| requests[indices[0]].clone())
            .collect();
        let told = |place: usize, answer: &Result<Completion, LmError>| {
            let (key, indices, claim) = &own[place];
            let claim = claim.lock().unwrap_or_else(PoisonError::into_inner).take();
            if claim.is_none() {
                return;
            }
            if let Ok(completion) = answer {
                self.keep(key, completion);
            }
            drop(claim);
            tell(indices, answer);
        };
        if let Some(error) = self.unkept.get() {
            let refused = Err(error.clone());
            (0..own.len()).for_each(|place| told(place, &refused));
            return others;
        }
        let answers = self.lm.complete(&new, &told);
        // Where nothing could be asked, nothing was told.
        answers.iter().enumerate().for_each(|(p, a)| told(p, a));
        others
    }
}

/// Hears the answer of all requests of one key.
type Tell<'a> = dyn Fn(&[usize], &Result<Completion, LmError>) + Sync + 'a;

/// Answers by request.
type Answers = Mutex<Vec<Option<Result<Completion, LmError>>>>;

fn lock(answers: &Answers) -> MutexGuard<'_, Vec<Option<Result<Completion, LmError>>>> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
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
        let answers: Answers = Mutex::new(vec![None; requests.len()]);
        let tell = |indices: &[usize], answer: &Result<Completion, LmError>| {
            for (copy, index) in indices.iter().enumerate() {
                let answer = as_copy(answer, copy);
                on_answer(*index, &answer);
                lock(&answers)[*index] = Some(answer);
            }
        };
        // Equal requests of one call are asked once.
        let mut open: Vec<(Digest, Vec<usize>)> = Vec::new();
        let mut places: BTreeMap<Digest, usize> = BTreeMap::new();
        for (index, request) in requests.iter().enumerate() {
            let key = self.key(request);
            let place = *places.entry(key).or_insert_with(|| {
                open.push((key, Vec::new()));
                open.len() - 1
            });
            open[place].1.push(index);
        }
        while !open.is_empty() {
            let others = self.ask_those_that_nobody_asks(requests, open, &tell);
            let stop = || self.is_cancelled();
            if !others.iter().all(|(key, _)| self.store.wait(key, &stop)) {
                let cancelled = Err(LmError::Cancelled);
                others
                    .iter()
                    .for_each(|(_, indices)| tell(indices, &cancelled));
                break;
            }
            open = others;
        }
        let answers = std::mem::take(&mut *lock(&answers));
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

    fn bar(&self, why: &LmError) {
        self.lm.bar(why);
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
    use super::*;
    use crate::lm::{Message, Role, Sampling};
    use crate::testing::{answer_each, completion};

    /// Answers with the question, and counts; refuses `bad`.
    #[derive(Default)]
    struct Echo {
        asked: Mutex<Vec<String>>,
        barred: Mutex<Vec<LmError>>,
    }

    impl Lm for Echo {
        fn id(&self) -> &str {
            "echo"
        }
        fn bar(&self, why: &LmError) {
            self.barred.lock().unwrap().push(why.clone());
        }
        fn complete(
            &self,
            requests: &[Request],
            on_answer: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            answer_each(requests, on_answer, |request| {
                let text = &request.messages[0].content;
                self.asked.lock().unwrap().push(text.clone());
                if text == "bad" {
                    return Err(LmError::Rejected("no".into()));
                }
                Ok(Completion {
                    prompt_tokens: 3,
                    choice_probs: Some(vec![0.25, 0.75]),
                    ..completion(text)
                })
            })
        }
    }

    /// Cannot ask, and says so in what it returns alone.
    struct Down;

    impl Lm for Down {
        fn id(&self) -> &str {
            "down"
        }
        fn complete(
            &self,
            requests: &[Request],
            _: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            let refused = || Err(LmError::Rejected("no adapter".into()));
            requests.iter().map(|_| refused()).collect()
        }
    }

    #[test]
    fn no_more_is_asked_for_once_an_answer_could_not_be_kept() {
        let folder = tempfile::tempdir().unwrap();
        // A folder that cannot be made.
        let place = folder.path().join("completions");
        std::fs::write(&place, "").unwrap();
        let store = CompletionCache::open(place.clone()).unwrap();
        let echo = Arc::new(Echo::default());
        let cached = Cached::new(Arc::clone(&echo) as Arc<dyn Lm>, Arc::new(store));
        let asked = [request("a", None), request("b", None)];
        let answers = cached.complete(&asked, &|_, _| {});
        // They were paid for.
        assert!(answers.iter().all(Result::is_ok));
        {
            let barred = echo.barred.lock().unwrap();
            assert_eq!(barred.len(), 2, "by each answer that is lost");
            let text = barred[0].to_string();
            assert!(text.contains("could not be kept"), "{text}");
        }
        let more = [request("c", None), request("c", None)];
        let answers = cached.complete(&more, &|_, _| {});
        assert!(matches!(
            &answers[..],
            [Err(LmError::Barred(_)), Err(LmError::Barred(_))]
        ));
        assert_eq!(echo.asked.lock().unwrap().len(), 2);
        // The next run.
        std::fs::remove_file(&place).unwrap();
        let store = Arc::new(CompletionCache::open(place).unwrap());
        let cached = Cached::new(Arc::clone(&echo) as Arc<dyn Lm>, store);
        assert!(cached.complete(&more, &|_, _| {})[0].is_ok());
        assert!(
            cached.complete(&more, &|_, _| {})[0]
                .as_ref()
                .unwrap()
                .cached
        );
    }

    #[test]
    fn an_error_that_was_only_returned_is_the_answer() {
        let store = Arc::new(CompletionCache::in_memory());
        let told = Mutex::new(0);
        let cached = Cached::new(Arc::new(Down), Arc::clone(&store));
        let answers = cached.complete(&[request("a", None)], &|_, _| *told.lock().unwrap() += 1);
        assert_eq!(answers, [Err(LmError::Rejected("no adapter".into()))]);
        assert_eq!(*told.lock().unwrap(), 1);
    }

    #[test]
    fn a_wait_for_another_thread_ends_with_the_wish_to_stop() {
        let store = Arc::new(CompletionCache::in_memory());
        let one = Cached::new(Arc::new(Echo::default()), Arc::clone(&store)).until(|| true);
        let asked = request("a", None);
        let _claim = store.claim(&one.key(&asked)).unwrap();
        assert_eq!(
            one.complete(&[asked], &|_, _| {}),
            [Err(LmError::Cancelled)]
        );
    }

    #[test]
    fn what_another_thread_is_asking_for_is_waited_for() {
        let echo = Arc::new(Echo::default());
        let store = Arc::new(CompletionCache::in_memory());
        let one = || Cached::new(Arc::clone(&echo) as Arc<dyn Lm>, Arc::clone(&store));
        let requests: Vec<Request> = (0..50).map(|i| request(&i.to_string(), None)).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let answers = one().complete(&requests, &|_, _| {});
                    assert!(answers.iter().all(Result::is_ok));
                });
            }
        });
        assert_eq!(echo.asked.lock().unwrap().len(), 50);
        // One that was refused is asked for again by whoever waited for it.
        let bad = [request("bad", None)];
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| assert!(one().complete(&bad, &|_, _| {})[0].is_err()));
            }
        });
        assert_eq!(echo.asked.lock().unwrap().len(), 53);
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
