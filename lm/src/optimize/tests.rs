#![allow(clippy::unwrap_used)]

use super::*;
use crate::lm::{Completion, LmError, OnAnswer, Request, Role};
use crate::metric::MetricKind;
use crate::program::ProgramSpec;
use crate::testing::{answer_each, completion};
use crate::value::Value;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Right by a hash of the query and of how many demos it sees; counts its calls.
struct Hashing {
    per_demo: u64,
    /// Another one is another model.
    salt: u64,
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
        answer_each(requests, on_answer, |request| {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let demos = request.messages.iter();
            let demos = demos.filter(|m| m.role == Role::Assistant).count() as u64;
            let query = request.messages.last().map_or("", |m| m.content.as_str());
            let mut hash = query
                .bytes()
                .fold((demos * 7 + 1) ^ self.salt, |hash, byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
                });
            hash = (hash >> 17) % 100;
            let right = hash < 60 + self.per_demo * demos;
            let word = query.split(' ').next().unwrap_or_default();
            Ok(completion(if right { word } else { "no" }))
        })
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
    let lm = Hashing {
        per_demo,
        salt: 0,
        calls: AtomicUsize::new(0),
    };
    let compiled = search_with(&lm, settings, 100, 4);
    (compiled, lm.calls.into_inner())
}

fn search_with(lm: &Hashing, settings: &RandomSearch, val_rows: usize, batch: usize) -> Compiled {
    let spec: ProgramSpec = serde_json::from_str(
        r#"{"predict": {"adapter": "compact", "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}}"#,
    )
    .unwrap();
    let student = spec.build(&["a", "b", "c"].map(str::to_owned)).unwrap();
    let metric = MetricKind::LabelEquality.metric("label");
    let session = Session {
        lm,
        sampling: &Sampling::default(),
        metric: &metric,
        label: "label",
        teacher: None,
        batch,
        on_progress: None,
        kept: None,
    };
    let valset = rows(30, 30 + val_rows);
    let compiled = settings.compile(&student, &rows(0, 30), Some(&valset), &session);
    compiled.unwrap()
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 24, ..Default::default() })]
    #[test]
    fn early_stopping_never_changes_what_is_found(
        salt in 0..u64::MAX,
        per_demo in 0u64..12,
        val_rows in 1usize..40,
        batch in 1usize..6,
        at_once in 1usize..4,
        stop_at_score in proptest::option::of(40.0f64..100.0),
    ) {
        let found = |early_stopping: bool, at_once: usize| {
            let lm = Hashing { per_demo, salt, calls: AtomicUsize::new(0) };
            let settings = RandomSearch {
                num_candidate_programs: 3,
                early_stopping,
                stop_at_score,
                concurrency: Some(at_once),
                ..RandomSearch::default()
            };
            let compiled = search_with(&lm, &settings, val_rows, batch);
            let best = compiled.best.map(|at| compiled.candidates[at].clone());
            let best = best.map(|best| (best.seed, best.score));
            (best, compiled.candidates.len(), compiled.program.demos())
        };
        proptest::prop_assert_eq!(found(true, at_once), found(false, 1));
    }
}

/// Gives its reason and, for even numbers, the right label.
struct Even(AtomicUsize);

impl Lm for Even {
    fn id(&self) -> &str {
        "even"
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        answer_each(requests, on_answer, |request| {
            self.0.fetch_add(1, Ordering::Relaxed);
            let query = &request.messages.last().unwrap().content;
            let (label, number) = query.split_once(" number ").unwrap();
            let is_even = number.parse::<usize>().unwrap().is_multiple_of(2);
            let label = if is_even { label } else { "none" };
            let text = format!("because of {number}\nlabel: {label}");
            Ok(completion(&text))
        })
    }
}

/// All texts are alike to it.
struct Alike;

impl crate::classifier::Embedder for Alike {
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        Ok(vec![vec![1.0]; texts.len()])
    }
}

#[test]
fn nearest_rows_are_worked_out_once_where_the_model_is_right() {
    let spec: ProgramSpec = serde_json::from_str(
        r#"{"chain_of_thought": {"adapter": "compact", "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}}"#,
    )
    .unwrap();
    let student = spec.build(&["a", "b", "c"].map(str::to_owned)).unwrap();
    let lm = Even(AtomicUsize::new(0));
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
    let knn = |bootstrap| KnnFewShot {
        k: 2,
        bootstrap,
        embedder: std::sync::Arc::new(Alike),
    };
    let rows = rows(0, 6);
    let plain = knn(false).compile(&student, &rows, None, &session).unwrap();
    assert_eq!(lm.0.load(Ordering::Relaxed), 0, "nothing is asked");
    let worked = knn(true).compile(&student, &rows, None, &session).unwrap();
    assert_eq!(lm.0.load(Ordering::Relaxed), 6, "one call a row");
    assert_eq!(worked.tokens.calls, 6);
    let pool = |compiled: &Compiled| -> Vec<Demo> {
        let predictor = &compiled.program.predictors[0];
        assert!(predictor.demos.is_empty());
        predictor.neighbours.as_ref().unwrap().rows.clone()
    };
    let (plain, worked) = (pool(&plain), pool(&worked));
    for (at, (worked, plain)) in worked.iter().zip(&plain).enumerate() {
        let own = [rows[at].text("text"), rows[at].text("label")];
        let fields = |demo: &Demo| {
            ["text", "label", "reasoning"].map(|name| {
                demo.fields
                    .get(name)
                    .and_then(Value::as_str)
                    .map(str::to_owned)
            })
        };
        let [text, label] = own.map(|field| field.map(str::to_owned));
        let unexplained = [text.clone(), label.clone(), None];
        assert_eq!(
            (plain.augmented, fields(plain)),
            (false, unexplained.clone())
        );
        let expected = match at % 2 {
            0 => (true, [text, label, Some(format!("because of {at}"))]),
            _ => (false, unexplained),
        };
        assert_eq!((worked.augmented, fields(worked)), expected);
    }
    assert_eq!((plain.len(), worked.len()), (6, 6));
}

#[test]
fn labelled_rows_are_drawn_as_python_draws_them() {
    let spec: ProgramSpec = serde_json::from_str(
        r#"{"stages": [
            {"name": "one", "predict": {"inputs": [{"name": "text"}], "outputs": [{"name": "topic"}]}},
            {"name": "two", "predict": {"inputs": [{"name": "topic"}],
                "outputs": [{"name": "label", "type": "label"}]}}]}"#,
    )
    .unwrap();
    let student = spec.build(&["a", "b", "c"].map(str::to_owned)).unwrap();
    let rows = rows(0, 10);
    let drawn = |k: usize, sample: bool| -> Vec<Vec<usize>> {
        let program = LabeledFewShot { k, sample }.apply(&student, &rows);
        let place = |demo: &Demo| rows.iter().position(|row| demo.is(row)).unwrap();
        let predictors = program.predictors.iter();
        predictors
            .map(|predictor| predictor.demos.iter().map(place).collect())
            .collect()
    };
    // `random.Random(0)`, then `sample(range(10), 3)` twice.
    assert_eq!(drawn(3, true), [[6, 9, 0], [4, 8, 7]]);
    assert_eq!(drawn(2, false), [[0, 1], [0, 1]]);
    assert_eq!(drawn(99, false)[1].len(), 10);
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
