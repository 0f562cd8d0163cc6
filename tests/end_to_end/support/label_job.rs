//! A step that labels queries through a server, and must lose none.

use serde_json::Value;

use crate::classify;
use crate::project::{Project, Run};
use crate::server::Server;
use crate::tiny::write_model;

const PIPELINE: &str = "\
name: faults
models:
  oracle: { provider: openai, base_url: 'URL', model: MODEL, guided: vllm, concurrency: 1MORE }
programs:
  classify:
    predict:
      adapter: compact
      instructions: Sort.
      inputs: [{ name: text }]
      outputs: [{ name: label, type: label }]
      constrain: true
steps:
  load:
    uses: load
    with: { name: d, train: { file: train.csv }, test: { file: test.csv } }
  labels:
    uses: filter-top-n
    in: { train: load.train, test: load.test }
    with: { n: 2 }
  label:
    uses: bootstrap
    in: { unlabelled: load.test, labels: labels.labels }
    with: { program: classify, model: oracle }
    publish: { rows: rows.jsonl, dropped: dropped.jsonl }
";

/// A server of the tiny model, and its folder.
pub(crate) fn upstream() -> (Project, Server) {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let mut command = project.command(&["serve", "tiny", "--name", "tiny"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    (project, server)
}

/// Labels so many queries through the model of the server at `url`.
pub(crate) fn project(rows: usize, url: &str, model: &str, more: &str) -> Project {
    let project = Project::new();
    let text = PIPELINE.replace("URL", url).replace("MODEL", model);
    project.write("p.yaml", &text.replace("MORE", more));
    let known = [("a known one", "card_arrival"), ("another", "pin")];
    let known = known.map(|(text, label)| (text.to_owned(), label));
    classify::write_rows(&project, "train.csv", known);
    let queries = (0..rows).map(|i| (format!("query {i}"), "pin"));
    classify::write_rows(&project, "test.csv", queries);
    project
}

pub(crate) fn run(project: &Project) -> Run {
    project.run(&["p.yaml", "--json"])
}

/// The rows of an output, by query, with why they were dropped.
pub(crate) fn rows(project: &Project, file: &str) -> Vec<(String, Option<String>)> {
    let text = project.read(file);
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let text = row["text"].as_str().unwrap().to_owned();
        (text, row["dropped"].as_str().map(str::to_owned))
    };
    text.lines().map(row).collect()
}

/// No row is lost: each is labelled or dropped, once.
pub(crate) fn all_there(project: &Project, count: usize) {
    let kept = rows(project, "rows.jsonl");
    let dropped = rows(project, "dropped.jsonl");
    let mut all: Vec<String> = kept.into_iter().chain(dropped).map(|(q, _)| q).collect();
    all.sort();
    let mut expected: Vec<String> = (0..count).map(|i| format!("query {i}")).collect();
    expected.sort();
    assert_eq!(all, expected);
}
