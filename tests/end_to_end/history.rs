//! What runs left: lists, differences, lineage, reports.

use serde_json::Value;

use crate::project::{Project, Run};

const JSON: &[&str] = &["pipeline.yaml", "--json"];

fn id(run: &Run) -> String {
    run.events()[0]["run"].as_str().unwrap().to_owned()
}

fn json(project: &Project, args: &[&str]) -> Value {
    let args = [args, &["--json"]].concat();
    serde_json::from_str(&project.run(&args).ok().stdout).unwrap()
}

#[test]
fn a_run_is_named_by_either_end_of_its_id_or_by_its_place() {
    let project = Project::shell();
    let first = id(&project.run(JSON).ok());
    let second = id(&project.run(&["--json", "--set", "letter=l"]).ok());
    let shown = |name: &str| json(&project, &["show", name])["run"].clone();
    assert_eq!(shown(&first), first);
    assert_eq!(shown("last"), second);
    assert_eq!(shown("last~1"), first);
    assert_eq!(shown(first.rsplit('-').next().unwrap()), first);
    let many = project.run(&["show", &first[..8]]);
    assert_eq!(many.code, Some(2), "both began on the same day");
    assert!(many.stderr.contains(&second), "{}", many.stderr);
    let none = project.run(&["show", "zzzz"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains(&first), "{}", none.stderr);

    let runs = project.run(&["runs", "--json"]).ok();
    let ids: Vec<Value> = runs.events().iter().map(|r| r["run"].clone()).collect();
    assert_eq!(ids, [second.as_str(), first.as_str()]);
    assert_eq!(
        project
            .run(&["runs", "-n", "1"])
            .ok()
            .stdout
            .lines()
            .count(),
        2
    );
    let step = json(&project, &["show", "last", "note"]);
    assert_eq!(step["outputs"]["note"]["type"], "file");
    let alone = project.run(&["show", "note"]).ok().stdout;
    assert!(alone.contains("output note: file"), "{alone}");
}

#[test]
fn what_is_no_record_of_a_run_does_not_hide_those_that_are() {
    let project = Project::shell();
    let first = id(&project.run(JSON).ok());
    let second = id(&project.run(JSON).ok());
    // A full disk or a kill left a folder; and something else lies there.
    project.write(".flowrun/runs/99990101-000000-aaaa/plan.json", "{\"vers");
    project.write(".flowrun/runs/99990101-000000-bbbb/events.jsonl", "");
    project.write(".flowrun/runs/notes.txt", "mine\n");
    let shown = |name: &str| json(&project, &["show", name])["run"].clone();
    assert_eq!(shown("last"), second);
    assert_eq!(shown("last~1"), first);
    project.run(&["show"]).ok();
    project.run(&["diff"]).ok();
    let listed = project.run(&["runs"]).ok().stdout;
    assert!(!listed.contains("older ones"), "{listed}");
    let third = project.run(JSON).ok();
    assert_eq!(third.steps("cached"), ["strip", "count", "note"]);
}

#[test]
fn a_difference_names_params_causes_outputs_and_what_is_alike() {
    let project = Project::shell();
    project.run(JSON).ok();
    project.run(&["--json", "--set", "letter=n"]).ok();
    let diff = json(&project, &["diff"]);
    assert_eq!(diff["params"]["letter"]["old"], "a");
    assert_eq!(diff["params"]["letter"]["new"], "n");
    let steps: Vec<&str> = diff["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["step"].as_str().unwrap())
        .collect();
    assert_eq!(steps, ["count", "note"], "one `n` instead of two `a`");
    assert_eq!(diff["same"], 1);
    let key = &diff["steps"][0]["key"];
    assert!(key["old"].is_string() && key["old"] != key["new"], "{key}");
    let text = project.run(&["diff", "last~1", "last"]).ok().stdout;
    for part in [
        "param `letter`: \"a\" → \"n\"",
        "env `LETTER`: \"a\" → \"n\"",
        "output number: ",
        "input `number` changed",
        "1 step alike",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let same = project.run(&["diff", "last", "last"]).ok().stdout;
    assert!(same.contains("no difference: 3 steps alike"), "{same}");
}

#[test]
fn a_difference_shows_metrics_and_steps_that_only_one_run_has() {
    let project = Project::new();
    project.write("rows.csv", "text,label\na,x\nb,x\nc,y\nd,y\n");
    let load = "name: p\nparams: { n: 2 }\nsteps:\n  load:\n    uses: load\n    with: { name: d, train: { file: rows.csv }, test: { file: rows.csv } }\n  \
                top:\n    uses: filter-top-n\n    in: { train: load.train, test: load.test }\n    with:\n      n: ${{ params.n }}\n";
    let more = "  more:\n    run: cp \"$x\" \"$y\"\n    in: { x: top.labels }\n    out: { y: y }\n";
    project.write("pipeline.yaml", &format!("{load}{more}"));
    project.run(JSON).ok();
    project.write("pipeline.yaml", load);
    project.run(&["--json", "--set", "n=1"]).ok();
    let lineage = project.run(&["lineage", "top.labels"]).ok().stdout;
    assert!(
        lineage.contains("train ← rows.csv (source)"),
        "a file that a param names is a source: {lineage}"
    );
    let text = project.run(&["diff"]).ok().stdout;
    for part in [
        "param `n`: 2 → 1",
        "metric labels: 2 → 1 (-1)",
        "- more: only in the old run",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn lineage_goes_up_to_the_sources() {
    let project = Project::shell();
    let made = id(&project.run(JSON).ok());
    // What made it is this run, also when a later one took it from the cache.
    project.run(JSON).ok();
    for artifact in ["results/note.txt", "note.note"] {
        let found = json(&project, &["lineage", artifact]);
        assert_eq!(found["artifact"]["step"], "note", "{artifact}");
        let steps = found["steps"].as_array().unwrap();
        let names: Vec<&str> = steps.iter().map(|s| s["step"].as_str().unwrap()).collect();
        assert_eq!(names, ["note", "count", "strip"]);
        assert!(steps.iter().all(|s| s["made_in"] == made.as_str()));
        assert_eq!(steps[2]["inputs"][0]["from"]["file"], "words.txt");
        assert_eq!(steps[1]["inputs"][0]["from"]["step"]["step"], "strip");
    }
    let digest = json(&project, &["lineage", "count.number"])["artifact"]["digest"].clone();
    let text = project
        .run(&["lineage", &digest.as_str().unwrap()[..10]])
        .ok()
        .stdout;
    assert!(text.contains("words.txt (source)"), "{text}");
    assert!(text.contains("command grep -c"), "{text}");
    let unknown = project.run(&["lineage", "note.nope"]);
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("note.note"), "{}", unknown.stderr);
    project.write("other.txt", "made by hand\n");
    let by_hand = project.run(&["lineage", "other.txt"]);
    assert!(by_hand.stderr.contains("no run made"), "{}", by_hand.stderr);
}

#[test]
fn each_file_of_a_port_is_named_as_the_source_it_is() {
    let project = Project::new();
    for name in ["a.txt", "b.txt"] {
        project.write(name, name);
    }
    project.write(
        "pipeline.yaml",
        "name: several\nsteps:\n  make:\n    run: echo made > \"$out\"\n    out: { out: out.txt }\n  \
         all:\n    run: cat \"$parts\"/* > \"$out\"\n    in: { parts: [{ file: b.txt }, make.out, { file: a.txt }] }\n    out: { out: out.txt }\n",
    );
    project.run(JSON).ok();
    let found = json(&project, &["lineage", "all.out"]);
    let inputs = found["steps"][0]["inputs"].as_array().unwrap();
    let from: Vec<&Value> = inputs.iter().map(|input| &input["from"]).collect();
    assert_eq!(from[0]["file"], "b.txt");
    assert_eq!(from[1]["step"]["step"], "make");
    assert_eq!(from[2]["file"], "a.txt");
}

#[test]
fn lineage_passes_through_the_items_of_a_fan_out() {
    let project = Project::new();
    project.write("seed.txt", "s\n");
    project.write(
        "pipeline.yaml",
        "name: fan\nsteps:\n  make:\n    foreach: { n: [1, 2] }\n    run: cat \"$seed\" > \"$out\"; echo ${{ item.n }} >> \"$out\"\n    \
         in: { seed: { file: seed.txt } }\n    out: { out: out.txt }\n  \
         grow:\n    foreach: { part: make.out }\n    run: cat \"$part\" \"$part\" > \"$out\"\n    in: { part: \"${{ item.part }}\" }\n    out: { out: out.txt }\n  \
         all:\n    run: cat \"$parts\"/* > \"$all\"\n    in: { parts: grow.out }\n    out: { all: all.txt }\n",
    );
    project.run(JSON).ok();
    let found = json(&project, &["lineage", "all.all"]);
    let steps = found["steps"].as_array().unwrap();
    let names: Vec<&str> = steps.iter().map(|s| s["step"].as_str().unwrap()).collect();
    assert_eq!(names, ["all", "grow[1]", "grow[2]", "make[1]", "make[2]"]);
    assert_eq!(steps[3]["inputs"][0]["from"]["file"], "seed.txt");
}

#[test]
fn a_report_is_opened_by_its_path() {
    let project = Project::shell();
    let none = project.run(&["open"]);
    assert_eq!(none.code, Some(2), "no run yet");
    let run = project.run(JSON).ok();
    let none = project.run(&["open"]);
    assert!(
        none.stderr.contains("no run has a report"),
        "{}",
        none.stderr
    );
    // As a step of kind `report` leaves it.
    let dir = run.events().last().unwrap()["run_dir"].clone();
    project.write(&format!("{}/report.html", dir.as_str().unwrap()), "<html>");
    let path = project.run(&["open"]).ok().stdout;
    assert!(path.trim_end().ends_with("report.html"), "{path}");
    assert!(std::path::Path::new(path.trim_end()).is_file());
    assert_eq!(
        project.run(&["open", "last", "--json"]).ok().events().len(),
        1
    );
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let project = Project::shell();
    project.run(JSON).ok();
    let binary = env!("CARGO_BIN_EXE_flowrun");
    let status = std::process::Command::new("bash")
        .args([
            "-c",
            &format!("set -o pipefail; '{binary}' schema | head -1 >/dev/null"),
        ])
        .current_dir(project.path(""))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&status.stderr);
    assert!(status.status.success() && stderr.is_empty(), "{stderr}");
}
