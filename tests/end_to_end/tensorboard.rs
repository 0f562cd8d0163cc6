//! Event files for TensorBoard. One test reads them with the real package:
//! `FLOWRUN_TENSORBOARD_PYTHON` names a Python with `tensorboard`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::external::named;
use crate::files;
use crate::project::Project;
use crate::tiny;

const TRACKING: &str = "tracking: { tensorboard: { folder: results/tb } }\n";

/// A project that trains the tiny model and scores its checkpoints.
fn project() -> Project {
    let project = tiny::project();
    tiny::train(&project, None, "lora: { rank: 2 }");
    let pipeline = project.read("pipeline.yaml");
    project.write("pipeline.yaml", &format!("{TRACKING}{pipeline}"));
    project
}

/// The event files, run by run.
fn files(project: &Project) -> Vec<PathBuf> {
    files::below(&project.path("results/tb"))
}

fn holds(file: &Path, text: &str) -> bool {
    let bytes = std::fs::read(file).unwrap();
    bytes
        .windows(text.len())
        .any(|part| part == text.as_bytes())
}

#[test]
fn a_run_leaves_an_event_file_and_one_with_nothing_to_do_leaves_none() {
    let project = project();
    // It is a file: no network is needed.
    let run = project.run(&["--json", "--offline", "pipeline.yaml"]).ok();
    let id = run.events()[0]["run"].as_str().unwrap().to_owned();
    let made = files(&project);
    assert_eq!(made.len(), 1, "{made:?}");
    assert!(made[0].to_str().unwrap().contains(&id), "{made:?}");
    for tag in ["brain.Event:2", "finetune/loss", "score/accuracy"] {
        assert!(holds(&made[0], tag), "{tag}");
    }
    project.run(&["--json", "pipeline.yaml"]).ok();
    assert_eq!(files(&project), made);
    // Another run has all of it again.
    project.edit("pipeline.yaml", "max_tokens: 8", "max_tokens: 7");
    project.run(&["--json", "pipeline.yaml"]).ok();
    let both = files(&project);
    assert_eq!(both.len(), 2, "{both:?}");
    assert!(both.iter().all(|file| holds(file, "finetune/loss")));
}

#[test]
fn a_folder_that_cannot_be_written_is_a_warning() {
    let project = Project::new();
    let text = format!("{TRACKING}steps:\n  a: {{ run: echo x > $o, out: {{ o: o }} }}\n");
    project.write("p.yaml", &text);
    project.write("results", "a file, and no folder");
    let run = project.run(&["p.yaml"]).ok();
    assert!(run.stderr.contains("TensorBoard: "), "{}", run.stderr);
}

const READER: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
run = EventAccumulator(sys.argv[1]).Reload()
tags = run.Tags()["scalars"]
print(json.dumps({tag: [[e.step, e.value] for e in run.Scalars(tag)] for tag in tags}))
"#;

#[test]
fn tensorboard_itself_reads_the_curves() {
    let tensorboard = "Python with `tensorboard`";
    let Some(python) = named("FLOWRUN_TENSORBOARD_PYTHON", tensorboard) else {
        return;
    };
    let project = project();
    project.run(&["pipeline.yaml"]).ok();
    let made = files(&project);
    let folder = made[0].parent().unwrap();
    let mut reader = Command::new(python);
    let read = reader.args(["-c", READER]).arg(folder).output().unwrap();
    let said = String::from_utf8_lossy(&read.stderr).into_owned();
    assert!(read.status.success(), "{said}");
    let text = String::from_utf8(read.stdout).unwrap();
    let tags: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let loss = tags["finetune/loss"].as_array().unwrap();
    assert!(loss.len() > 1, "{tags}");
    let steps: Vec<&Value> = loss.iter().map(|point| &point[0]).collect();
    assert_eq!(steps[0], &json!(1));
    // The base and two checkpoints, the last at the last step.
    let scores = tags["score/accuracy"].as_array().unwrap();
    assert_eq!(scores.len(), 3, "{tags}");
    let mut trained: Vec<u64> = scores.iter().filter_map(|s| s[0].as_u64()).collect();
    trained.sort_unstable();
    assert_eq!((trained[0], trained[2]), (0, loss.len() as u64));
}
