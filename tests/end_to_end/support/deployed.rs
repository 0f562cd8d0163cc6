//! A deployed bundle, asked over HTTP: called by the test of the main job, which makes one.

use std::process::Command;

use serde_json::{Value, json};

use crate::processes::signal;
use crate::project::{Project, Run};
use crate::server::{Server, client};

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The server answers the program's questions as evaluated, and chats in OpenAI's shapes.
pub(crate) fn a_bundle_is_served(project: &Project, mut command: Command) {
    command.args(["serve", "results/bundle"]);
    let served = Server::start(command);
    for row in json_lines(&project.read("results/bundle/smoke.jsonl"))
        .iter()
        .take(5)
    {
        let answer = served.ask("/predict", &json!({"text": row["text"]}));
        assert_eq!(answer.status(), 200);
        let answer: Value = answer.json().unwrap();
        assert_eq!(answer["label"], row["label"]);
        let confidence = answer["confidence"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&confidence), "{confidence}");
    }
    let bad = served.ask("/predict", &json!({"text": " "}));
    assert_eq!(bad.status(), 400);

    let chat = json!({
        "model": served.model, "temperature": 0, "max_tokens": 5,
        "messages": [{"role": "user", "content": "Where is my card?"}],
    });
    let whole: Value = served.ask("/v1/chat/completions", &chat).json().unwrap();
    assert_eq!(whole["object"], "chat.completion");
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let spent = whole["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..=5).contains(&spent), "{whole}");

    let mut streamed = chat.clone();
    streamed["stream"] = true.into();
    let events = served
        .ask("/v1/chat/completions", &streamed)
        .text()
        .unwrap();
    let data: Vec<&str> = events
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    let (last, chunks) = data.split_last().unwrap();
    assert_eq!(*last, "[DONE]");
    let pieces: String = json_lines(&chunks.join("\n"))
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(pieces, text);

    let mut restricted = chat.clone();
    restricted["structured_outputs"] = json!({"choice": ["north", "south"]});
    let answer: Value = served
        .ask("/v1/chat/completions", &restricted)
        .json()
        .unwrap();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(["north", "south"].contains(&text), "{answer}");

    let mut other = chat;
    other["model"] = "another".into();
    let answer = served.ask("/v1/chat/completions", &other);
    assert_eq!(answer.status(), 404);
    let answer: Value = answer.json().unwrap();
    assert_eq!(answer["error"]["code"], "model_not_found");

    it_labels_as_an_oracle(project, &served);
    assert_eq!(served.stop(), Some(0));
}

/// The example that labels through a server, with this one as the oracle: every answer is one of
/// the labels, and a model that the server does not have is named.
fn it_labels_as_an_oracle(project: &Project, oracle: &Server) {
    project.copy_example("label", "label");
    let run = |more: &[&str]| {
        let mut command = project.command(&["--json", "pipeline.yaml"]);
        command
            .current_dir(project.path("label"))
            .args(["--set", &format!("base_url={}/v1", oracle.url)])
            .args(["--set", &format!("model={}", oracle.model)])
            .args(more);
        Run::of(command.output().unwrap())
    };
    let first = run(&[]).ok();
    assert_eq!(first.steps("ran"), ["load", "labels", "label"]);
    let rows = json_lines(&project.read("label/results/labelled.jsonl"));
    assert_eq!(rows.len(), 6);
    for row in &rows {
        let label = row["label"].as_str().unwrap();
        assert!(["card_arrival", "change_pin", "exchange_rate"].contains(&label));
    }
    let label = first.ended("label");
    assert!(label["metrics"]["tokens"].as_u64() > Some(0), "{label}");

    let unknown = run(&["--set", "model=another"]);
    assert_eq!(unknown.code, Some(4), "{}", unknown.stderr);
    assert!(unknown.stdout.contains("another"), "{}", unknown.stdout);
}

/// What `deployed/banking77/current.json` says.
pub(crate) struct Current {
    url: String,
    pub(crate) pid: u32,
}

impl Current {
    pub(crate) fn read(project: &Project) -> Self {
        let current: Value =
            serde_json::from_str(&project.read("deployed/banking77/current.json")).unwrap();
        Self {
            url: current["url"].as_str().unwrap().to_owned(),
            pid: current["pid"].as_u64().unwrap().try_into().unwrap(),
        }
    }

    /// Whether the server that was deployed answers.
    pub(crate) fn is_up(&self) -> bool {
        let health = client().get(format!("{}/health", self.url)).send();
        health.is_ok_and(|answer| {
            answer
                .json::<Value>()
                .is_ok_and(|health| health["pid"] == self.pid)
        })
    }

    /// Stops the server as the run told the user to.
    pub(crate) fn stop(&self) {
        signal("-TERM", self.pid);
        while self.is_up() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// Stops a deployed server however the test ends.
pub(crate) struct StopAtEnd<'a>(pub(crate) &'a Project);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        let current = Current::read(self.0);
        if current.is_up() {
            current.stop();
        }
    }
}
