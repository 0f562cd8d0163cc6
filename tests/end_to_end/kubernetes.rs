//! `runner: kubernetes`: steps as Jobs, through a real `kubectl` (`FLOWRUN_KUBECTL` names it), of
//! an API server that the tests bring along and whose pods are processes. No cluster is asked.

use std::process::Child;

use serde_json::{Value, json};

use crate::external::named;
use crate::kubernetes_api::{Api, ended};
use crate::processes::{lives, until};
use crate::project::{Project, Run};
use crate::slow_job::{Slow, notes};
use crate::{heavy_steps, tiny};

/// A cluster and what asks it.
struct Kubernetes {
    api: Api,
    kubectl: String,
}

impl Kubernetes {
    fn start() -> Option<Self> {
        let kubectl = named("FLOWRUN_KUBECTL", "`kubectl`")?;
        Some(Self {
            api: Api::start(),
            kubectl: kubectl.display().to_string(),
        })
    }

    fn runners(&self, more: &str) -> String {
        self.api.runners(&self.kubectl, more)
    }

    fn run(&self, project: &Project, args: &[&str]) -> Run {
        let mut command = project.command(args);
        let command = command
            .env("KUBECONFIG", self.api.kubeconfig())
            .env("TOKEN", "very-secret-value")
            .env("OTHER", "x");
        Run::of(command.output().unwrap())
    }

    fn slow(&self) -> Slow {
        Slow::new("kubernetes", &self.runners(""))
    }

    fn start_run(&self, slow: &Slow) -> Child {
        slow.start_with(&[("KUBECONFIG", &self.api.kubeconfig())])
    }

    /// A project with one command.
    fn command(&self, run: &str, more: &str) -> Project {
        let project = Project::new();
        let step = format!(
            "steps:\n  s:\n    run: '{run}'\n    runner: kubernetes\n    secrets: [TOKEN]\n    out: {{ out: n }}\n    publish: {{ out: n }}\n"
        );
        project.write("p.yaml", &format!("{}{step}", self.runners(more)));
        project
    }

    /// That a step whose pod says this fails with these words, and that its Job is deleted.
    fn fails(&self, status: Value, more: &str, words: &str) {
        self.api.fate(status);
        let project = self.command("echo x > \"$out\"", more);
        let failed = self.run(&project, &["p.yaml"]);
        assert_eq!(failed.code, Some(4), "{}", failed.stderr);
        assert!(failed.stderr.contains(words), "{words}: {}", failed.stderr);
        until("jobs are left", || self.api.jobs().is_empty());
    }
}

/// The tiny main job with its heavy steps as Jobs: the same results as in this process, and the
/// same keys. Nothing is left of the Jobs.
#[test]
fn the_heavy_steps_of_the_tiny_job_run_as_jobs_with_the_same_results() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let project = tiny::project();
    let here = project.run(&["pipeline.yaml", "--json"]).ok();
    let settings = "    runner: kubernetes\n    timeout: 1h\n";
    heavy_steps::move_to(&project, &kubernetes.runners(""), settings);
    let there = heavy_steps::are_the_same_elsewhere(&here, |args| kubernetes.run(&project, args));
    let orders = kubernetes.api.orders();
    let steps = orders
        .iter()
        .map(|job| job["metadata"]["labels"]["flowrun/step"].as_str());
    assert_eq!(Vec::from_iter(steps), [Some("chats"), Some("score")]);
    let run = there.events()[0]["run"].clone();
    assert_eq!(orders[0]["metadata"]["labels"]["flowrun/run"], run);
    assert_eq!(orders[0]["spec"]["activeDeadlineSeconds"], 3660);
    until("jobs are left", || kubernetes.api.jobs().is_empty());
}

#[test]
fn a_command_is_a_job_too_and_the_api_server_never_has_its_secret() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let command =
        "echo \"it is $TOKEN\"; printf %s \"$TOKEN\" | wc -c > \"$out\"; [ -z \"${OTHER-}\" ]";
    let project = kubernetes.command(command, "");
    kubernetes.run(&project, &["p.yaml"]).ok();
    assert_eq!(project.read("n").trim(), "17");
    let log = project.run(&["show", "s"]).ok().stdout;
    assert!(log.contains("it is ***"), "{log}");

    // One that fails is not tried again, and says why.
    project.edit("p.yaml", "[ -z \"${OTHER-}\" ]", "echo why >&2; exit 3");
    let failed = kubernetes.run(&project, &["p.yaml"]);
    assert_eq!(failed.code, Some(4));
    for words in ["exit status: 3", "why"] {
        assert!(failed.stderr.contains(words), "{}", failed.stderr);
    }
    let orders = kubernetes.api.orders();
    assert_eq!(orders.len(), 2);
    let all = Value::Array(orders).to_string();
    assert!(!all.contains("very-secret-value"), "{all}");

    // Pods that do not see the cache folder.
    project.edit("p.yaml", "jobs: 4", "shared: { .flowrun: /nowhere }");
    let unseen = kubernetes.run(&project, &["p.yaml"]);
    assert_eq!(unseen.code, Some(4));
    assert!(unseen.stderr.contains("`volumes`"), "{}", unseen.stderr);
    assert_eq!(kubernetes.api.orders().len(), 2, "nothing was ordered");
}

/// Of this machine the pods need no more than the store, and that only where it is a folder.
#[test]
fn a_pod_that_sees_no_folder_gets_its_files_through_the_remote_store() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let project = Project::new();
    project.write("text.txt", "text\n");
    let step = "steps:\n  s:\n    run: 'echo said; cat \"$text\" > \"$out\"'\n    runner: kubernetes\n    in: { text: { file: text.txt } }\n    out: { out: n }\n    publish: { out: n }\n";
    let runners = kubernetes.runners("    through: remote\n");
    let volumes = runners
        .lines()
        .find(|line| line.trim().starts_with("volumes:"));
    let store = project.path("store");
    let seen = format!(
        "    volumes: {{ '{}': {{ persistentVolumeClaim: {{ claimName: store }} }} }}",
        store.display()
    );
    let runners = runners.replace(volumes.unwrap(), &seen);
    project.write("p.yaml", &format!("{runners}{step}"));
    let mut command = project.command(&["p.yaml"]);
    command
        .env("KUBECONFIG", kubernetes.api.kubeconfig())
        .env("FLOWRUN_REMOTE", &store);
    Run::of(command.output().unwrap()).ok();
    assert_eq!(project.read("n"), "text\n");
    let log = project.run(&["show", "s"]).ok().stdout;
    assert!(log.contains("said"), "{log}");
    let order = kubernetes.api.orders()[0].to_string();
    assert!(order.contains("--through"), "{order}");
    until("notes are left", || notes(&project) == 0);
    until("jobs are left", || kubernetes.api.jobs().is_empty());
}

/// The work ends while the store, through which its result goes, is away for longer than `patience`.
#[test]
fn a_result_outlasts_a_store_that_is_away() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let more = "    through: remote\n    patience: 2\n";
    let slow = Slow::new("kubernetes", &kubernetes.runners(more));
    let path = |name: &str| slow.project.path(name);
    std::fs::create_dir(path("store")).unwrap();
    std::fs::create_dir(path("notes")).unwrap();
    slow.project.write("file", "");
    // Where a file takes the place of a folder, nothing can be read or written.
    let notes_lie_in = |target: &str| {
        std::os::unix::fs::symlink(path(target), path("new")).unwrap();
        std::fs::rename(path("new"), path("store/jobs")).unwrap();
    };
    notes_lie_in("notes");
    let (config, store) = (kubernetes.api.kubeconfig(), path("store"));
    let store = store.display().to_string();
    let child = slow.start_with(&[("KUBECONFIG", &config), ("FLOWRUN_REMOTE", &store)]);
    slow.worker();
    notes_lie_in("file");
    slow.go();
    until("it was not followed", || {
        slow.has_said("the job is followed")
    });
    notes_lie_in("notes");
    let run = slow.ended_well(child);
    assert_eq!(slow.begun(), 1, "{}", run.stdout);
    until("jobs are left", || kubernetes.api.jobs().is_empty());
}

#[test]
fn a_worker_that_is_killed_is_followed_by_another() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let slow = kubernetes.slow();
    slow.outlives_its_worker(kubernetes.start_run(&slow));
    until("jobs are left", || kubernetes.api.jobs().is_empty());
}

#[test]
fn the_job_of_a_killed_run_is_taken_up_by_the_next() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let slow = kubernetes.slow();
    slow.outlives_its_run(
        || kubernetes.start_run(&slow),
        || {
            // An API server that cannot answer for a while ends nothing.
            kubernetes.api.be_away(true);
            until("it was not missed", || slow.has_said("unable to handle"));
            kubernetes.api.be_away(false);
        },
    );
    assert_eq!(kubernetes.api.orders().len(), 1);
    until("jobs are left", || kubernetes.api.jobs().is_empty());
}

#[test]
fn an_interrupted_run_deletes_its_job() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let slow = kubernetes.slow();
    slow.is_stopped_with_its_run(kubernetes.start_run(&slow));
    assert!(slow.left().is_empty(), "{:?}", slow.left());
    until("jobs are left", || kubernetes.api.jobs().is_empty());
    assert_eq!(kubernetes.api.deleted().len(), 1);
}

/// The pod that comes in its place finds the work taken, and ends well.
#[test]
fn a_pod_that_somebody_deletes_is_followed_by_another_job() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let slow = kubernetes.slow();
    let child = kubernetes.start_run(&slow);
    let first = slow.worker();
    kubernetes.api.replace_pods();
    assert_ne!(slow.worker(), first);
    slow.go();
    let run = slow.ended_well(child);
    assert_eq!(slow.begun(), 2);
    assert!(run.stdout.contains("without a result"), "{}", run.stdout);
    assert_eq!(kubernetes.api.orders().len(), 2);
    until("jobs are left", || kubernetes.api.jobs().is_empty());
}

/// Not begun again: whoever deleted it meant it.
#[test]
fn a_job_that_somebody_deletes_failed() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let slow = kubernetes.slow();
    let child = kubernetes.start_run(&slow);
    let worker = slow.worker();
    kubernetes.api.delete_all();
    until("the job works on", || !lives(worker));
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("was stopped by somebody")
            || ended.stdout.contains("was stopped by somebody"),
        "{}\n{}",
        ended.stdout,
        ended.stderr
    );
    assert_eq!(slow.begun(), 1, "it was not begun again");
}

#[test]
fn what_is_taken_away_is_begun_again_and_what_fails_is_not() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let evicted = json!({
        "phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory.",
    });
    let drained = json!({"phase": "Running", "conditions": [{
        "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
        "message": "Eviction API: evicting",
    }]});
    kubernetes.api.fate(evicted);
    kubernetes.api.fate(drained);
    let project = kubernetes.command("echo x > \"$out\"", "");
    let run = kubernetes.run(&project, &["p.yaml", "--json"]).ok();
    for words in ["low on resource", "EvictionByEvictionAPI"] {
        assert!(run.stdout.contains(words), "{}", run.stdout);
    }
    assert_eq!(kubernetes.api.orders().len(), 3);
    assert_eq!(project.read("n"), "x\n");

    kubernetes.fails(
        ended(137, "OOMKilled"),
        "",
        "give more in `resources.memory`",
    );
    kubernetes.fails(ended(128, "StartError"), "", "cannot be started");
    kubernetes.fails(ended(5, "Error"), "", "exit code 5");
    assert_eq!(kubernetes.api.orders().len(), 6, "each was ordered once");
}

#[test]
fn what_cannot_start_says_why_and_does_not_wait_for_ever() {
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    let no_image = json!({"phase": "Pending", "containerStatuses": [{
        "name": "flowrun", "state": {"waiting": {
            "reason": "ErrImagePull", "message": "registry.example/flowrun:1: not found",
        }},
    }]});
    kubernetes.fails(
        no_image,
        "",
        "ErrImagePull: registry.example/flowrun:1: not found",
    );
    let no_place = json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient cpu.",
    }]});
    let soon = "    queue_timeout: 1\n";
    kubernetes.fails(
        no_place,
        soon,
        "(`queue_timeout`): Unschedulable: 0/3 nodes",
    );
    // What only an event tells.
    let volume = "MountVolume.SetUp failed for volume \"volume-0\"";
    kubernetes.api.event("FailedMount", volume);
    let mounts = json!({"phase": "Pending", "containerStatuses": [{
        "name": "flowrun", "state": {"waiting": {"reason": "ContainerCreating"}},
    }]});
    let later = "    queue_timeout: 7\n";
    kubernetes.fails(mounts, later, "FailedMount: MountVolume.SetUp failed");
}

#[test]
fn a_kubectl_or_an_api_server_that_is_not_there_is_named() {
    let project = Project::new();
    let api = Api::start();
    let step = "steps:\n  s: { run: 'true', runner: kubernetes }\n";
    let text = format!("{}{step}", api.runners("/nowhere/kubectl", ""));
    project.write("p.yaml", &text);
    let missing = project.run(&["p.yaml"]);
    assert_eq!(missing.code, Some(4), "{}", missing.stderr);
    assert!(
        missing.stderr.contains("/nowhere/kubectl"),
        "{}",
        missing.stderr
    );
    project.write("p.yaml", step);
    let wrong = project.run(&["check", "p.yaml"]);
    assert_eq!(wrong.code, Some(3), "{}", wrong.stderr);
    assert!(
        wrong.stderr.contains("runners: { kubernetes: { namespace:"),
        "{}",
        wrong.stderr
    );
    let Some(kubernetes) = Kubernetes::start() else {
        return;
    };
    project.write("p.yaml", &format!("{}{step}", kubernetes.runners("")));
    kubernetes.api.be_away(true);
    let away = kubernetes.run(&project, &["p.yaml"]);
    assert_eq!(away.code, Some(4), "{}", away.stderr);
    assert!(
        away.stderr.contains("unable to handle the request"),
        "{}",
        away.stderr
    );
}

#[test]
fn a_remote_folder_that_lies_on_no_volume_is_told_before_the_run() {
    let project = Project::new();
    let runners = "runners:\n  kubernetes:\n    namespace: ml\n    image: registry.example/flowrun:1\n    user: 10001\n    through: remote\n";
    let step = "steps:\n  s: { run: 'true', runner: kubernetes }\n";
    project.write("p.yaml", &format!("{runners}{step}"));
    let store = project.path("store");
    let run = |remote: &str, args: &[&str]| {
        let mut command = project.command(args);
        Run::of(command.env("FLOWRUN_REMOTE", remote).output().unwrap())
    };
    let folder = store.display().to_string();
    for args in [&["check", "p.yaml"][..], &["p.yaml"]] {
        let refused = run(&folder, args);
        assert_eq!(refused.code, Some(3), "{}", refused.stderr);
        let text = format!(
            "p.yaml:6:14: error: the pods do not see the remote cache: {folder} lies on none of `volumes`"
        );
        assert!(refused.stderr.contains(&text), "{}", refused.stderr);
    }
    assert!(!project.path(".flowrun/runs").exists(), "nothing was begun");
    let check = ["check", "p.yaml"];
    run("s3://bucket/x", &check).ok();
    let volumes = format!(
        "    volumes: {{ '{}': {{ hostPath: {{ path: /srv }} }} }}\n",
        project.path("").display()
    );
    project.write("p.yaml", &format!("{runners}{volumes}{step}"));
    run(&folder, &check).ok();
}
