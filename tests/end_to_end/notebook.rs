//! The notebook profile's prompts, byte for byte the messages that the notebook prints.

use flowrun_lm::example::Example;
use flowrun_lm::lm::Message;
use flowrun_lm::messages::{MessageOptions, row_to_messages};
use flowrun_lm::program::ProgramSpec;
use serde_json::Value;

use crate::oracle::Oracle;
use crate::project::Project;
use crate::real_data::distdir;
use crate::required::skip;

const PRINTED: &str = include_str!("notebook_messages.json");
const PIPELINE: &str = include_str!("../../pipelines/banking77.yaml");

fn printed() -> Vec<Message> {
    serde_json::from_str(PRINTED).unwrap()
}

/// A field of the printed turn.
fn field<'a>(turn: &'a str, name: &str) -> &'a str {
    let (_, rest) = turn.split_once(&format!("[[ ## {name} ## ]]\n")).unwrap();
    rest.split("\n\n").next().unwrap()
}

/// The labels, in the order that the printed instructions list them in.
fn labels(system: &str) -> Vec<String> {
    let (_, list) = system.rsplit_once('[').unwrap();
    let list = list.trim_end_matches(']').split(", ");
    list.map(|label| label.trim_matches('\'').to_owned())
        .collect()
}

#[test]
fn the_notebooks_program_writes_the_notebooks_messages() {
    let pipeline: Value = serde_yaml::from_str(PIPELINE).unwrap();
    let printed = printed();
    let labels = labels(&printed[0].content);
    assert_eq!(labels.len(), 25);
    // Trained on and asked with: one description of the fields.
    for name in ["teach", "classify"] {
        let spec = pipeline["profiles"]["notebook"]["programs"][name].clone();
        let spec: ProgramSpec = serde_json::from_value(spec).unwrap();
        let program = spec.build(&labels).unwrap();
        let answer = &printed[2].content;
        let row = Example::of_texts(
            "banking77:train:0",
            [
                ("text", field(&printed[1].content, "intent")),
                ("reasoning", field(answer, "reasoning")),
                ("label", field(answer, "label")),
            ],
        );
        let ours = row_to_messages(&program, &row, MessageOptions::default()).unwrap();
        assert_eq!(ours[0].messages, printed, "{name}");
    }
}

/// The whole way: data, split, an oracle over HTTP that answers as the notebook's did, conversion.
#[test]
fn the_first_chat_of_the_notebook_profile_is_the_printed_one() {
    let Some(dist) = distdir() else {
        skip("banking77", "there is no banking77 in FLOWRUN_DISTDIR");
        return;
    };
    let answer = printed()[2].content.clone();
    let oracle = Oracle::start(move |_| Some(answer.clone()));
    let project = Project::new();
    project.write(
        "p.yaml",
        &PIPELINE.replace("http://localhost:8000/v1", &oracle.url),
    );
    project.edit(
        "p.yaml",
        "      program: classify\n\n  finetune:",
        "      program: classify\n    publish:\n      messages: messages.jsonl\n\n  finetune:",
    );
    let small = ["labelled=4100", "dev=2", "val=2"]
        .map(|value| ["--set", value])
        .concat();
    let args = [
        "p.yaml",
        "--profile",
        "notebook",
        "--until",
        "convert-to-messages",
    ];
    let mut command = project.command(&[&args, small.as_slice()].concat());
    let run = crate::project::Run::of(command.env("FLOWRUN_DISTDIR", dist).output().unwrap());
    run.ok();
    assert_eq!(oracle.calls(), 71);
    let messages = project.read("messages.jsonl");
    let first: Value = serde_json::from_str(messages.lines().next().unwrap()).unwrap();
    let first: Vec<Message> = serde_json::from_value(first["messages"].clone()).unwrap();
    assert_eq!(first, printed());
}
