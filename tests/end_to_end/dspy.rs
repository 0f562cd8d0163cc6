//! Programs that go to DSPy and come from it, as its saved files.

use std::process::Command;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::classify::{self, CONVERT, run};
use crate::external::named;
use crate::oracle::{Oracle, query};
use crate::programs::project;
use crate::project::Run;

const DSPY: &str = "  saved:
    uses: save-dspy
    in: { program: optimize.program }
    with: { names: { predict: sorter } }
    publish: { saved: dspy.json }
  loaded:
    uses: load-dspy
    in: { program: convert.program, saved: saved.saved }
    publish: { program: loaded.json }
  again:
    uses: evaluate
    in: { rows: labels.test, program: loaded.program }
    with: { model: m }
    publish: { scores: again.json }
";

#[test]
fn programs_go_to_dspy_and_come_from_it() {
    let by_pin = |body: &Value| {
        let label = ["card", "pin"][usize::from(query(body).contains("PIN"))];
        Some(label.to_owned())
    };
    for format in ["dspy-2.5", "dspy-3"] {
        let oracle = Oracle::start(by_pin);
        let project = project("      search: { restrict: [-2], max_labeled_demos: 2 }\n");
        let formatted = format!("adapter: compact\n      format: {format}");
        project.edit("p.yaml", "adapter: compact", &formatted);
        run(&project, &oracle).ok();
        assert!(oracle.calls() > 0);
        project.write("p.yaml", &format!("{}{DSPY}", project.read("p.yaml")));
        run(&project, &oracle).ok();
        assert_eq!(oracle.calls(), 0, "{format}: the very same prompts");
        let read = |name: &str| -> Value { serde_json::from_str(&project.read(name)).unwrap() };
        let demos = |name: &str| read(name)["prompt"]["demos"].clone();
        assert_eq!(
            demos("program.json")["predict"].as_array().unwrap().len(),
            2
        );
        assert_eq!(demos("loaded.json"), demos("program.json"));
        let leakage = &read("again.json")["programs"][0]["leakage"];
        assert_eq!(leakage["known"], false);
        let file = read("dspy.json");
        assert_eq!(file["sorter"]["demos"].as_array().unwrap().len(), 2);
        // DSPy 3 reads no file without it.
        let versions = &file["metadata"]["dependency_versions"];
        assert_eq!(versions.is_object(), format == "dspy-3");
    }

    // As DSPy 2.5 writes it, with instructions that an optimizer found there.
    let theirs = json!({"clf": {
        "lm": null, "traces": [], "train": [],
        "demos": [{"augmented": true, "text": "My PIN is gone", "label": "pin"}],
        "signature": {"instructions": "Sort well.", "fields": [
            {"prefix": "Text:", "description": "${text}"},
            {"prefix": "Label:", "description": "${label}"},
        ]},
    }});
    let asked: Arc<Mutex<Vec<Value>>> = Arc::default();
    let heard = Arc::clone(&asked);
    let oracle = Oracle::start(move |body| {
        heard.lock().unwrap().push(body["messages"].clone());
        by_pin(body)
    });
    let load = DSPY[DSPY.find("  loaded:").unwrap()..]
        .replace("saved: saved.saved", "saved: { file: theirs.json }");
    let project = classify::project(&[CONVERT, &load]);
    classify::write_rows(
        &project,
        "train.csv",
        [("A card".to_owned(), "card"), ("A PIN".to_owned(), "pin")],
    );
    classify::write_rows(&project, "test.csv", [("Which PIN?".to_owned(), "pin")]);
    project.write("theirs.json", &theirs.to_string());
    run(&project, &oracle).ok();
    let messages = asked.lock().unwrap()[0].clone();
    let contents: Vec<&str> = (messages.as_array().unwrap().iter())
        .map(|message| message["content"].as_str().unwrap())
        .collect();
    assert_eq!(
        contents,
        ["Sort well.", "My PIN is gone", "pin", "Which PIN?"]
    );

    for (from, to, said) in [
        (
            "${label}",
            "the intent",
            "the field `label` is described as `the intent`",
        ),
        ("{\"clf\"", "{\"other\":{},\"clf\"", "has no predictor"),
        ("\"demos\"", "", "not a saved program"),
    ] {
        let broken = theirs.to_string().replace(from, to);
        project.write("theirs.json", &broken);
        let refused = run(&project, &oracle);
        assert_eq!(refused.code, Some(4), "{broken}: {}", refused.stdout);
        assert!(refused.stdout.contains(said), "{said}: {}", refused.stdout);
    }
}

/// Loads a file into the program that it is of, changes the instructions, and saves it.
const SCRIPT: &str = r#"
import sys
import dspy

class Sorter(dspy.Module):
    def __init__(self):
        super().__init__()
        self.sorter = dspy.Predict(dspy.Signature("text -> label", "Another text."))

program = Sorter()
program.load(sys.argv[1])
assert program.sorter.signature.instructions == "Sort.", program.sorter.signature
assert len(program.sorter.demos) == 2, program.sorter.demos
program.sorter.signature = program.sorter.signature.with_instructions("Sort well.")
program.save(sys.argv[2])
"#;

/// The real thing, where `FLOWRUN_DSPY_PYTHON` names a Python that has DSPy 3.
#[test]
fn dspy_itself_reads_such_a_file_and_writes_one_that_is_read_here() {
    let dspy = "Python with DSPy 3 (pip install dspy)";
    let Some(python) = named("FLOWRUN_DSPY_PYTHON", dspy) else {
        return;
    };
    let oracle = Oracle::start(|_| Some("card".to_owned()));
    let project = project("      search: { restrict: [-2], max_labeled_demos: 2 }\n");
    let formatted = "adapter: compact\n      format: dspy-3";
    project.edit("p.yaml", "adapter: compact", formatted);
    project.write("p.yaml", &format!("{}{DSPY}", project.read("p.yaml")));
    run(&project, &oracle).ok();
    let (ours, theirs) = (project.path("dspy.json"), project.path("theirs.json"));
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT]).args([&ours, &theirs]);
    let ran = Run::of(command.output().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);

    let before: Value = serde_json::from_str(&project.read("loaded.json")).unwrap();
    let other = "saved: { file: theirs.json }";
    project.edit("p.yaml", "saved: saved.saved", other);
    run(&project, &oracle).ok();
    let after: Value = serde_json::from_str(&project.read("loaded.json")).unwrap();
    assert_eq!(after["prompt"]["demos"], before["prompt"]["demos"]);
    assert_eq!(after["prompt"]["instructions"]["predict"], "Sort well.");
}
