//! Set c: BootstrapFewShotWithRandomSearch, candidate by candidate and call by call.

use super::banking77::{self, Banking77};
use super::fake_lm::{Call, FakeLm, FakeSpec, hex};
use super::recording::{compare, get, read, reasoning_desc, same, say};
use flowrun_lm::adapter::{AdapterKind, Dialect};
use flowrun_lm::example::{Demo, Example, Prediction};
use flowrun_lm::lm::Sampling;
use flowrun_lm::metric::MetricKind;
use flowrun_lm::optimize::{Candidate, Compiled, Optimizer, RandomSearch, Session};
use flowrun_lm::program::{Predictor, Program, chain_of_thought};
use flowrun_lm::signature::{Field, Signature};
use flowrun_lm::value::{Fields, Value};
use serde::Deserialize;

#[derive(Deserialize)]
struct Search {
    program: String,
    built: String,
    metric: String,
    train: (usize, usize),
    val: Option<(usize, usize)>,
    max_bootstrapped_demos: usize,
    max_labeled_demos: usize,
    num_candidate_programs: usize,
    max_rounds: usize,
    max_errors: usize,
    metric_threshold: Option<f64>,
    stop_at_score: Option<f64>,
    restrict: Option<Vec<i64>>,
    labeled_sample: bool,
    fake: FakeSpec,
}

impl Search {
    fn program(&self, data: &Banking77, dialect: Dialect) -> Program {
        if self.program == "seed" {
            return banking77::seed_program(&data.top25, dialect, self.built == "outside");
        }
        let signature = |instructions, inputs: &[&str], output| {
            let inputs = inputs.iter().map(|name| Field::text(*name)).collect();
            Signature::new(Some(instructions), inputs, vec![Field::text(output)])
        };
        let predictor = |name: &str, signature| {
            Predictor::new(name, signature, AdapterKind::Chat.adapter(dialect))
        };
        let predictors = if self.program == "two_stage" {
            vec![
                predictor("a", signature("Find the topic.", &["text"], "topic")),
                predictor("b", signature("Classify.", &["text", "topic"], "label")),
            ]
        } else {
            let signature = signature("Classify the banking query.", &["text"], "label");
            let desc = reasoning_desc(dialect, self.built == "outside");
            vec![predictor("clf", chain_of_thought(signature, dialect, desc))]
        };
        Program::new(dialect, predictors)
    }

    fn metric(&self, example: &Example, prediction: &Prediction) -> Result<f64, String> {
        let kind = match self.metric.as_str() {
            "seed_exact_match" => MetricKind::ExactMatch,
            _ => MetricKind::LabelEquality,
        };
        let score = kind.metric("label")(example, prediction)?;
        let length = |text: Option<&str>| text.map_or(0, |text| text.chars().count());
        let alike = length(example.text("label")) % 2 == length(prediction.text("label")) % 2;
        if self.metric == "graded" && score == 0.0 && alike {
            return Ok(0.5);
        }
        Ok(score)
    }

    fn search(&self, early_stopping: bool) -> RandomSearch {
        RandomSearch {
            early_stopping,
            concurrency: None,
            max_bootstrapped_demos: self.max_bootstrapped_demos,
            max_labeled_demos: self.max_labeled_demos,
            num_candidate_programs: self.num_candidate_programs,
            max_rounds: self.max_rounds,
            max_errors: self.max_errors,
            metric_threshold: self.metric_threshold,
            stop_at_score: self.stop_at_score,
            restrict: self.restrict.clone(),
            labeled_sample: self.labeled_sample,
        }
    }

    /// The search with `batch` rows a call.
    fn run(
        &self,
        data: &Banking77,
        dialect: Dialect,
        batch: usize,
        early_stopping: bool,
    ) -> (Result<Compiled, String>, Vec<Call>) {
        let lm = FakeLm::new(&self.fake, data);
        let rows = |(from, to): (usize, usize)| &data.train[from..to];
        let session = Session {
            lm: &lm,
            sampling: &Sampling::default(),
            metric: &|example, prediction| self.metric(example, prediction),
            label: "label",
            teacher: None,
            batch,
            on_progress: None,
            kept: None,
        };
        let student = self.program(data, dialect);
        let compiled = self.search(early_stopping).compile(
            &student,
            rows(self.train),
            self.val.map(rows),
            &session,
        );
        let calls = lm.calls.into_inner().unwrap();
        (compiled.map_err(|error| error.to_string()), calls)
    }
}

#[test]
fn c_searches_make_the_same_calls_and_find_the_same_programs() {
    let Some(data) = Banking77::load() else {
        return;
    };
    compare::<Search>("c_random_search", |case, dialect| {
        let (compiled, calls) = case.input.run(&data, dialect, 1, false);
        if get(&case.expected, "error").is_some() {
            return same("refused", &compiled.is_err(), &true);
        }
        let compiled = compiled?;
        same_outcome(&compiled, &case.expected)?;
        let count: usize = read(get(&case.expected, "n_lm_calls").unwrap());
        same("number of calls", &calls.len(), &count)?;
        let first: Vec<Call> = read(get(&case.expected, "first_calls").unwrap());
        for (at, (ours, theirs)) in calls.iter().zip(&first).enumerate() {
            same(&format!("call {at}"), ours, theirs)?;
        }
        let log = Value::from(hex(&serde_json::to_string(&calls).unwrap()));
        same("calls", &Some(&log), &get(&case.expected, "calls_sha256"))
    });
}

/// What is found must not depend on how many rows are asked at once.
#[test]
fn c_batches_change_nothing_but_the_number_of_calls() {
    let Some(data) = Banking77::load() else {
        return;
    };
    compare::<Search>("c_random_search", |case, dialect| {
        let (compiled, _) = case.input.run(&data, dialect, 7, false);
        if get(&case.expected, "error").is_some() {
            return same("refused", &compiled.is_err(), &true);
        }
        same_outcome(&compiled?, &case.expected)
    });
}

/// Early stopping finds DSPy's own winner in every recorded search that ends well.
#[test]
fn c_early_stopping_finds_dspys_winner_with_fewer_calls() {
    let Some(data) = Banking77::load() else {
        return;
    };
    let calls = std::cell::Cell::new((0, 0));
    compare::<Search>("c_random_search", |case, dialect| {
        if get(&case.expected, "error").is_some() {
            return Ok(());
        }
        let (early, made) = case.input.run(&data, dialect, 1, true);
        let early = early?;
        let best = early.best.and_then(|at| early.candidates.get(at));
        let winner: i64 = read(get(&case.expected, "winner_seed").unwrap());
        same("winner", &best.map(|best| best.seed), &Some(winner))?;
        let score: f64 = read(get(&case.expected, "winner_score").unwrap());
        same("its score", &best.map(|best| best.score), &Some(score))?;
        let all: usize = read(get(&case.expected, "n_lm_calls").unwrap());
        same("no more calls", &(made.len() <= all), &true)?;
        let (few, many) = calls.get();
        calls.set((few + made.len(), many + all));
        Ok(())
    });
    let (few, many) = calls.get();
    say(&format!(
        "early stopping: {few} calls where the full searches make {many}"
    ));
    assert!(few < many || many == 0);
}

#[derive(Deserialize)]
struct RecordedCandidate {
    seed: i64,
    score: f64,
    subscores: Vec<f64>,
    demos: Value,
}

fn same_outcome(compiled: &Compiled, expected: &Value) -> Result<(), String> {
    let theirs: Vec<RecordedCandidate> = read(get(expected, "candidates").unwrap());
    let seeds = |candidates: &[&Candidate]| -> Vec<i64> {
        candidates.iter().map(|candidate| candidate.seed).collect()
    };
    let tried: Vec<&Candidate> = compiled.candidates.iter().collect();
    let expected_seeds = theirs.iter().map(|candidate| candidate.seed).collect();
    same("candidates", &seeds(&tried), &expected_seeds)?;
    for (ours, theirs) in tried.iter().zip(&theirs) {
        let what = |part: &str| format!("{part} of candidate {}", ours.seed);
        same(&what("demos"), &ours.demos, &demos(&theirs.demos))?;
        same(&what("subscores"), &ours.subscores, &theirs.subscores)?;
        same(&what("score"), &ours.score, &theirs.score)?;
    }
    let ranked = read(get(expected, "ranked_seeds").unwrap());
    same("ranking", &seeds(&compiled.ranked()), &ranked)?;
    let best = compiled.best.and_then(|at| compiled.candidates.get(at));
    let best = best.ok_or("there is no winner")?;
    same(
        "winner",
        &best.seed,
        &read(get(expected, "winner_seed").unwrap()),
    )?;
    same(
        "best score",
        &best.score,
        &read(get(expected, "winner_score").unwrap()),
    )?;
    same("program", &compiled.program.demos(), &best.demos)
}

/// Recorded demos by predictor; DSPy 3 names the one inside a ChainOfThought `<name>.predict`.
fn demos(recorded: &Value) -> Vec<(String, Vec<Demo>)> {
    let recorded: Fields = read(recorded);
    recorded
        .iter()
        .map(|(name, demos)| (name.trim_end_matches(".predict").to_owned(), read(demos)))
        .collect()
}
