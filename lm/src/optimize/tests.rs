#![allow(clippy::unwrap_used)]

use super::*;
use crate::lm::{Completion, FinishReason, LmError, OnAnswer, Request, Role};
use crate::metric::MetricKind;
use crate::program::ProgramSpec;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Right by a hash of the query and of how many demos it sees; counts its calls.
struct Hashing {
    per_demo: u64,
    calls: AtomicUsize,
}

impl Lm for Hashing {
    fn id(&self) -> &str {
        "hashing"
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let answer = |(index, request): (usize, &Request)| {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let demos = request.messages.iter();
            let demos = demos.filter(|m| m.role == Role::Assistant).count() as u64;
            let query = request.messages.last().map_or("", |m| m.content.as_str());
            let mut hash = query.bytes().fold(demos * 7 + 1, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
            hash = (hash >> 17) % 100;
            let right = hash < 60 + self.per_demo * demos;
            let answer = Ok(Completion {
                text: if right {
                    query.split(' ').next().unwrap_or_default()
                } else {
                    "no"
                }
                .into(),
                finish: FinishReason::Stop,
                prompt_tokens: 1,
                completion_tokens: 1,
                choice_probs: None,
                cached: false,
            });
            on_answer(index, &answer);
            answer
        };
        requests.iter().enumerate().map(answer).collect()
    }
}

fn rows(from: usize, to: usize) -> Vec<Example> {
    let row = |i: usize| {
        let label = ["a", "b", "c"][i % 3];
        let text = format!("{label} number {i}");
        Example::of_texts(i.to_string(), [("text", text.as_str()), ("label", label)])
    };
    (from..to).map(row).collect()
}

fn search(per_demo: u64, settings: &RandomSearch) -> (Compiled, usize) {
    let spec: ProgramSpec = serde_json::from_str(
        r#"{"predict": {"adapter": "compact", "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}}"#,
    )
    .unwrap();
    let student = spec.build(&["a", "b", "c"].map(str::to_owned)).unwrap();
    let lm = Hashing {
        per_demo,
        calls: AtomicUsize::new(0),
    };
    let metric = MetricKind::LabelEquality.metric("label");
    let session = Session {
        lm: &lm,
        sampling: &Sampling::default(),
        metric: &metric,
        label: "label",
        teacher: None,
        batch: 4,
        on_progress: None,
        kept: None,
    };
    let compiled = settings.compile(&student, &rows(0, 30), Some(&rows(30, 130)), &session);
    (compiled.unwrap(), lm.calls.into_inner())
}

#[test]
fn early_stopping_finds_the_same_winner_with_fewer_calls() {
    for per_demo in [0, 3, 10] {
        let settings = |early_stopping, at_once| RandomSearch {
            num_candidate_programs: 6,
            early_stopping,
            concurrency: Some(at_once),
            ..RandomSearch::default()
        };
        let (full, all_calls) = search(per_demo, &settings(false, 1));
        assert!(full.candidates.iter().all(|c| c.stopped_after.is_none()));
        for at_once in [1, 4] {
            let (early, calls) = search(per_demo, &settings(true, at_once));
            assert_eq!(early.best, full.best);
            assert_eq!(early.program.demos(), full.program.demos());
            assert!(at_once > 1 || calls < all_calls, "{calls} of {all_calls}");
            let pairs = early.candidates.iter().zip(&full.candidates);
            for (early, full) in pairs {
                assert_eq!((early.seed, &early.demos), (full.seed, &full.demos));
                // The bound of a stopped candidate is never below its score.
                let stopped = early.stopped_after.is_some();
                assert!(early.score == full.score || stopped && early.score > full.score);
            }
        }
    }
}

#[test]
fn candidates_at_the_same_time_are_those_one_after_another() {
    let settings = |at_once| RandomSearch {
        num_candidate_programs: 5,
        early_stopping: false,
        concurrency: Some(at_once),
        stop_at_score: Some(72.0),
        ..RandomSearch::default()
    };
    let (one, _) = search(5, &settings(1));
    let (four, _) = search(5, &settings(4));
    assert!(one.candidates.len() < 8, "`stop_at_score` stopped it");
    assert_eq!(one.candidates, four.candidates);
    assert_eq!(one.best, four.best);
}
