//! Runs of two machines with a remote cache between them, and what they say of it.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::project::{Project, Run};

/// Files, a folder with an executable, a list, a step that always runs.
const PIPELINE: &str = "\
name: mixed
params: { letter: a }
steps:
  words:
    run: grep \"$LETTER\" \"$text\" > \"$words\"
    in: { text: { file: words.txt } }
    out: { words: words.txt }
    env: { LETTER: \"${{ params.letter }}\" }
  folder:
    run: |
      mkdir -p \"$folder/deep\"; cp \"$words\" \"$folder/deep/words\"
      printf '#!/bin/sh\\necho tool\\n' > \"$folder/tool\"; chmod +x \"$folder/tool\"
    in: { words: words.words }
    out: { folder: folder }
    publish: { folder: results/folder }
  use:
    foreach: { which: [one, two] }
    run: (\"$folder/tool\"; wc -l < \"$folder/deep/words\"; echo ${{ item.which }}) > \"$line\"
    in: { folder: folder.folder }
    out: { line: line.txt }
  all:
    run: cat \"$lines\"/* > \"$all\"
    in: { lines: use.line }
    out: { all: all.txt }
    publish: { all: results/all.txt }
  told:
    run: date +%N > \"$told\"
    cache: never
    in: { all: all.all }
    out: { told: told.txt }
";

pub(crate) fn machine() -> Project {
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    project.write("words.txt", "a\nba\nc\nda\n");
    project
}

/// One step that makes a file of so many bytes, in which no part is like another.
pub(crate) fn large(bytes: u64) -> Project {
    let project = Project::new();
    let pipeline = format!(
        "steps:\n  large:\n    run: seq 1 20000000 | head -c {bytes} > \"$large\"\n    out: {{ large: large.txt }}\n    publish: {{ large: large.txt }}\n"
    );
    project.write("pipeline.yaml", &pipeline);
    project
}

/// A run of the pipeline with this remote.
pub(crate) fn args<'a>(remote: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["pipeline.yaml", "--json", "--remote", remote], more].concat()
}

/// Digests by output, of all steps but those that always run.
pub(crate) fn outputs(run: &Run) -> BTreeMap<String, Value> {
    let events = run.events();
    let ended = events.iter().filter(|e| e["event"] == "step_finished");
    let all = ended.flat_map(|e| {
        let outputs = e["outputs"].as_object().unwrap().iter();
        outputs.map(move |(port, o)| (format!("{}.{port}", e["step"]), o["digest"].clone()))
    });
    all.filter(|(name, _)| !name.contains("told")).collect()
}

/// The steps whose results came from the remote.
pub(crate) fn fetched(run: &Run) -> Vec<String> {
    let events = run.events();
    let from = events.iter().filter(|e| e["from"] == "remote");
    let mut steps: Vec<_> = from
        .map(|e| e["step"].as_str().unwrap().to_owned())
        .collect();
    steps.sort();
    steps
}

/// The event that says what was sent.
pub(crate) fn uploaded(run: &Run) -> Option<Value> {
    run.events().into_iter().find(|e| e["event"] == "uploaded")
}

pub(crate) fn warnings(run: &Run) -> Vec<String> {
    let events = run.events();
    let told = events.iter().filter(|e| e["event"] == "warning");
    told.map(|e| format!("{} {}", e["step"], e["text"]))
        .collect()
}

/// Two machines, and the run of the first.
pub(crate) struct Machines {
    pub(crate) here: Project,
    pub(crate) there: Project,
    pub(crate) made: Run,
}

/// Runs the binary in a project, told how to reach the remote.
type Runs<'a> = &'a dyn Fn(&Project, &[&str]) -> Run;

/// What one machine makes is sent, and another one has it from there.
pub(crate) fn a_second_machine_gets_every_step(run: Runs<'_>, remote: &str) -> Machines {
    let (here, there) = (machine(), machine());
    let made = run(&here, &args(remote, &[])).ok();
    assert_eq!(made.steps("ran").len(), 6);
    assert!(warnings(&made).is_empty(), "{:?}", warnings(&made));
    let sent = uploaded(&made).unwrap();
    assert_eq!((&sent["results"], &sent["waiting"]), (&5.into(), &0.into()));
    let got = run(&there, &args(remote, &[])).ok();
    assert_eq!(
        (fetched(&got).len(), got.steps("ran")),
        (5, vec!["told".into()])
    );
    assert_eq!(outputs(&got), outputs(&made));
    assert_eq!(there.read("results/all.txt"), here.read("results/all.txt"));
    there.run(&["cache", "verify"]).ok();
    Machines { here, there, made }
}

/// What is there stays, and is not sent again by hand.
pub(crate) fn it_is_pushed_and_pulled_by_hand(run: Runs<'_>, remote: &str, here: &Project) {
    let pushed = run(here, &["cache", "push", "--remote", remote]).ok();
    assert!(pushed.stdout.contains("sent 1 of 6"), "{}", pushed.stdout);
    let pulled = run(&machine(), &["cache", "pull", "--remote", remote]).ok();
    assert!(pulled.stdout.contains("got 6 results"), "{}", pulled.stdout);
}

/// A remote that is not there costs a warning.
pub(crate) fn it_need_not_be_there(run: Runs<'_>, absent: &str) {
    let alone = run(&machine(), &args(absent, &[])).ok();
    assert_eq!(alone.steps("ran").len(), 6);
    assert_eq!(warnings(&alone).len(), 1, "{:?}", warnings(&alone));
}

/// A file of 30 MB, which is more than goes at once.
pub(crate) fn a_large_file_goes_and_comes(run: Runs<'_>, remote: &str) {
    const BYTES: u64 = 30_000_000;
    let made = run(&large(BYTES), &args(remote, &[])).ok();
    assert_eq!(uploaded(&made).unwrap()["bytes"], BYTES);
    let got = run(&large(BYTES), &args(remote, &[])).ok();
    assert_eq!(fetched(&got), ["large"]);
    assert_eq!(outputs(&got), outputs(&made));
}

/// Several machines that make and send the same at once; gives their runs.
pub(crate) fn write_at_once<const N: usize>(command: impl Fn(&Project) -> Command) -> [Run; N] {
    let machines = [(); N].map(|()| machine());
    let started = machines.each_ref().map(|project| {
        let mut command = command(project);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    });
    let runs = started.map(|child| Run::of(child.wait_with_output().unwrap()).ok());
    for run in &runs {
        assert_eq!(outputs(run), outputs(&runs[0]));
        assert!(warnings(run).is_empty(), "{:?}", warnings(run));
    }
    runs
}
