//! `runner: kubernetes` on a real cluster whose node is this machine: `KUBECONFIG` says which,
//! `FLOWRUN_KUBECTL` by what, and `FLOWRUN_KUBERNETES` names an image with `/bin/sh`, the common
//! commands and the C library that the program was built for. The program and the projects come
//! by `hostPath`, so what is tested is what was built.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::processes::{lives, signal, until};
use crate::project::{Project, Run};
use crate::required::skip;
use crate::slow_job::{Slow, notes};
use crate::tiny;

struct Cluster {
    kubectl: String,
    image: String,
}

impl Cluster {
    fn named() -> Option<Self> {
        let named = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        match (named("FLOWRUN_KUBECTL"), named("FLOWRUN_KUBERNETES")) {
            (Some(kubectl), Some(image)) => Some(Self { kubectl, image }),
            _ => {
                skip(
                    "kubernetes",
                    "FLOWRUN_KUBERNETES names no image for a real cluster",
                );
                None
            }
        }
    }

    fn runners(&self, more: &str) -> String {
        let (kubectl, image) = (&self.kubectl, &self.image);
        let user = nix::unistd::geteuid();
        let program = Path::new(env!("CARGO_BIN_EXE_flowrun")).parent().unwrap();
        let temporary = std::fs::canonicalize(std::env::temp_dir()).unwrap();
        let mount =
            |path: &Path| format!("'{0}': {{ hostPath: {{ path: '{0}' }} }}", path.display());
        let volumes = [mount(program), mount(&temporary)].join(", ");
        // The numbers of processes are those of this machine, and tests run side by side.
        format!(
            "runners:\n  kubernetes:\n    namespace: default\n    image: {image}\n    kubectl: '{kubectl}'\n    user: {user}\n    volumes: {{ {volumes} }}\n    pod: {{ hostPID: true }}\n    container: {{ imagePullPolicy: IfNotPresent, resources: {{ requests: {{ cpu: 50m }} }} }}\n{more}"
        )
    }

    fn slow(&self) -> Slow {
        Slow::new("kubernetes", &self.runners(""))
    }

    /// Names of a project's Jobs or pods.
    fn names(&self, kind: &str, project: &Project) -> Vec<String> {
        let mut command = Command::new(&self.kubectl);
        let output = command.args(["get", kind, "-o", "json"]).output().unwrap();
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        let folder = project.path("").display().to_string();
        let all = list["items"].as_array().unwrap().iter();
        let own = all.filter(|one| one["spec"].to_string().contains(&folder));
        let names = own.map(|one| one["metadata"]["name"].as_str().unwrap().to_owned());
        names.collect()
    }

    fn delete(&self, kind: &str, names: &[String]) {
        let mut command = Command::new(&self.kubectl);
        command.args(["delete", kind, "--wait=false"]).args(names);
        assert!(command.output().unwrap().status.success());
    }

    fn is_tidy(&self, project: &Project) {
        until("jobs are left", || self.names("jobs", project).is_empty());
    }
}

#[test]
fn the_heavy_steps_of_the_tiny_job_run_on_a_cluster_with_the_same_results() {
    let Some(cluster) = Cluster::named() else {
        return;
    };
    let project = tiny::project();
    let outputs = |run: &Run| -> Vec<(Value, Value)> {
        let events = run.events();
        let ended = events.iter().filter(|e| e["event"] == "step_finished");
        let steps = ended.filter(|e| e["step"] == "chats" || e["step"] == "score");
        steps
            .map(|e| (e["key"].clone(), e["outputs"].clone()))
            .collect()
    };
    let here = outputs(&project.run(&["pipeline.yaml", "--json"]).ok());
    for step in ["convert-to-messages", "evaluate"] {
        let uses = format!("uses: {step}\n");
        let there = format!("{uses}    runner: kubernetes\n    timeout: 1h\n");
        project.edit("pipeline.yaml", &uses, &there);
    }
    let text = format!("{}{}", cluster.runners(""), project.read("pipeline.yaml"));
    project.write("pipeline.yaml", &text);
    let there = project
        .run(&["pipeline.yaml", "--json", "--from", "chats"])
        .ok();
    assert_eq!(there.steps("ran"), ["chats", "score", "deploy"]);
    assert_eq!(outputs(&there), here);
    cluster.is_tidy(&project);
}

#[test]
fn a_pod_that_is_killed_or_deleted_is_followed_by_another() {
    let Some(cluster) = Cluster::named() else {
        return;
    };
    for kills in [true, false] {
        let slow = cluster.slow();
        let child = slow.start();
        let first = slow.worker();
        match kills {
            true => signal("-KILL", first),
            false => cluster.delete("pods", &cluster.names("pods", &slow.project)),
        }
        assert_ne!(slow.worker(), first);
        slow.go();
        let run = slow.ended_well(child);
        assert_eq!(slow.begun(), 2);
        assert!(run.stdout.contains("it is begun again"), "{}", run.stdout);
        cluster.is_tidy(&slow.project);
    }
}

#[test]
fn a_run_that_is_killed_is_followed_by_the_next_and_one_that_is_stopped_stops_its_job() {
    let Some(cluster) = Cluster::named() else {
        return;
    };
    let slow = cluster.slow();
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
    cluster.is_tidy(&slow.project);

    let slow = cluster.slow();
    let child = slow.start();
    let worker = slow.worker();
    signal("-INT", child.id());
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    until("the job works on", || !lives(worker));
    cluster.is_tidy(&slow.project);
}

#[test]
fn a_job_that_somebody_deletes_failed_on_a_cluster() {
    let Some(cluster) = Cluster::named() else {
        return;
    };
    let slow = cluster.slow();
    let child = slow.start();
    let worker = slow.worker();
    cluster.delete("jobs", &cluster.names("jobs", &slow.project));
    until("the job works on", || !lives(worker));
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert!(said.contains("was stopped by somebody"), "{said}");
    assert_eq!(slow.begun(), 1, "it was not begun again");
}

#[test]
fn what_has_no_place_and_what_uses_up_its_memory_says_so() {
    let Some(cluster) = Cluster::named() else {
        return;
    };
    let fails = |command: &str, resources: &str, words: &str| {
        let project = Project::new();
        let steps = format!(
            "steps:\n  s: {{ run: '{command}', runner: kubernetes, resources: {{ {resources} }} }}\n"
        );
        let runners = cluster.runners("    queue_timeout: 5\n");
        project.write("p.yaml", &format!("{runners}{steps}"));
        let failed = project.run(&["p.yaml"]);
        assert_eq!(failed.code, Some(4), "{}", failed.stderr);
        assert!(failed.stderr.contains(words), "{words}: {}", failed.stderr);
        cluster.is_tidy(&project);
    };
    fails("tail /dev/zero", "memory: 128MiB", "`resources.memory`");
    let device = "custom: { example.com/none: 1 }";
    fails("true", device, "(`queue_timeout`): Unschedulable: 0/");
}

#[test]
fn a_pod_gets_its_files_through_a_remote_store() {
    let Some(cluster) = Cluster::named() else {
        return;
    };
    let project = Project::new();
    project.write("text.txt", "text\n");
    let step = "steps:\n  s:\n    run: 'cat \"$text\" > \"$out\"'\n    runner: kubernetes\n    in: { text: { file: text.txt } }\n    out: { out: n }\n    publish: { out: n }\n";
    let runners = cluster.runners("    through: remote\n");
    project.write("p.yaml", &format!("{runners}{step}"));
    let mut command = project.command(&["p.yaml"]);
    command.env("FLOWRUN_REMOTE", project.path("store"));
    Run::of(command.output().unwrap()).ok();
    assert_eq!(project.read("n"), "text\n");
    until("notes are left", || notes(&project) == 0);
    cluster.is_tidy(&project);
}
