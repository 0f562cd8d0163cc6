//! The main job at a small size, with the real student: killed while it trains, gone on with, and
//! asked again. On banking77 where it can be had, else on the stand-in.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;

use crate::deployed::{Current, StopAtEnd, a_bundle_is_served};
use crate::project::{Project, Run};
use crate::real_data::distdir;

/// Three intents, thirty labels, two short epochs.
const SMALL: [&str; 14] = [
    "--json",
    "pipelines/banking77.yaml",
    "--set",
    "labels=3",
    "--set",
    "labelled=30",
    "--set",
    "dev=20",
    "--set",
    "val=10",
    "--set",
    "train=34",
    "--set",
    "epochs=2",
];

fn command(project: &Project, more: &[&str]) -> std::process::Command {
    surrounded(project.command(&[&SMALL, more].concat()))
}

fn surrounded(mut command: std::process::Command) -> std::process::Command {
    // The weights are large: they are fetched once for all runs of the tests.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    if let Some(dist) = distdir() {
        command.env("FLOWRUN_DISTDIR", dist);
    }
    command
}

fn run(project: &Project, more: &[&str]) -> Run {
    Run::of(command(project, more).output().unwrap()).ok()
}

/// Starts a run and kills it once `finetune` has done more than `steps` steps.
fn kill_in_training(project: &Project, steps: u64) {
    let mut child = command(project, &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let reached = lines.map_while(Result::ok).any(|line| {
        let event: Value = serde_json::from_str(&line).unwrap();
        event["event"] == "progress"
            && event["step"] == "finetune"
            && event["done"].as_u64() > Some(steps)
    });
    assert!(reached, "the run ended before step {steps} of its training");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_student_is_distilled_and_a_kill_in_training_costs_little() {
    let project = Project::new();
    let pipeline = concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/banking77.yaml");
    let text = std::fs::read_to_string(pipeline).unwrap();
    project.write("pipelines/banking77.yaml", &text);

    // 64 chats in batches of 8: the first epoch ends after step 8.
    kill_in_training(&project, 8);
    let finished = run(&project, &[]);
    assert!(finished.steps("cached").contains(&"bootstrap".to_owned()));
    let ran = finished.steps("ran");
    assert!(ran.contains(&"finetune".to_owned()), "{ran:?}");
    let events = finished.events();
    let run_dir = events.last().unwrap()["run_dir"].as_str().unwrap();
    let log = std::fs::read_to_string(project.path(run_dir).join("logs/finetune.log")).unwrap();
    assert!(log.contains("going on after step 8 of 16"), "{log}");

    let report: Value = serde_json::from_str(&project.read("results/report.json")).unwrap();
    let dataset = if distdir().is_some() {
        &["banking77"][..]
    } else {
        &["banking77", "stand-in"]
    };
    assert!(dataset.contains(&report["dataset"].as_str().unwrap()));
    assert_eq!(report["stand_in"], report["dataset"] == "stand-in");
    let test = report["test"].as_array().unwrap();
    let roles: Vec<&str> = test.iter().map(|s| s["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["best", "base", "oracle", "baseline", "baseline"]);
    for score in test.iter().chain(report["dev"].as_array().unwrap()) {
        let (n, correct) = (&score["n"], &score["correct"]);
        let share = correct.as_f64().unwrap() / n.as_f64().unwrap();
        assert!((score["accuracy"].as_f64().unwrap() - share).abs() < 1e-12);
    }
    // The base and two checkpoints, each plain and optimised.
    assert_eq!(report["dev"].as_array().unwrap().len(), 6);
    assert_eq!(report["training"].as_array().unwrap().len(), 16);
    let loss = |at: usize| report["training"][at]["loss"].as_f64().unwrap();
    assert!(loss(15) < loss(0), "{} {}", loss(15), loss(0));
    assert!(project.read("results/report.html").contains("</html>"));

    let again = run(&project, &[]);
    assert_eq!(again.steps("ran"), Vec::<String>::new());

    a_second_machine_has_it_all(&project, &text);

    let from = run(&project, &["--from", "select"]);
    let after = ["select", "test-best", "report", "deploy"];
    assert_eq!(from.steps("ran"), after);

    a_bundle_is_served(&project, surrounded(project.command(&[])));
    deploying_here(&project);
}

/// Through a folder that both can reach.
fn a_second_machine_has_it_all(here: &Project, pipeline: &str) {
    let shared = tempfile::tempdir().unwrap();
    let remote = shared.path().display().to_string();
    here.run(&["cache", "push", "--remote", &remote]).ok();
    let there = Project::new();
    there.write("pipelines/banking77.yaml", pipeline);
    let got = run(&there, &["--remote", &remote]);
    assert_eq!(got.steps("ran"), Vec::<String>::new());
    for file in ["results/report.json", "results/report.html"] {
        assert_eq!(there.read(file), here.read(file));
    }
}

/// The target `local`: served until stopped, served again when gone, and never replaced by
/// something that does not answer as evaluated.
fn deploying_here(project: &Project) {
    let local = ["--set", "target=local"];
    assert_eq!(run(project, &local).steps("ran"), ["deploy"]);
    let _end = StopAtEnd(project);
    let first = Current::read(project);
    assert!(first.is_up());
    run(project, &local);
    assert_eq!(Current::read(project).pid, first.pid, "it was left alone");
    assert_eq!(run(project, &local).steps("ran"), Vec::<String>::new());
    first.stop();
    assert_eq!(run(project, &local).steps("ran"), ["deploy"]);
    let second = Current::read(project);
    assert!(second.is_up() && second.pid != first.pid);

    // The base model's scores are not the chosen one's.
    let pipeline = "pipelines/banking77.yaml";
    project.edit(
        pipeline,
        "scores: test-best.scores",
        "scores: test-base.scores",
    );
    let refused = Run::of(command(project, &local).output().unwrap());
    assert_eq!(refused.code, Some(5), "{}", refused.stderr);
    assert!(
        refused
            .stdout
            .contains("smoke rows are answered as evaluated")
    );
    assert_eq!(Current::read(project).pid, second.pid);
    assert!(second.is_up());
}
