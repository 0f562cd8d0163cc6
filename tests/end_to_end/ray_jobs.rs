//! `runner: ray`: steps as jobs of a real Ray of this machine, whose processes are killed.
//! `FLOWRUN_RAY_PYTHON` names a Python with `ray[default]`; else `python3` is tried.

use std::path::Path;

use crate::command_job::CommandJob;
use crate::fault_proxy::Proxy;
use crate::label_job::upstream;
use crate::processes::{lives, running, signal, until};
use crate::project::{Project, Run};
use crate::ray_cluster::Ray;
use crate::server::{client, free_port};
use crate::slow_job::Slow;
use crate::{files, heavy_steps, tiny};

/// The tiny main job with its heavy steps as jobs: the same results as in this process, and the
/// same keys. Nothing is left of the jobs.
#[test]
fn the_heavy_steps_of_the_tiny_job_run_on_ray_with_the_same_results() {
    let Some(ray) = Ray::at_hand() else { return };
    let project = tiny::project();
    let here = project.run(&["pipeline.yaml", "--json"]).ok();
    heavy_steps::move_to(&project, &ray.runners(), "    runner: ray\n");
    heavy_steps::are_the_same_elsewhere(&here, |args| project.run(args));
    labelling_and_training_are_the_same(&ray);
    until("jobs are left", || ray.jobs().is_empty());
}

const LABEL: &str = "  label:
    uses: bootstrap
    in: { unlabelled: labels.test, labels: labels.labels }
    with: { program: classify, model: oracle }
";

/// Labelling by a server and the training of the student, here and as jobs: the same results, and
/// each answer is asked for once in either way.
fn labelling_and_training_are_the_same(ray: &Ray) {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = tiny::project();
    tiny::train(&project, None, "lora: { rank: 2 }");
    let entry = format!(
        "models:\n  oracle: {{ provider: openai, base_url: '{}', model: tiny, guided: vllm }}\n",
        proxy.url
    );
    project.edit("pipeline.yaml", "models:\n", &entry);
    project.write("pipeline.yaml", &(project.read("pipeline.yaml") + LABEL));
    let here = project.run(&["pipeline.yaml", "--json"]).ok();
    let answers = || {
        let counts = proxy.counts();
        counts.values().map(|c| c.answers).collect::<Vec<usize>>()
    };
    let asked = answers().len();
    assert!(asked > 1 && answers() == vec![1; asked], "{:?}", answers());

    // Nothing that was answered is kept.
    std::fs::remove_dir_all(project.path(".flowrun/completions")).unwrap();
    let kinds = ["bootstrap", "finetune"];
    heavy_steps::move_kinds(&project, &ray.runners(), "    runner: ray\n", &kinds);
    let there = project.run(&["pipeline.yaml", "--json", "--force"]).ok();
    assert_eq!(answers(), vec![2; asked]);
    for step in ["label", "finetune"] {
        let of = |run: &Run| heavy_steps::made_by(run, step);
        assert_eq!(of(&there), of(&here), "{step}");
        let log = there.events().last().unwrap()["run_dir"].clone();
        let log = format!("{}/logs/{step}.log", log.as_str().unwrap());
        let said = project.read(&log);
        assert!(said.contains("at Ray at"), "{step} was no job: {said}");
    }
}

/// A program that trains, such as TRL, starts where the job is.
#[test]
fn another_program_trains_as_a_job() {
    let Some(ray) = Ray::at_hand() else { return };
    let job = CommandJob::new("ray", &ray.runners());
    job.makes_the_same(&[], "at Ray at");
    let job = CommandJob::new("ray", &ray.runners());
    job.outlives_its_worker(&[]);
    let job = CommandJob::new("ray", &ray.runners());
    job.is_stopped_with_its_run(&[]);
}

#[test]
fn a_command_is_a_job_too_and_its_secret_is_shown_nowhere() {
    let Some(ray) = Ray::at_hand() else { return };
    let project = Project::new();
    let step = "steps:\n  s:\n    run: 'echo \"it is $TOKEN\"; printf %s \"$TOKEN\" | wc -c > \"$out\"; [ -z \"${OTHER-}\" ]'\n    runner: ray\n    secrets: [TOKEN]\n    out: { out: deep/n }\n    publish: { out: n }\n";
    project.write("p.yaml", &format!("{}{step}", ray.runners()));
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
        let jobs = ray.jobs();
        jobs.iter()
            .all(|(_, status)| status == "PENDING" || status == "STOPPED")
    });
    let said = files::holding(ray.folder(), "very-secret-value");
    assert!(said.is_empty(), "{said:?}");
}

#[test]
fn the_program_may_be_brought_to_the_workers() {
    let Some(ray) = Ray::at_hand() else { return };
    let project = Project::new();
    let step = "steps:\n  s:\n    run: readlink /proc/$PPID/exe > \"$out\"\n    runner: ray\n    out: { out: exe }\n    publish: { out: exe }\n";
    project.write("p.yaml", &format!("{}{step}", ray.runners()));
    project.edit("p.yaml", "jobs: 4", "upload: true");
    project.run(&["p.yaml"]).ok();
    let exe = project.read("exe");
    assert!(Path::new(exe.trim()).starts_with(ray.folder()), "{exe}");
}

#[test]
fn a_worker_that_is_killed_is_followed_by_another() {
    let Some(ray) = Ray::at_hand() else { return };
    let slow = Slow::new("ray", &ray.runners());
    slow.outlives_its_worker(slow.start());
    until("jobs are left", || ray.jobs().is_empty());
}

#[test]
fn the_job_of_a_killed_run_is_taken_up_by_the_next() {
    let Some(ray) = Ray::at_hand() else { return };
    let slow = Slow::new("ray", &ray.runners());
    slow.outlives_its_run(|| slow.start(), || {});
    until("jobs are left", || ray.jobs().is_empty());
}

#[test]
fn an_interrupted_run_stops_its_job() {
    let Some(ray) = Ray::at_hand() else { return };
    let slow = Slow::new("ray", &ray.runners());
    slow.is_stopped_with_its_run(slow.start());
    assert!(slow.left().is_empty(), "{:?}", slow.left());
    until("jobs are left", || ray.jobs().is_empty());
}

/// The node that works is lost as a whole; another one comes.
#[test]
fn a_node_that_dies_is_replaced_by_another() {
    let Some(mut ray) = Ray::at_hand() else {
        return;
    };
    ray.add_node("first");
    let slow = on_a_node(&ray, "plough");
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

/// A step that only an added node can do, one that has this resource.
fn on_a_node(ray: &Ray, resource: &str) -> Slow {
    let patient = "jobs: 4, autoscales: true, patience: 240";
    let settings = ray.runners().replace("jobs: 4", patient);
    let slow = Slow::new("ray", &settings);
    let runner = "    runner: ray\n";
    let needs = format!("{runner}    resources: {{ cpu: 0.1, custom: {{ {resource}: 1 }} }}\n");
    slow.project.edit("p.yaml", runner, &needs);
    slow
}

/// The head's own process is killed: what works on another node works on, and its result comes.
/// (`ray start --block` ends what works on the head's node.) What is ordered afterwards says what
/// is away.
#[test]
fn a_head_that_dies_does_not_take_the_work_along() {
    let Some(mut ray) = Ray::at_hand() else {
        return;
    };
    ray.add_node("other");
    let slow = on_a_node(&ray, "plough");
    let child = slow.start();
    slow.worker();
    ray.lose_head();
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

/// The head dies before one job is begun, and the node of another job meanwhile. The next head at
/// the address knows neither: both are begun again, once it takes jobs and has a node for them.
#[test]
fn a_head_that_comes_back_is_given_the_lost_jobs_again() {
    let Some(mut ray) = Ray::at_hand() else {
        return;
    };
    ray.add_node("first");
    let begun = on_a_node(&ray, "plough");
    let waiting = on_a_node(&ray, "second");
    let runs = (begun.start(), waiting.start());
    let worker = begun.worker();
    until("it was not ordered", || waiting.has_said("at Ray at"));
    ray.lose_head();
    signal("-KILL", worker);
    signal("-KILL", raylet(ray.folder(), "first"));
    ray.start_head_again();
    ray.add_node("second");
    assert_ne!(begun.worker(), worker);
    waiting.worker();
    for (slow, run, times) in [(&begun, runs.0, 2), (&waiting, runs.1, 1)] {
        slow.go();
        let run = slow.ended_well(run);
        assert_eq!(slow.begun(), times);
        assert!(run.stdout.contains("it is begun again"), "{}", run.stdout);
    }
    until("jobs are left", || ray.jobs().is_empty());
}

/// The process of a node that was added.
fn raylet(folder: &Path, label: &str) -> u32 {
    let folder = folder.display().to_string();
    running(&[&folder, "raylet/raylet", label]).unwrap()
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
