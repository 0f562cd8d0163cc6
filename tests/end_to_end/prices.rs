//! What 1,000 queries cost, from declared prices and measured tokens.

use serde_json::{Value, json};

use crate::oracle::Oracle;
use crate::tiny;

/// Dollars for a million tokens: of a prompt, of an answer.
const ORACLE: (f64, f64) = (10.0, 100.0);
const STUDENT: (f64, f64) = (0.5, 2.0);

const MORE: &str = "
  ask-oracle:
    uses: evaluate
    in: { rows: labels.test, program: chats.program }
    with: { model: oracle, role: oracle }
    publish: { scores: oracle.json }
  ask-unpriced:
    uses: evaluate
    in: { rows: labels.test, program: chats.program }
    with: { model: unpriced, role: base }
  report:
    uses: report
    in:
      about: load.about
      labels: labels.labels
      train: labels.train
      labelled: labels.train
      dev: [score.scores]
      test: [score.scores, ask-oracle.scores, ask-unpriced.scores]
    with: { title: prices, about: prices, pipeline: prices }
    publish: { json: report.json, report: report.html }
";

#[test]
fn a_thousand_queries_cost_what_their_tokens_do() {
    // It says that each prompt has 5 tokens and each answer 2.
    let oracle = Oracle::start(|_| Some("card_arrival".to_owned()));
    let project = tiny::project();
    let prices =
        |(input, output): (f64, f64)| format!("prices: {{ input: {input}, output: {output} }}");
    let remote = |name: &str| {
        format!(
            "{{ provider: openai, base_url: '{}', model: {name}, max_retries: 0",
            oracle.url
        )
    };
    project.edit(
        "pipeline.yaml",
        "    weights: { file: tiny }\n",
        &format!(
            "    weights: {{ file: tiny }}\n    {}\n  oracle: {}, {} }}\n  unpriced: {} }}\n",
            prices(STUDENT),
            remote("big"),
            prices(ORACLE),
            remote("other"),
        ),
    );
    project.edit(
        "pipeline.yaml",
        "    with: { model: student }\n",
        "    with: { model: student, role: best }\n    publish: { scores: student.json }\n",
    );
    // A server that cannot be held to the labels.
    project.edit("pipeline.yaml", "      constrain: true\n", "");
    let text = project.read("pipeline.yaml") + MORE;
    project.write("pipeline.yaml", &text);
    project.run(&["pipeline.yaml"]).ok();
    assert_eq!(oracle.calls(), 12);

    let report: Value = serde_json::from_str(&project.read("report.json")).unwrap();
    let row = |model: &str| {
        let rows = report["cost"].as_array().unwrap();
        rows.iter().find(|row| row["model"] == model).unwrap()
    };
    let close = |a: &Value, b: f64| assert!((a.as_f64().unwrap() - b).abs() < 1e-9, "{a} {b}");
    let paid = row("big");
    assert_eq!(
        (&paid["queries"], &paid["tokens_per_query"]),
        (&json!(6), &json!(7.0))
    );
    // 1,000 × (5 × $10 + 2 × $100) / 1,000,000.
    close(&paid["usd_per_1000"], 0.25);

    let scores: Value = serde_json::from_str(&project.read("student.json")).unwrap();
    let score = &scores["programs"][0];
    let tokens = |name: &str| score[name].as_f64().unwrap();
    let (prompt, answer) = (tokens("prompt_tokens"), tokens("completion_tokens"));
    assert!(prompt > 0.0 && answer > 0.0, "{score}");
    let expected = (prompt * STUDENT.0 + answer * STUDENT.1) / 1e6 / 6.0 * 1000.0;
    close(&row("tiny")["usd_per_1000"], expected);

    assert_eq!(row("other")["usd_per_1000"], Value::Null);
    let page = project.read("report.html");
    assert!(page.contains("$0.25") && page.contains("no price known"));
}
