//! Rows that trained or selected a program do not score it unnoticed.

use serde_json::Value;

use crate::classify::{self, TEST, run, scores};
use crate::oracle::{Oracle, query};
use crate::project::Project;

const CONVERT: &str = "  convert:
    uses: convert-to-messages
    in: { rows: [labels.train], labels: labels.labels }
    with: { program: classify }
";

const OPTIMIZE: &str = "  optimize:
    uses: optimize
    in: { program: convert.program, trainset: labels.train, valset: labels.test }
    with:
      model: m
      search: { max_bootstrapped_demos: 1, max_labeled_demos: 1, num_candidate_programs: 0 }
";

fn project() -> Project {
    let project = classify::project(&[CONVERT, OPTIMIZE, TEST]);
    let rows = |split: &'static str| {
        (0..8).map(move |i| {
            let label = ["a", "b"][i % 2];
            (format!("{split} {i} {label}"), label)
        })
    };
    classify::write_rows(&project, "train.csv", rows("train"));
    // One text is in both files.
    let same = ("Train 0  A".to_owned(), "a");
    classify::write_rows(&project, "test.csv", rows("test").chain([same]));
    project
}

fn last_word(body: &Value) -> Option<String> {
    query(body).split_whitespace().last().map(str::to_lowercase)
}

#[test]
fn a_test_row_that_selected_the_program_is_an_error_unless_allowed() {
    let oracle = Oracle::start(last_word);
    let project = project();

    let refused = run(&project, &oracle);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said = "9 rows selected by (`d:test:0`, `d:test:1`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    assert!(refused.stdout.contains("leakage: allow"));

    project.edit("p.yaml", "role: best }", "role: best, leakage: allow }");
    run(&project, &oracle).ok();
    let tested = scores(&project);
    let score = &tested["programs"][0];
    assert_eq!((&score["n"], &score["correct"]), (&9.into(), &9.into()));
    let leakage = &score["leakage"];
    assert_eq!(leakage["known"], true);
    assert_eq!(
        (&leakage["trained"], &leakage["selected"]),
        (&0.into(), &9.into())
    );
    assert_eq!(leakage["clean_rows"], 0);
    assert_eq!(score["per_label"][0]["f1"], 1.0);
    let interval = score["interval"][0].as_f64().unwrap();
    assert!(
        interval > 0.6 && interval < 0.8,
        "Wilson's, of 9 of 9: {interval}"
    );

    // Selected on training rows instead, the test rows are clean but for the text seen before.
    project.edit("p.yaml", "valset: labels.test", "valset: labels.train");
    project.edit("p.yaml", "leakage: allow", "leakage: refuse");
    let warned = run(&project, &oracle).ok();
    assert!(
        warned
            .stdout
            .contains("1 row equal text under another id (`d:test:8`)")
    );
    let tested = scores(&project);
    let leakage = &tested["programs"][0]["leakage"];
    assert_eq!(leakage["same_text"], 1);
    assert_eq!(
        (&leakage["clean_rows"], &leakage["clean_correct"]),
        (&8.into(), &8.into())
    );

    project.edit("p.yaml", "leakage: refuse", "leakage: refuse_equal_texts");
    assert_eq!(run(&project, &oracle).code, Some(4));
}

#[test]
fn test_rows_are_refused_before_they_are_trained_on() {
    let oracle = Oracle::start(last_word);
    let project = project();
    project.edit(
        "p.yaml",
        "in: { rows: [labels.train], labels: labels.labels }",
        "in: { rows: [labels.train, labels.test], labels: labels.labels, test: labels.test }",
    );
    let refused = run(&project, &oracle);
    assert_eq!(refused.code, Some(4));
    let said = "test rows are among the rows to train on: 9 rows trained on (`d:test:0`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    assert_eq!(oracle.calls(), 0);
}

/// The teacher chooses its demos from the rows of `LABELLED`, the student learns from its labels.
const TAUGHT: &str = "  label:
    uses: bootstrap
    in: { unlabelled: labels.train, labelled: LABELLED, labels: labels.labels }
    with: { program: classify, model: m, knn: { k: 1, embedder: embedder } }
  convert:
    uses: convert-to-messages
    in: { rows: [label.rows], labels: labels.labels, teachers: [label.teacher], test: labels.test }
    with: { program: classify }
    publish: { lineage: lineage.json }
  optimize:
    uses: optimize
    in: { program: convert.program, trainset: label.rows, valset: label.rows, teachers: [label.teacher] }
    with:
      model: m
      search: { restrict: [-2], max_labeled_demos: 1 }
";

#[test]
fn a_test_row_that_the_teacher_came_from_is_found_in_the_students_score() {
    let oracle = Oracle::start(last_word);
    let project = project();
    let text = project.read("p.yaml");
    let (head, _) = text.split_once("  convert:\n").unwrap();
    let steps = TAUGHT.replace("LABELLED", "labels.test");
    project.write("p.yaml", &format!("{head}{steps}{TEST}"));

    // Refused before it is trained on, and for a program before it is scored.
    let said = "9 rows known to its teacher (`d:test:0`, `d:test:1`, ";
    let refused = run(&project, &oracle);
    assert_eq!(refused.code, Some(4));
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    assert!(
        refused
            .stdout
            .contains("test rows are among the rows to train on")
    );
    project.edit("p.yaml", ", test: labels.test }", " }");
    let refused = run(&project, &oracle);
    assert_eq!(refused.code, Some(4));
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    let lineage: Value = serde_json::from_str(&project.read("lineage.json")).unwrap();
    assert_eq!(lineage["taught"].as_object().unwrap().len(), 9);

    project.edit("p.yaml", "role: best }", "role: best, leakage: allow }");
    run(&project, &oracle).ok();
    let leakage = &scores(&project)["programs"][0]["leakage"];
    assert_eq!(
        (&leakage["taught"], &leakage["clean_rows"]),
        (&9.into(), &0.into())
    );
    assert_eq!(leakage["known"], true);

    // The labels that the teacher gave measure the agreement with it: nothing is refused there.
    let rest = "in: { rows: labels.test, program: optimize.program }\n    with: { model: m, role: best, leakage: allow }";
    let dev =
        "in: { rows: label.rows, program: convert.program }\n    with: { model: m, role: best }";
    project.edit("p.yaml", rest, dev);
    run(&project, &oracle).ok();
    let clean = scores(&project)["programs"][0]["leakage"].clone();
    assert_eq!(
        (&clean["taught"], &clean["clean_rows"]),
        (&0.into(), &8.into())
    );

    // Taught by training rows, the test is clean but for the text that it shares with them; and
    // a teacher that is not given leaves it open.
    project.edit("p.yaml", dev, &rest.replace(", leakage: allow", ""));
    project.edit("p.yaml", "labelled: labels.test", "labelled: labels.train");
    run(&project, &oracle).ok();
    let clean = scores(&project)["programs"][0]["leakage"].clone();
    assert_eq!(
        (&clean["known"], &clean["taught"]),
        (&true.into(), &0.into())
    );
    assert_eq!(
        (&clean["same_text"], &clean["clean_rows"]),
        (&1.into(), &8.into())
    );
    project.edit(
        "p.yaml",
        "valset: label.rows, teachers: [label.teacher] }",
        "valset: label.rows }",
    );
    let warned = run(&project, &oracle).ok();
    assert!(
        warned
            .stdout
            .contains("a teacher that `teachers` does not give")
    );
    assert_eq!(scores(&project)["programs"][0]["leakage"]["known"], false);
}
