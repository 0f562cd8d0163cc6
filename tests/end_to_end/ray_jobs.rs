//! `runner: ray`: steps as jobs of a real Ray of this machine, whose processes are killed.
//! `FLOWRUN_RAY_PYTHON` names a Python with `ray[default]`; else `python3` is tried.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::project::{Project, Run};
use crate::ray::{Ray, python};
use crate::server::{client, free_port};
use crate::slow_job::{Slow, lives, signal, until};
use crate::tiny;

fn ray() -> Option<Ray> {
    let Some(python) = python() else {
        println!("skipped: no Python with `ray[default]`; name one in FLOWRUN_RAY_PYTHON");
        return None;
    };
    Some(Ray::start(&python))
}

fn runners(ray: &Ray) -> String {
    format!(
        "runners:\n  ray: {{ address: '{}', jobs: 4 }}\n",
        ray.dashboard
    )
}

/// Ids and states of the jobs that Ray knows.
fn jobs(ray: &Ray) -> Vec<(String, String)> {
    let url = format!("{}/api/jobs/", ray.dashboard);
    let jobs: Vec<Value> = client().get(url).send().unwrap().json().unwrap();
    let text = |job: &Value, name: &str| job[name].as_str().unwrap_or_default().to_owned();
    jobs.iter()
        .map(|job| (text(job, "submission_id"), text(job, "status")))
        .collect()
}

/// The tiny main job with its heavy steps as jobs: the same results as in this process, and the
/// same keys. Nothing is left of the jobs.
#[test]
fn the_heavy_steps_of_the_tiny_job_run_on_ray_with_the_same_results() {
    let Some(ray) = ray() else { return };
    let project = tiny::project();
    let here = project.run(&["pipeline.yaml", "--json"]).ok();
    let outputs = |run: &Run| -> Vec<(Value, Value, Value)> {
        let events = run.events();
        let ended = events.iter().filter(|e| e["event"] == "step_finished");
        let steps = ended.filter(|e| e["step"] == "chats" || e["step"] == "score");
        let part = |e: &Value, part: &str| e["outputs"][part]["digest"].clone();
        steps
            .map(|e| (e["key"].clone(), part(e, "messages"), part(e, "program")))
            .collect()
    };
    for step in ["convert-to-messages", "evaluate"] {
        let uses = format!("uses: {step}\n");
        project.edit("pipeline.yaml", &uses, &format!("{uses}    runner: ray\n"));
    }
    let text = format!("{}{}", runners(&ray), project.read("pipeline.yaml"));
    project.write("pipeline.yaml", &text);
    let cached = project.run(&["pipeline.yaml", "--json"]).ok();
    assert!(cached.steps("ran").is_empty(), "the runner is in no key");
    let there = project
        .run(&["pipeline.yaml", "--json", "--from", "chats"])
        .ok();
    assert_eq!(there.steps("ran"), ["chats", "score", "deploy"]);
    assert_eq!(outputs(&there), outputs(&here));
    let progress = there.events();
    let scored = |e: &&Value| e["event"] == "progress" && e["step"] == "score" && e["total"] != 0;
    assert!(progress.iter().any(|e| scored(&e)), "{}", there.stdout);
    until("jobs are left", || jobs(&ray).is_empty());
}

#[test]
fn a_command_is_a_job_too_and_its_secret_is_shown_nowhere() {
    let Some(ray) = ray() else { return };
    let project = Project::new();
    let step = "steps:\n  s:\n    run: 'echo \"it is $TOKEN\"; printf %s \"$TOKEN\" | wc -c > \"$out\"; [ -z \"${OTHER-}\" ]'\n    runner: ray\n    secrets: [TOKEN]\n    out: { out: deep/n }\n    publish: { out: n }\n";
    project.write("p.yaml", &format!("{}{step}", runners(&ray)));
    let run = |args: &[&str]| {
        let mut command = project.command(args);
        let command = command.env("TOKEN", "very-secret-value").env("OTHER", "x");
        Run::of(command.output().unwrap())
    };
    run(&["p.yaml"]).ok();
    assert_eq!(project.read("n").trim(), "17");
    let log = project.run(&["show", "s"]).ok().stdout;
    assert!(log.contains("it is ***"), "{log}");

    // One that fails is not tried again, and says why.
    project.edit("p.yaml", "[ -z \"${OTHER-}\" ]", "echo why >&2; exit 3");
    let failed = run(&["p.yaml"]);
    assert_eq!(failed.code, Some(4));
    assert!(
        failed.stderr.contains("exit status: 3"),
        "{}",
        failed.stderr
    );
    assert!(failed.stderr.contains("why"), "{}", failed.stderr);

    // Workers that lack the program, or do not see the folder.
    for setting in [
        "program: /nowhere/flowrun",
        "shared: { .flowrun: /nowhere }",
    ] {
        project.edit("p.yaml", "jobs: 4", setting);
        let lost = run(&["p.yaml"]);
        assert_eq!(lost.code, Some(4));
        for words in ["/nowhere", "see the cache folder"] {
            assert!(lost.stderr.contains(words), "{}", lost.stderr);
        }
        project.edit("p.yaml", setting, "jobs: 4");
    }

    // What no node has is told at once.
    project.edit(
        "p.yaml",
        "    runner: ray\n",
        "    runner: ray\n    resources: { cpu: 64, custom: { plough: 2 } }\n",
    );
    let refused = run(&["p.yaml"]);
    assert_eq!(refused.code, Some(4));
    for words in ["64 CPU", "the most that one has is 4", "2 plough"] {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    until("jobs are left", || {
        let jobs = jobs(&ray);
        jobs.iter()
            .all(|(_, status)| status == "PENDING" || status == "STOPPED")
    });
    let said = secret_in(ray.folder());
    assert!(said.is_empty(), "{said:?}");
}

/// Files of Ray's that hold the secret.
fn secret_in(folder: &Path) -> Vec<String> {
    let grep = Command::new("grep")
        .args(["-rlF", "--devices=skip", "very-secret-value"])
        .arg(folder)
        .output()
        .unwrap();
    let files = String::from_utf8(grep.stdout).unwrap();
    files.lines().map(str::to_owned).collect()
}

#[test]
fn the_program_may_be_brought_to_the_workers() {
    let Some(ray) = ray() else { return };
    let project = Project::new();
    let step = "steps:\n  s:\n    run: readlink /proc/$PPID/exe > \"$out\"\n    runner: ray\n    out: { out: exe }\n    publish: { out: exe }\n";
    project.write("p.yaml", &format!("{}{step}", runners(&ray)));
    project.edit("p.yaml", "jobs: 4", "upload: true");
    project.run(&["p.yaml"]).ok();
    let exe = project.read("exe");
    assert!(Path::new(exe.trim()).starts_with(ray.folder()), "{exe}");
}

#[test]
fn a_worker_that_is_killed_is_followed_by_another() {
    let Some(ray) = ray() else { return };
    let slow = Slow::new("ray", &runners(&ray));
    let child = slow.start();
    let first = slow.worker();
    signal("-KILL", first);
    let second = slow.worker();
    assert_ne!(first, second);
    slow.go();
    let run = slow.ended_well(child);
    assert_eq!(slow.begun(), 2);
    assert!(run.stdout.contains("it is begun again"), "{}", run.stdout);
    until("jobs are left", || jobs(&ray).is_empty());
}

#[test]
fn the_job_of_a_killed_run_is_taken_up_by_the_next() {
    let Some(ray) = ray() else { return };
    let slow = Slow::new("ray", &runners(&ray));
    let mut child = slow.start();
    let worker = slow.worker();
    signal("-KILL", child.id());
    child.wait().unwrap();
    let next = slow.start();
    until("the next run did not find it", || {
        slow.has_said("of an earlier run")
    });
    assert!(lives(worker), "the job works on");
    slow.go();
    slow.ended_well(next);
    assert_eq!(slow.begun(), 1, "it was not begun again");
    until("jobs are left", || jobs(&ray).is_empty());
}

#[test]
fn an_interrupted_run_stops_its_job() {
    let Some(ray) = ray() else { return };
    let slow = Slow::new("ray", &runners(&ray));
    let child = slow.start();
    let worker = slow.worker();
    signal("-INT", child.id());
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    until("the job works on", || !lives(worker));
    assert!(slow.left().is_empty(), "{:?}", slow.left());
    until("jobs are left", || jobs(&ray).is_empty());
}

/// The node that works is lost as a whole; another one comes.
#[test]
fn a_node_that_dies_is_replaced_by_another() {
    let Some(mut ray) = ray() else { return };
    ray.add_node("first");
    let slow = on_a_node(&ray);
    let child = slow.start();
    let first = slow.worker();
    signal("-KILL", raylet(ray.folder(), "first"));
    ray.add_node("second");
    let second = slow.worker();
    assert_ne!(first, second);
    slow.go();
    let run = slow.ended_well(child);
    assert_eq!(slow.begun(), 2);
    assert!(run.stdout.contains("it is begun again"), "{}", run.stdout);
    until("the lost work goes on", || !lives(first));
}

/// A step that only an added node can do.
fn on_a_node(ray: &Ray) -> Slow {
    let settings = runners(ray).replace("jobs: 4", "jobs: 4, autoscales: true");
    let slow = Slow::new("ray", &settings);
    let runner = "    runner: ray\n";
    let needs = format!("{runner}    resources: {{ cpu: 0.1, custom: {{ plough: 1 }} }}\n");
    slow.project.edit("p.yaml", runner, &needs);
    slow
}

/// The head's own process is killed: what works on another node works on, and its result comes.
/// (`ray start --block` ends what works on the head's node.) What is ordered afterwards says what
/// is away.
#[test]
fn a_head_that_dies_does_not_take_the_work_along() {
    let Some(mut ray) = ray() else { return };
    ray.add_node("other");
    let slow = on_a_node(&ray);
    let child = slow.start();
    slow.worker();
    signal("-KILL", head(ray.folder()));
    let version = format!("{}/api/version", ray.dashboard);
    until("the head lives on", || {
        client().get(&version).send().is_err()
    });
    slow.go();
    slow.ended_well(child);
    assert_eq!(slow.begun(), 1);
    slow.project.edit("p.yaml", "echo end", "echo END");
    let away = slow.project.run(&["p.yaml"]);
    assert_eq!(away.code, Some(4), "{}", away.stderr);
    assert!(away.stderr.contains(&ray.dashboard), "{}", away.stderr);
}

/// The process of the cluster's own state.
fn head(folder: &Path) -> u32 {
    process(folder, &["gcs_server"])
}

/// The process of a node that was added.
fn raylet(folder: &Path, label: &str) -> u32 {
    process(folder, &["raylet/raylet", label])
}

/// A process of this Ray whose command line has these words.
fn process(folder: &Path, words: &[&str]) -> u32 {
    let folder = folder.display().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let is_meant = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&folder) && words.iter().all(|word| line.contains(word))
    };
    pids.find(is_meant).unwrap()
}

#[test]
fn a_ray_that_is_not_there_is_named() {
    let project = Project::new();
    let address = format!("http://127.0.0.1:{}", free_port());
    let text = format!(
        "runners:\n  ray: {{ address: '{address}' }}\nsteps:\n  s: {{ run: 'true', runner: ray }}\n"
    );
    project.write("p.yaml", &text);
    let refused = project.run(&["p.yaml"]);
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    assert!(refused.stderr.contains(&address), "{}", refused.stderr);
    let text = "steps:\n  s: { run: 'true', runner: ray }\n";
    project.write("p.yaml", text);
    let wrong = project.run(&["check", "p.yaml"]);
    assert_eq!(wrong.code, Some(3), "{}", wrong.stderr);
    assert!(
        wrong.stderr.contains("runners: { ray: { address:"),
        "{}",
        wrong.stderr
    );
}
