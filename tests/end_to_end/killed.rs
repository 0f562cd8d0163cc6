//! Killed with -9, interrupted, and two at once.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::processes::{lives, signal, until};
use crate::project::{Project, Run};

const SLOW: &str = "\
name: slow
steps:
  quick:
    run: echo done > \"$out\"
    out: { out: out.txt }
  slow:
    run: cat \"$text\" > \"$out\"; while [ ! -e \"$GO\" ] && [ -d \"${GO%/*}\" ]; do sleep 0.05; done; echo end >> \"$out\"
    in: { text: quick.out }
    out: { out: out.txt }
    env: { GO: GO_FILE }
    publish: { out: result.txt }
";

fn slow() -> Project {
    let project = Project::new();
    let go = project.path("go").display().to_string();
    project.write("pipeline.yaml", &SLOW.replace("GO_FILE", &go));
    project
}

/// Starts a run and waits until `slow` is under way.
fn start(project: &Project) -> std::process::Child {
    let mut command = project.command(&["pipeline.yaml", "--json"]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !project.run(&["show"]).stdout.contains("ran     quick") {
        assert!(Instant::now() < deadline, "`quick` did not finish");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let project = slow();
    let mut child = start(&project);
    signal("-KILL", child.id());
    child.wait().unwrap();
    project.write("go", "");
    let run = project.run(&["pipeline.yaml", "--json"]).ok();
    assert_eq!(run.steps("cached"), ["quick"]);
    assert_eq!(run.steps("ran"), ["slow"]);
    assert_eq!(project.read("result.txt"), "done\nend\n");
}

#[test]
fn what_ends_a_killed_runs_commands_spares_those_of_the_next_run() {
    let project = slow();
    let mut child = start(&project);
    signal("-KILL", child.id());
    child.wait().unwrap();
    // The next run's command is at work while the killed run's are looked for.
    let mut next = project.command(&["pipeline.yaml", "--json"]);
    let next = next.stdout(Stdio::piped()).stderr(Stdio::piped());
    let next = next.spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    project.write("go", "");
    let run = Run::of(next.wait_with_output().unwrap()).ok();
    assert_eq!(run.steps("ran"), ["slow"]);
}

#[test]
fn the_command_of_a_killed_run_does_not_live_on() {
    let project = Project::new();
    let pid = project.path("pid");
    let text = format!(
        "name: k\nsteps:\n  s:\n    run: echo $$ > \"$PID.new\"; mv \"$PID.new\" \"$PID\"; sleep 100 & wait\n    out: {{ out: out }}\n    env: {{ PID: {} }}\n",
        pid.display()
    );
    project.write("pipeline.yaml", &text);
    let mut child = project
        .command(&["pipeline.yaml"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the command did not start", || pid.exists());
    signal("-KILL", child.id());
    child.wait().unwrap();
    let command = project.read("pid").trim().parse().unwrap();
    until("the command lives on", || !lives(command));
}

#[test]
fn an_interrupted_run_keeps_what_finished_and_exits_130() {
    let project = slow();
    let child = start(&project);
    signal("-INT", child.id());
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert_eq!(ended.steps("ran"), ["quick"]);
    project.write("go", "");
    assert_eq!(project.run(&["--json"]).ok().steps("ran"), ["slow"]);
}

#[test]
fn a_second_run_waits_or_fails_and_names_the_first() {
    let project = slow();
    let child = start(&project);
    let refused = project.run(&["pipeline.yaml", "--no-wait"]);
    assert_eq!(refused.code, Some(6));
    assert!(
        refused.stderr.contains(&format!("process {}", child.id())),
        "{}",
        refused.stderr
    );
    project.write("go", "");
    let second = project.run(&["pipeline.yaml", "--json"]).ok();
    assert_eq!(second.steps("cached"), ["quick", "slow"]);
    Run::of(child.wait_with_output().unwrap()).ok();
}
