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
