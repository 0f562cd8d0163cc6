//! The tiny main job with its heavy steps somewhere else.

use serde_json::Value;

use crate::project::{Project, Run};

/// Says that the heavy steps have these `settings`, of a runner that the section `runners` names.
pub(crate) fn move_to(project: &Project, runners: &str, settings: &str) {
    move_kinds(
        project,
        runners,
        settings,
        &["convert-to-messages", "evaluate"],
    );
}

/// The same of the steps of these kinds.
pub(crate) fn move_kinds(project: &Project, runners: &str, settings: &str, kinds: &[&str]) {
    for kind in kinds {
        let uses = format!("uses: {kind}\n");
        project.edit("pipeline.yaml", &uses, &format!("{uses}{settings}"));
    }
    let text = format!("{runners}{}", project.read("pipeline.yaml"));
    project.write("pipeline.yaml", &text);
}

/// The runner is in no key: what was made here is found, and made elsewhere by `run` it is the
/// same. Gives that other run.
pub(crate) fn are_the_same_elsewhere(here: &Run, run: impl Fn(&[&str]) -> Run) -> Run {
    let cached = run(&["pipeline.yaml", "--json"]).ok();
    assert!(cached.steps("ran").is_empty(), "the runner is in no key");
    let there = run(&["pipeline.yaml", "--json", "--from", "chats"]).ok();
    assert_eq!(there.steps("ran"), ["chats", "score", "deploy"]);
    assert_same(here, &there);
    there
}

/// Both runs made the same of the heavy steps, and the second told how far `score` was.
pub(crate) fn assert_same(here: &Run, there: &Run) {
    assert_eq!(made(there), made(here));
    let events = there.events();
    let scored = |e: &Value| e["event"] == "progress" && e["step"] == "score" && e["total"] != 0;
    assert!(events.iter().any(scored), "{}", there.stdout);
}

/// Keys and digests.
fn made(run: &Run) -> Vec<(Value, Value, Value)> {
    let events = run.events();
    let ended = events.iter().filter(|e| e["event"] == "step_finished");
    let steps = ended.filter(|e| e["step"] == "chats" || e["step"] == "score");
    let part = |e: &Value, part: &str| e["outputs"][part]["digest"].clone();
    steps
        .map(|e| (e["key"].clone(), part(e, "messages"), part(e, "program")))
        .collect()
}

/// The key of a step and the digests of its outputs.
pub(crate) fn made_by(run: &Run, step: &str) -> (Value, Vec<(String, Value)>) {
    let ended = run.ended(step);
    let outputs = ended["outputs"].as_object().unwrap().iter();
    let digests = outputs.map(|(name, output)| (name.clone(), output["digest"].clone()));
    (ended["key"].clone(), digests.collect())
}
