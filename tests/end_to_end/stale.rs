//! Why a step runs: each cause with what it was and what it is.

use serde_json::Value;

use crate::files;
use crate::project::{Project, Run};

const JSON: &[&str] = &["pipeline.yaml", "--json"];

/// What `why STEP` prints.
fn why(project: &Project, step: &str, more: &[&str]) -> String {
    let args = [&["why", step, "pipeline.yaml"], more].concat();
    project.run(&args).ok().stdout
}

#[test]
fn each_cause_is_named_with_old_and_new() {
    let project = Project::shell();
    let first = project.run(JSON).ok();
    let run = first.events()[0]["run"].as_str().unwrap().to_owned();

    let env = why(&project, "count", &["--set", "letter=m"]);
    assert!(env.contains("env `LETTER`: \"a\" → \"m\""), "{env}");
    assert!(env.contains(&format!("since run {run}")), "{env}");

    project.edit("pipeline.yaml", "grep -v '^#'", "grep -iv '^#'");
    let command = why(&project, "strip", &[]);
    assert!(
        command.contains("command: \"grep -v '^#'") && command.contains("→ \"grep -iv '^#'"),
        "{command}"
    );
    project.edit("pipeline.yaml", "grep -iv '^#'", "grep -v '^#'");

    project.edit("words.txt", "# fruit", "# fruits");
    let input = why(&project, "strip", &[]);
    let lines: Vec<&str> = input.lines().map(str::trim).collect();
    assert!(lines[1].starts_with("input `text` changed ("), "{input}");
    assert_eq!(lines[1].matches('…').count(), 2, "{input}");
}

#[test]
fn a_param_of_a_kind_is_named_and_so_is_the_run_that_it_is_compared_with() {
    let project = Project::new();
    project.write("rows.csv", "text,label\na,x\nb,x\nc,y\nd,y\n");
    project.write(
        "pipeline.yaml",
        "name: p\nparams: { keep: 1 }\nsteps:\n  load:\n    uses: load\n    with: { name: d, train: { file: rows.csv }, test: { file: rows.csv } }\n  \
         split:\n    uses: split\n    in: { rows: load.train }\n    with:\n      labelled: ${{ params.keep }}\n",
    );
    project.run(JSON).ok();
    let failed = project.run(&["pipeline.yaml", "--set", "keep=9"]);
    assert_eq!(failed.code, Some(4), "{}", failed.stderr);
    let text = why(&project, "split", &["--set", "keep=2"]);
    assert!(
        text.contains("param `labelled`: 1 → 2"),
        "the failed run between is passed over: {text}"
    );
    let again = why(&project, "split", &["--set", "keep=9"]);
    assert!(again.contains("its last run gave no result"), "{again}");
}

#[test]
fn a_result_that_was_removed_from_the_cache_is_told_with_who_did_it() {
    let project = Project::shell();
    project.run(JSON).ok();
    let everything = ["cache", "gc", "--keep-runs", "0", "--max-size", "0"];
    project.run(&everything).ok();
    let text = why(&project, "strip", &[]);
    let by_gc = "its last result was removed from the cache by `flowrun cache gc` at 20";
    assert!(text.contains(by_gc), "{text}");
    let again = project.run(JSON).ok();
    let ended = |run: &Run, step: &str| run.ended(step)["why"].to_string();
    assert!(ended(&again, "strip").contains(by_gc), "{}", again.stdout);

    let results = project.path(".flowrun/actions");
    for file in files::below(&results) {
        std::fs::write(file, "spoilt").unwrap();
    }
    project.run(&["cache", "repair"]);
    let text = why(&project, "strip", &[]);
    assert!(
        text.contains("removed from the cache by `flowrun cache repair` at 20"),
        "{text}"
    );

    // Without a note it is still no failure of the run.
    project.run(JSON).ok();
    std::fs::remove_dir_all(project.path(".flowrun/actions")).unwrap();
    std::fs::remove_file(project.path(".flowrun/removed.jsonl")).unwrap();
    let text = why(&project, "strip", &[]);
    assert!(
        text.contains("its last result is no longer in the cache"),
        "{text}"
    );
}

#[test]
fn a_step_behind_a_stale_one_names_it_and_its_reason() {
    let project = Project::shell();
    project.run(JSON).ok();
    project.edit("words.txt", "plum", "prune");
    let text = why(&project, "note", &[]);
    assert!(text.contains("note: after `count`"), "{text}");
    assert!(text.contains("input `text` changed"), "{text}");
    let json = project
        .run(&["why", "note", "pipeline.yaml", "--json"])
        .ok()
        .stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["step"]["status"]["status"], "pending");
    assert_eq!(json["behind"][0]["step"], "strip");
    let reason = &json["behind"][0]["status"];
    assert!(reason["changes"][0].as_str().unwrap().starts_with("input"));
    assert!(reason["against"].is_string(), "{reason}");
}

#[test]
fn a_plan_shows_what_from_until_and_only_would_do() {
    let project = Project::shell();
    project.run(JSON).ok();
    let plan = |args: &[&str]| -> Vec<(String, String)> {
        let args = [&["plan", "pipeline.yaml", "--json"], args].concat();
        let plan: Value = serde_json::from_str(&project.run(&args).ok().stdout).unwrap();
        let steps = plan["steps"].as_array().unwrap().iter();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        steps
            .map(|s| (text(&s["step"]), text(&s["status"]["status"])))
            .collect()
    };
    let named = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        let list = list.iter();
        list.map(|(a, b)| ((*a).into(), (*b).into())).collect()
    };
    assert_eq!(
        plan(&["--from", "count"]),
        named(&[("strip", "fresh"), ("count", "stale"), ("note", "pending")])
    );
    assert_eq!(
        plan(&["--until", "count"]),
        named(&[("strip", "fresh"), ("count", "fresh")])
    );
    assert_eq!(
        plan(&["--only", "count"]),
        named(&[("strip", "fresh"), ("count", "stale")])
    );
    assert_eq!(plan(&["--force"])[0].1, "stale");
    let text = project
        .run(&["plan", "pipeline.yaml", "--from", "count"])
        .ok();
    assert!(
        text.stdout.contains("asked to run again"),
        "{}",
        text.stdout
    );
    assert!(
        text.stdout.contains("1 to run, 1 after them"),
        "{}",
        text.stdout
    );
    assert_eq!(project.run(&["plan", "--only", "cuont"]).code, Some(2));
}

#[test]
fn each_item_of_a_fan_out_has_its_own_reason() {
    let project = Project::new();
    let pipeline = "name: p\nparams: { unit: m }\nsteps:\n  each:\n    foreach: { n: [1, 2] }\n    run: echo \"${{ item.n }} $UNIT\" > \"$out\"\n    \
                    env: { UNIT: \"${{ params.unit }}\" }\n    out: { out: out.txt }\n";
    project.write("pipeline.yaml", pipeline);
    project.run(JSON).ok();
    project.edit("pipeline.yaml", "[1, 2]", "[1, 3]");
    let text = why(&project, "each", &[]);
    assert!(text.contains("each[1]: nothing changed"), "{text}");
    assert!(text.contains("each[3]\n    never ran"), "{text}");
    let one = why(&project, "each[1]", &["--set", "unit=km"]);
    assert!(one.contains("env `UNIT`: \"m\" → \"km\""), "{one}");
    assert!(!one.contains("each[3]"), "{one}");
}
