#![allow(clippy::unwrap_used)]

use super::*;
use crate::lm::{FinishReason, OnAnswer, Role};
use std::sync::Mutex;

/// Answers with the last user message turned around by a function; keeps the batch sizes.
struct Scripted<F> {
    answer: F,
    batches: Mutex<Vec<usize>>,
}

impl<F: Fn(&Request) -> Result<String, LmError> + Send + Sync> Scripted<F> {
    fn new(answer: F) -> Self {
        Self {
            answer,
            batches: Mutex::default(),
        }
    }
}

impl<F: Fn(&Request) -> Result<String, LmError> + Send + Sync> Lm for Scripted<F> {
    fn id(&self) -> &str {
        "scripted"
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        self.batches.lock().unwrap().push(requests.len());
        let answers: Vec<_> = requests
            .iter()
            .map(|request| {
                (self.answer)(request).map(|text| Completion {
                    text,
                    finish: FinishReason::Stop,
                    prompt_tokens: 10,
                    completion_tokens: 2,
                    choice_probs: request.choices.as_ref().map(|_| vec![0.25, 0.75]),
                    cached: false,
                })
            })
            .collect();
        answers
            .iter()
            .enumerate()
            .for_each(|(index, answer)| on_answer(index, answer));
        answers
    }
}

fn spec(json: &str) -> ProgramSpec {
    serde_json::from_str(json).unwrap()
}

fn compact() -> Program {
    spec(
        r#"{"predict": {"adapter": "compact", "instructions": "",
            "inputs": [{"name": "query", "from": "text"}],
            "outputs": [{"name": "label", "type": "label"}], "constrain": true}}"#,
    )
    .build(&["a".into(), "b".into()])
    .unwrap()
}

fn rows(texts: &[&str]) -> Vec<Example> {
    texts
        .iter()
        .map(|text| Example::of_texts(*text, [("text", *text), ("label", "b")]))
        .collect()
}

fn asked(request: &Request) -> &str {
    &request.messages.last().unwrap().content
}

#[test]
fn a_constrained_compact_program_gives_labels_and_confidence() {
    let lm = Scripted::new(|request| Ok(format!(" {} ", asked(request).to_uppercase())));
    let results = compact().run(
        &lm,
        &Sampling::default(),
        &rows(&["x y", "b"]),
        &RunOptions::default(),
    );
    assert_eq!(
        results[0].prediction.as_ref().unwrap().text("label"),
        Some("x_y")
    );
    assert_eq!(results[0].trace[0].outputs["label"].as_str(), Some("X Y"));
    assert_eq!(results[1].confidence, Some(0.75));
    assert_eq!(
        results[1].tokens,
        Tokens {
            prompt: 10,
            completion: 2,
            calls: 1,
            cached: 0
        }
    );
    assert_eq!(*lm.batches.lock().unwrap(), [2]);
}

#[test]
fn labelled_rows_are_complete_demos_of_a_compact_program() {
    let mut program = compact();
    program.predictors[0].demos = vec![Demo::labeled(&rows(&["shown"])[0])];
    let lm = Scripted::new(|request| Ok(request.messages.len().to_string()));
    let seen = |hide_own_demo| {
        let options = RunOptions {
            hide_own_demo,
            ..RunOptions::default()
        };
        let results = program.run(&lm, &Sampling::default(), &rows(&["shown"]), &options);
        results[0].raw.clone().unwrap()
    };
    assert_eq!(seen(false), "3");
    assert_eq!(seen(true), "1");
}

#[test]
fn failed_rows_do_not_touch_the_others_and_all_are_told() {
    let chat =
        spec(r#"{"predict": {"inputs": [{"name": "text"}], "outputs": [{"name": "label"}]}}"#)
            .build(&[])
            .unwrap();
    let lm = Scripted::new(|request| match asked(request) {
        text if text.contains("bad") => Ok("no header".to_owned()),
        text if text.contains("down") => Err(LmError::Unavailable("down".into())),
        _ => Ok("[[ ## label ## ]]\nfine".to_owned()),
    });
    let told = Mutex::new(Vec::new());
    let on_row = |row| told.lock().unwrap().push(row);
    let options = RunOptions {
        batch: 3,
        on_row: Some(&on_row),
        hide_own_demo: false,
    };
    let mut rows = rows(&["good", "bad", "down", "good"]);
    rows.push(Example::default());
    let results = chat.run(&lm, &Sampling::default(), &rows, &options);
    let kinds: Vec<Option<RowErrorKind>> = results
        .iter()
        .map(|r| r.prediction.as_ref().err().map(RowError::kind))
        .collect();
    let other = Some(RowErrorKind::Other);
    assert_eq!(
        kinds,
        [
            None,
            Some(RowErrorKind::Parse),
            Some(RowErrorKind::Lm),
            None,
            other
        ]
    );
    let mut told = told.into_inner().unwrap();
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2, 3, 4]);
}

#[test]
fn a_cancelled_run_asks_no_more() {
    let lm = Scripted::new(|_| Err(LmError::Cancelled));
    let options = RunOptions {
        batch: 1,
        ..RunOptions::default()
    };
    let results = compact().run(&lm, &Sampling::default(), &rows(&["a", "b", "c"]), &options);
    assert!(
        results
            .iter()
            .all(|r| r.prediction.as_ref().is_err_and(RowError::is_cancelled))
    );
    assert_eq!(*lm.batches.lock().unwrap(), [1]);
}

#[test]
fn dspy_3_asks_again_in_json() {
    let program = spec(
        r#"{"predict": {"format": "dspy-3", "inputs": [{"name": "text"}],
            "outputs": [{"name": "label"}]}}"#,
    )
    .build(&[])
    .unwrap();
    let lm = Scripted::new(|request| {
        assert_eq!(request.messages[0].role, Role::System);
        let json = request.messages[0]
            .content
            .contains("Outputs will be a JSON object");
        Ok(if json { r#"{"label": "x"}"# } else { "x" }.to_owned())
    });
    let results = program.run(
        &lm,
        &Sampling::default(),
        &rows(&["q"]),
        &RunOptions::default(),
    );
    assert_eq!(
        results[0].prediction.as_ref().unwrap().text("label"),
        Some("x")
    );
    assert_eq!(results[0].tokens.calls, 2);
}

#[test]
fn later_steps_see_the_outputs_of_earlier_ones() {
    let step = |json: &str| spec(json).build(&[]).unwrap().predictors.remove(0);
    let mut first = step(
        r#"{"predict": {"adapter": "compact", "inputs": [{"name": "text"}], "outputs": [{"name": "topic"}]}}"#,
    );
    first.name = "first".into();
    let second = step(
        r#"{"predict": {"adapter": "compact", "inputs": [{"name": "topic"}], "outputs": [{"name": "label"}]}}"#,
    );
    let program = Program::new(Dialect::Dspy25, vec![first, second]);
    let lm = Scripted::new(|request| Ok(format!("{}!", asked(request))));
    let results = program.run(
        &lm,
        &Sampling::default(),
        &rows(&["q"]),
        &RunOptions::default(),
    );
    assert_eq!(
        results[0].prediction.as_ref().unwrap().text("label"),
        Some("q!!")
    );
    let names: Vec<&str> = results[0]
        .trace
        .iter()
        .map(|step| step.predictor.as_str())
        .collect();
    assert_eq!(names, ["first", "predict"]);
}

/// Two axes: how often a text has `x`, and how often `y`.
struct Letters;

impl crate::classifier::Embedder for Letters {
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        let count = |text: &str, letter| text.matches(letter).count() as f32;
        let vector = |text: &&str| {
            let (x, y) = (count(text, 'x'), count(text, 'y'));
            let length = x.hypot(y).max(1.0);
            vec![x / length, y / length]
        };
        Ok(texts.iter().map(vector).collect())
    }
}

#[test]
fn demos_are_chosen_for_each_query_the_most_similar_last() {
    use crate::optimize::KnnFewShot;
    let knn = KnnFewShot {
        k: 2,
        bootstrap: false,
        embedder: std::sync::Arc::new(Letters),
    };
    let program = knn
        .apply(&compact(), &rows(&["x", "xy", "y", "yyx"]))
        .unwrap();
    let lm = Scripted::new(|request| {
        let shown: Vec<&str> = (request.messages.iter())
            .filter(|message| message.role == Role::User)
            .map(|message| message.content.as_str())
            .collect();
        Ok(shown.join("|"))
    });
    let raw = |program: &Program, options: &RunOptions<'_>| -> Vec<String> {
        let results = program.run(&lm, &Sampling::default(), &rows(&["xx", "yy"]), options);
        results.into_iter().map(|r| r.raw.unwrap()).collect()
    };
    let expected = ["xy|x|xx", "yyx|y|yy"];
    assert_eq!(raw(&program, &RunOptions::default()), expected);

    // Saved with its vectors, and given its encoder again.
    let json = r#"{"predict": {"adapter": "compact", "instructions": "",
            "inputs": [{"name": "query", "from": "text"}],
            "outputs": [{"name": "label", "type": "label"}], "constrain": true}}"#;
    let mut saved = SavedProgram::new(spec(json), vec!["a".into(), "b".into()], &program);
    saved.keep_neighbours(&program, &serde_json::json!("encoder"));
    let text = serde_json::to_string(&saved).unwrap();
    let mut loaded = serde_json::from_str::<SavedProgram>(&text)
        .unwrap()
        .build()
        .unwrap();
    let without = loaded.run(
        &lm,
        &Sampling::default(),
        &rows(&["xx"]),
        &RunOptions::default(),
    );
    assert!(
        without[0]
            .prediction
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("sentence encoder")
    );
    for predictor in &mut loaded.predictors {
        let neighbours = predictor.neighbours.as_mut().unwrap();
        neighbours.embedder = Some(std::sync::Arc::new(Letters));
    }
    assert_eq!(raw(&loaded, &RunOptions::default()), expected);
}

#[test]
fn draws_of_one_program_vote() {
    let majority = spec(
        r#"{"majority": {"samples": 3, "temperature": 0.5, "programs": [{"predict": {
            "adapter": "compact", "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}}]}}"#,
    );
    let program = majority.build(&["a".into(), "b".into()]).unwrap();
    let lm = Scripted::new(|request| {
        assert!((request.sampling.temperature - 0.5).abs() < 1e-9);
        let drawn = request.sampling.rollout.unwrap();
        Ok(if drawn == 0 { "a" } else { "B" }.to_owned())
    });
    let told = Mutex::new(0);
    let on_row = |_| *told.lock().unwrap() += 1;
    let options = RunOptions {
        on_row: Some(&on_row),
        ..RunOptions::default()
    };
    let results = program.run(&lm, &Sampling::default(), &rows(&["q", "r"]), &options);
    for result in &results {
        assert_eq!(result.prediction.as_ref().unwrap().text("label"), Some("b"));
        assert_eq!(
            (result.confidence, result.tokens.calls),
            (Some(2.0 / 3.0), 3)
        );
        assert_eq!(result.raw.as_deref(), Some("B"));
    }
    assert_eq!(told.into_inner().unwrap(), 2);
}

#[test]
fn the_members_of_an_ensemble_go_their_own_ways_and_vote() {
    let ensemble = spec(
        r#"{"majority": {"programs": [
            {"stages": [
                {"name": "topic", "predict": {"adapter": "compact", "instructions": "Topic.",
                    "inputs": [{"name": "text"}], "outputs": [{"name": "topic"}]}},
                {"name": "label", "predict": {"adapter": "compact", "instructions": "By topic.",
                    "inputs": [{"name": "topic"}], "outputs": [{"name": "label", "type": "label"}]}}]},
            {"predict": {"adapter": "compact", "instructions": "One.",
                "inputs": [{"name": "text"}], "outputs": [{"name": "label", "type": "label"}]}},
            {"predict": {"adapter": "compact", "instructions": "Two.",
                "inputs": [{"name": "text"}], "outputs": [{"name": "label", "type": "label"}]}}]}}"#,
    );
    let mut program = ensemble.build(&["a".into(), "b".into()]).unwrap();
    // A demo of one member is none of another's.
    program.predictors[2].demos = vec![Demo::labeled(&rows(&["shown"])[0])];
    let lm = Scripted::new(|request| {
        let system = request.messages[0].content.as_str();
        let shown = request.messages.len() > 2;
        assert_eq!(shown, system == "One.", "{system}");
        let query = asked(request);
        Ok(match system {
            "Topic." => format!("about {query}"),
            "By topic." => {
                assert!(query == "about q" || query == "about r", "{query}");
                "a".to_owned()
            }
            "One." if query == "q" => "B".to_owned(),
            "One." => "A".to_owned(),
            _ => "b".to_owned(),
        })
    });
    let rows = rows(&["q", "r"]);
    let results = program.run(&lm, &Sampling::default(), &rows, &RunOptions::default());
    let labels: Vec<&str> = results
        .iter()
        .map(|result| result.prediction.as_ref().unwrap().text("label").unwrap())
        .collect();
    assert_eq!(labels, ["b", "a"]);
    for result in &results {
        assert_eq!(result.confidence, Some(2.0 / 3.0));
        assert_eq!(result.tokens.calls, 4);
    }
}

#[test]
fn an_outage_ends_the_rounds_and_a_row_that_is_refused_does_not() {
    let majority = spec(
        r#"{"majority": {"samples": 3, "programs": [{"predict": {
            "adapter": "compact", "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}}]}}"#,
    );
    let program = majority.build(&["a".into(), "b".into()]).unwrap();
    let run = |error: LmError| {
        let lm = Scripted::new(|request| match asked(request).contains("spoilt") {
            true => Err(error.clone()),
            false => Ok("a".to_owned()),
        });
        let told = Mutex::new(Vec::<usize>::new());
        let on_row = |row: usize| told.lock().unwrap().push(row);
        let options = RunOptions {
            on_row: Some(&on_row),
            ..RunOptions::default()
        };
        let rows = rows(&["q", "spoilt"]);
        let results = program.run(&lm, &Sampling::default(), &rows, &options);
        let mut told = told.into_inner().unwrap();
        told.sort_unstable();
        assert_eq!(told, [0, 1]);
        let lost = |result: &RowResult| matches!(result.prediction, Err(RowError::Lm(_)));
        let lost: Vec<bool> = results.iter().map(lost).collect();
        (lm.batches.into_inner().unwrap(), lost)
    };
    for error in [
        LmError::Unavailable("down".into()),
        LmError::Barred("no key".into()),
        LmError::Cancelled,
    ] {
        assert_eq!(run(error), (vec![2], vec![true, true]));
    }
    for error in [
        LmError::Rejected("too long".into()),
        LmError::ServerError("it fails at this one".into()),
    ] {
        assert_eq!(run(error), (vec![2, 2, 2], vec![false, true]));
    }
}
