//! The example `shards`: many workers label and score rows, in processes and as jobs of Ray.

use serde_json::Value;

use crate::oracle::{Oracle, query};
use crate::project::{Project, Run};
use crate::ray_cluster::Ray;

/// All rows scored at once, to compare with.
const WHOLE: &str = "  whole:
    uses: evaluate
    in: { rows: labels.test, program: program.program }
    with: { model: oracle }
";

fn output(run: &Run, step: &str, port: &str) -> Value {
    run.ended(step)["outputs"][port]["digest"].clone()
}

fn sharded(args: &[&str]) {
    let oracle = Oracle::start(|body| {
        let pin = query(body).contains("PIN");
        Some(if pin { "change_pin" } else { "card_arrival" }.to_owned())
    });
    let project = Project::new();
    project.copy_example("shards", "");
    let text = project.read("pipeline.yaml");
    project.write("pipeline.yaml", &format!("{text}{WHOLE}"));
    let url = format!("base_url={}", oracle.url);
    let run = || {
        let command = ["pipeline.yaml", "--json", "--set", &url];
        project.run(&[&command, args].concat()).ok()
    };
    let first = run();
    let mut ran = first.steps("ran");
    ran.retain(|step| step.ends_with(']'));
    ran.sort();
    let items = [
        "label[000000]",
        "label[000001]",
        "score-shard[000000]",
        "score-shard[000001]",
    ];
    assert_eq!(ran, items);
    let merged = output(&first, "score", "scores");
    assert_eq!(
        merged,
        output(&first, "whole", "scores"),
        "as if scored at once"
    );
    let labelled = project.read("results/labelled.jsonl");
    assert_eq!(labelled.lines().count(), 6);

    // Rows that come to it are a shard of their own: nothing else is asked again.
    let rows = project.read("queries.csv");
    project.write(
        "queries.csv",
        &format!("{rows}A new PIN please,change_pin\n"),
    );
    let second = run();
    let mut ran = second.steps("ran");
    ran.retain(|step| step.ends_with(']'));
    ran.sort();
    assert_eq!(ran, ["label[000002]", "score-shard[000002]"]);
    let more = project.read("results/labelled.jsonl");
    assert!(
        more.starts_with(&labelled) && more.lines().count() == 7,
        "{more}"
    );
}

#[test]
fn shards_are_cached_one_by_one_and_join_to_the_same_result() {
    sharded(&[]);
}

#[test]
fn shards_are_jobs_of_ray() {
    let Some(ray) = Ray::at_hand() else { return };
    let address = format!("ray={}", ray.dashboard);
    sharded(&["--set", "runner=ray", "--set", &address]);
}
