//! Steps made of steps.

use super::example;

#[test]
fn definitions_run_are_cached_and_shown_as_steps_of_their_use() {
    let project = example("definitions");
    let args = ["pipeline.yaml", "--json"];
    let first = project.run(&args).ok();
    let mut ran = first.steps("ran");
    ran.sort();
    let inner = ["fruit/rank", "fruit/split", "trees/rank", "trees/split"];
    assert_eq!(ran[0], "both");
    assert_eq!(ran[1..], inner);
    assert_eq!(
        project.words("results/all.txt"),
        ["3", "apple", "2", "and", "3", "oak"]
    );
    assert_eq!(project.words("results/trees.txt"), ["3", "oak"]);
    // Another name of the use is the same work.
    project.edit("pipeline.yaml", "  fruit:\n", "  berries:\n");
    project.edit("pipeline.yaml", "fruit: fruit.top", "fruit: berries.top");
    let renamed = project.run(&args).ok();
    assert!(
        renamed.steps("ran").is_empty(),
        "{:?}",
        renamed.steps("ran")
    );
    // A param of one use touches that one alone, and only the step that reads it.
    let changed = project
        .run(&["pipeline.yaml", "--json", "--set", "n=1"])
        .ok();
    assert_eq!(changed.steps("ran"), ["berries/rank", "both"]);
    let plan = project.run(&["plan", "pipeline.yaml"]).ok().stdout;
    assert!(
        plan.contains("berries/split") && plan.contains("trees/rank"),
        "{plan}"
    );
    let why = project
        .run(&["why", "berries", "pipeline.yaml", "--set", "n=3"])
        .ok()
        .stdout;
    assert!(why.contains("cached berries/split"), "{why}");
    assert!(
        why.contains("head -n 1 > ") && why.contains("→ …2 | head -n 3 > "),
        "{why}"
    );
    let graph = project.run(&["graph", "pipeline.yaml"]).ok().stdout;
    assert!(
        graph.contains("trees/rank") && graph.contains("← trees/split"),
        "{graph}"
    );
    let from = project
        .run(&["pipeline.yaml", "--json", "--from", "trees"])
        .ok();
    let mut again = from.steps("ran");
    again.sort();
    assert_eq!(again, ["both", "trees/rank", "trees/split"]);
}

#[test]
fn a_mistake_in_a_definition_is_shown_there_and_at_its_uses() {
    let project = example("definitions");
    project.edit("top-words.yaml", "words: split.words", "words: split.wrods");
    let run = project.run(&["check", "pipeline.yaml"]);
    assert_eq!(run.code, Some(3));
    for part in [
        "top-words.yaml:17:18: error: the step `split` has no output `wrods`",
        "note: used by the step `fruit` at pipeline.yaml:8:11",
        "note: used by the step `trees` at pipeline.yaml:13:11",
        "did you mean `split.words`?",
        "1 error; nothing was run",
    ] {
        assert!(run.stderr.contains(part), "{part} in\n{}", run.stderr);
    }
}
