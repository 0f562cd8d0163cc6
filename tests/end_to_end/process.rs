//! `runner: process`: the work of a step kind in a process of its own.

use std::fmt::Write;
use std::process::Stdio;

use crate::project::Project;

const PIPELINE: &str = "\
steps:
  load:
    uses: load
    runner: process
    with: { name: rows, train: { file: rows.csv }, test: { file: rows.csv } }
  split:
    uses: split
    in: { rows: load.train }
    with: { labelled: 5 }
";

fn project(rows: usize) -> Project {
    let project = Project::new();
    let mut text = String::from("text,label\n");
    for i in 0..rows {
        writeln!(text, "row number {i} with some words in it,label-{}", i % 3).unwrap();
    }
    project.write("rows.csv", &text);
    project.write("p.yaml", PIPELINE);
    project
}

#[test]
fn the_result_is_the_same_as_inline_and_shares_its_key() {
    let project = project(50);
    let outputs = |run: &crate::project::Run| {
        let events = run.events();
        let load = events
            .iter()
            .find(|e| e["event"] == "step_finished" && e["step"] == "load");
        let load = load.unwrap();
        (
            load["key"].clone(),
            load["outputs"]["train"]["digest"].clone(),
        )
    };
    let apart = project.run(&["p.yaml", "--json"]).ok();
    assert_eq!(apart.steps("ran"), ["load", "split"]);
    project.edit("p.yaml", "runner: process", "runner: inline");
    let cached = project.run(&["p.yaml", "--json"]).ok();
    assert!(cached.steps("ran").is_empty(), "the runner is in no key");
    let inline = project.run(&["p.yaml", "--json", "--force"]).ok();
    assert_eq!(outputs(&apart), outputs(&inline));
}

#[test]
fn a_failure_and_too_little_memory_are_failures_of_the_step() {
    let project = project(50);
    project.edit("p.yaml", "labelled: 5", "labelled: 500");
    project.edit(
        "p.yaml",
        "uses: split\n",
        "uses: split\n    runner: process\n",
    );
    let run = project.run(&["p.yaml"]);
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    let inline = self::project(50);
    inline.edit("p.yaml", "labelled: 5", "labelled: 500");
    let said = inline.run(&["p.yaml", "--json"]);
    let events = said.events();
    let split = events
        .iter()
        .find(|e| e["event"] == "step_finished" && e["step"] == "split");
    let why = split.unwrap()["why"].as_str().unwrap().to_owned();
    assert!(
        run.stderr.contains(why.lines().next().unwrap()),
        "{why}\n{}",
        run.stderr
    );
    if cfg!(target_os = "linux") {
        let big = self::project(200_000);
        // One that holds all rows: those before it pass them on one by one.
        big.edit(
            "p.yaml",
            "uses: split\n",
            "uses: holdout\n    runner: process\n    resources: { memory: 24MB }\n",
        );
        big.edit("p.yaml", "labelled: 5", "dev: 5, val: 5");
        let run = big.run(&["p.yaml"]);
        assert_eq!(run.code, Some(4), "{}", run.stderr);
        assert!(
            run.stderr.contains("`resources.memory` of 24 MB"),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn the_entry_of_the_child_wants_a_request() {
    let project = Project::new();
    let mut command = project.command(&["step", "exec"]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("there is no request on standard input"),
        "{text}"
    );
    let nothing = project.run(&["step", "exec", "--job", "nowhere"]);
    assert_eq!(nothing.code, Some(2));
    assert!(
        nothing.stderr.contains("there is no job"),
        "{}",
        nothing.stderr
    );
}
