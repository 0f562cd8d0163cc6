//! `through: remote`: jobs whose workers see no folder of the run's machine. Their files and words
//! go through a remote store: a folder here; `slurm` has the same through S3.

use std::process::{Child, Command, Stdio};

use crate::processes::until;
use crate::project::{Project, Run};
use crate::ray_cluster::Ray;
use crate::required::skip;
use crate::slow_job::{Slow, notes};
use crate::{files, heavy_steps, tiny};

fn runners(ray: &Ray) -> String {
    format!(
        "runners:\n  ray: {{ address: '{}', jobs: 4, through: remote }}\n",
        ray.dashboard
    )
}

/// Where the remote store of a project's runs is.
fn store(project: &Project) -> String {
    project.path("store").display().to_string()
}

fn run(project: &Project, args: &[&str]) -> Run {
    let mut command = project.command(args);
    Run::of(
        command
            .env("FLOWRUN_REMOTE", store(project))
            .output()
            .unwrap(),
    )
}

fn start(slow: &Slow) -> Child {
    slow.start_with(&[("FLOWRUN_REMOTE", &store(&slow.project))])
}

#[test]
fn a_worker_that_is_killed_is_followed_by_another() {
    let Some(ray) = Ray::at_hand() else { return };
    let slow = Slow::new("ray", &runners(&ray));
    slow.outlives_its_worker(start(&slow));
    slow.worked_elsewhere();
    until("notes are left", || notes(&slow.project) == 0);
}

#[test]
fn the_job_of_a_killed_run_is_taken_up_by_the_next() {
    let Some(ray) = Ray::at_hand() else { return };
    let slow = Slow::new("ray", &runners(&ray));
    slow.outlives_its_run(|| start(&slow), || {});
    until("notes are left", || notes(&slow.project) == 0);
}

#[test]
fn an_interrupted_run_stops_its_job() {
    let Some(ray) = Ray::at_hand() else { return };
    let slow = Slow::new("ray", &runners(&ray));
    slow.is_stopped_with_its_run(start(&slow));
    assert!(slow.left().is_empty(), "{:?}", slow.left());
    until("notes are left", || notes(&slow.project) == 0);
}

/// The same command, with a cache folder that no other process sees; none without the right to
/// mount one.
fn hidden(command: &Command, project: &Project) -> Option<Command> {
    let may = Command::new("unshare")
        .args(["--mount", "true"])
        .stderr(Stdio::null())
        .status();
    if !may.is_ok_and(|status| status.success()) {
        let why = "there is no right to mount a file system that others do not see";
        skip("mount", why);
        return None;
    }
    std::fs::create_dir_all(project.path(".flowrun")).unwrap();
    let script = "mount -t tmpfs none .flowrun && exec \"$0\" \"$@\"";
    let mut hidden = Command::new("unshare");
    hidden
        .args(["--mount", "sh", "-c", script])
        .arg(command.get_program())
        .args(command.get_args())
        .current_dir(project.path(""));
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => hidden.env(name, value),
            None => hidden.env_remove(name),
        };
    }
    Some(hidden)
}

/// Step kinds and commands, files and folders, with a cache folder that the workers cannot see.
#[test]
fn steps_work_where_the_cache_folder_is_not_there() {
    let Some(ray) = Ray::at_hand() else { return };
    let project = tiny::project();
    let here = project.run(&["pipeline.yaml", "--json"]).ok();
    heavy_steps::move_to(&project, &runners(&ray), "    runner: ray\n");
    let mut command = project.command(&["pipeline.yaml", "--json", "--force"]);
    command.env("FLOWRUN_REMOTE", store(&project));
    let mut command = hidden(&command, &project).unwrap_or(command);
    let there = Run::of(command.output().unwrap()).ok();
    assert!(there.steps("ran").contains(&"score".to_owned()));
    heavy_steps::assert_same(&here, &there);
    until("notes are left", || notes(&project) == 0);

    // Folders, empty ones too, programs, and lists.
    let project = Project::new();
    let steps = "\
steps:
  made:
    run: |
      mkdir -p \"$folder/deep\" \"$folder/empty\"
      echo inner > \"$folder/deep/file\"
      printf '#!/bin/sh\\necho ran\\n' > \"$folder/tool\"; chmod +x \"$folder/tool\"
      echo note > \"$note\"
    runner: ray
    out: { folder: folder, note: note.txt }
  used:
    run: |
      cat \"$folder/deep/file\" > \"$out\"; \"$folder/tool\" >> \"$out\"
      ls \"$both\" | wc -l >> \"$out\"
      cat \"$both\"/*-note* >> \"$out\"
    runner: ray
    in: { folder: made.folder, both: [made.folder, made.note] }
    out: { out: out.txt }
    publish: { out: out.txt }
";
    project.write("p.yaml", &format!("{}{steps}", runners(&ray)));
    run(&project, &["p.yaml"]).ok();
    assert_eq!(project.words("out.txt"), ["inner", "ran", "2", "note"]);
}

#[test]
fn what_is_missing_is_said() {
    let Some(ray) = Ray::at_hand() else { return };
    let project = Project::new();
    let steps = "steps:\n  s:\n    run: 'printf %s \"$TOKEN\" | wc -c > \"$out\"'\n    runner: ray\n    secrets: [TOKEN]\n    out: { out: n }\n";
    project.write("p.yaml", &format!("{}{steps}", runners(&ray)));
    let with_token = |remote: Option<String>, more: &[&str]| {
        let mut command = project.command(&[&["p.yaml"][..], more].concat());
        command.env("TOKEN", "very-secret-value");
        if let Some(remote) = remote {
            command.env("FLOWRUN_REMOTE", remote);
        }
        Run::of(command.output().unwrap())
    };
    // Ray's own processes do not have the variable, and no file brings it.
    let lacks = with_token(Some(store(&project)), &[]);
    assert_eq!(lacks.code, Some(4), "{}", lacks.stderr);
    assert!(
        lacks.stderr.contains("no variable `TOKEN`"),
        "{}",
        lacks.stderr
    );
    let said = files::holding(&project.path("store"), "very-secret-value");
    assert!(said.is_empty(), "the store has the secret: {said:?}");
    until("notes are left", || notes(&project) == 0);

    let alone = with_token(None, &[]);
    assert_ne!(alone.code, Some(0));
    assert!(alone.stderr.contains("no remote cache"), "{}", alone.stderr);
    let reads = with_token(Some(store(&project)), &["--remote-read-only"]);
    assert_ne!(reads.code, Some(0));
    assert!(
        reads.stderr.contains("nothing may be written"),
        "{}",
        reads.stderr
    );
}
