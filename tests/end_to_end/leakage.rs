//! Rows that trained or selected a program do not score it unnoticed.

use serde_json::Value;

use crate::oracle::{Oracle, query};
use crate::project::Project;

const PIPELINE: &str = "\
name: leak
params: { url: none }
models:
  m: { provider: openai, base_url: \"${{ params.url }}\", model: m, max_retries: 0 }
programs:
  classify:
    predict:
      adapter: compact
      instructions: Sort.
      inputs: [{ name: text }]
      outputs: [{ name: label, type: label }]
steps:
  load:
    uses: load
    with: { name: d, train: { file: train.csv }, test: { file: test.csv } }
  labels:
    uses: filter-top-n
    in: { train: load.train, test: load.test }
    with: { n: 2 }
  convert:
    uses: convert-to-messages
    in: { rows: [labels.train], labels: labels.labels }
    with: { program: classify }
  optimize:
    uses: optimize
    in: { program: convert.program, trainset: labels.train, valset: labels.test }
    with:
      model: m
      search: { max_bootstrapped_demos: 1, max_labeled_demos: 1, num_candidate_programs: 0 }
  test:
    uses: evaluate
    in: { rows: labels.test, program: optimize.program }
    with: { model: m, role: best }
    publish: { scores: scores.json }
";

fn project(oracle: &Oracle) -> (Project, String) {
    let project = Project::new();
    project.write("p.yaml", PIPELINE);
    let rows = |split: &str| -> String {
        let row = |i: usize| format!("{split} {i} {0},{0}\n", ["a", "b"][i % 2]);
        (0..8).map(row).collect()
    };
    project.write("train.csv", &format!("text,label\n{}", rows("train")));
    // One text is in both files.
    let test = format!("text,label\n{}Train 0  A,a\n", rows("test"));
    project.write("test.csv", &test);
    (project, format!("url={}", oracle.url))
}

fn last_word(body: &Value) -> Option<String> {
    query(body).split_whitespace().last().map(str::to_lowercase)
}

#[test]
fn a_test_row_that_selected_the_program_is_an_error_unless_allowed() {
    let oracle = Oracle::start(last_word);
    let (project, url) = project(&oracle);
    let args = ["p.yaml", "--json", "--set", &url];

    let refused = project.run(&args);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said = "9 rows selected by (`d:test:0`, `d:test:1`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    assert!(refused.stdout.contains("leakage: allow"));

    project.edit("p.yaml", "role: best }", "role: best, leakage: allow }");
    project.run(&args).ok();
    let scores: Value = serde_json::from_str(&project.read("scores.json")).unwrap();
    let score = &scores["programs"][0];
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
    let warned = project.run(&args).ok();
    assert!(
        warned
            .stdout
            .contains("1 row equal text under another id (`d:test:8`)")
    );
    let scores: Value = serde_json::from_str(&project.read("scores.json")).unwrap();
    let leakage = &scores["programs"][0]["leakage"];
    assert_eq!(leakage["same_text"], 1);
    assert_eq!(
        (&leakage["clean_rows"], &leakage["clean_correct"]),
        (&8.into(), &8.into())
    );

    project.edit("p.yaml", "leakage: refuse", "leakage: refuse_equal_texts");
    assert_eq!(project.run(&args).code, Some(4));
}

#[test]
fn test_rows_are_refused_before_they_are_trained_on() {
    let oracle = Oracle::start(last_word);
    let (project, url) = project(&oracle);
    project.edit(
        "p.yaml",
        "in: { rows: [labels.train], labels: labels.labels }",
        "in: { rows: [labels.train, labels.test], labels: labels.labels, test: labels.test }",
    );
    let refused = project.run(&["p.yaml", "--json", "--set", &url]);
    assert_eq!(refused.code, Some(4));
    let said = "test rows are among the rows to train on: 9 rows trained on (`d:test:0`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    assert_eq!(oracle.calls(), 0);
}
