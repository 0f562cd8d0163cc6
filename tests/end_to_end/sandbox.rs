//! What a command may see, and how it ends.

use std::time::Duration;

use crate::project::Project;

fn project(run: &str, more: &str) -> Project {
    let project = Project::new();
    let text = format!(
        "name: sandbox\nsteps:\n  s:\n    run: {}\n    in: {{ words: {{ file: words.txt }} }}\n    out: {{ out: out.txt }}\n    publish: {{ out: result.txt }}\n{more}",
        serde_json::to_string(run).unwrap()
    );
    project.write("pipeline.yaml", &text);
    project.write("words.txt", "apple\n");
    project.write("other.txt", "pear\n");
    project
}

fn fails(run: &str, with: &[&str]) {
    let project = project(run, "");
    let mut command = project.command(&["pipeline.yaml"]);
    let run = crate::project::Run::of(command.env("UNDECLARED", "x").output().unwrap());
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    for text in with {
        assert!(run.stderr.contains(text), "{text} in {}", run.stderr);
    }
    assert!(!project.path("result.txt").exists());
}

#[test]
fn what_was_not_declared_fails_at_once() {
    fails("cat other.txt > $out", &["other.txt", "No such file"]);
    fails("cat ../other.txt > $out", &["other.txt", "No such file"]);
    fails("echo $UNDECLARED > $out", &["UNDECLARED"]);
    fails(
        "false | true; cat nothing > $out; echo not reached",
        &["nothing"],
    );
    fails("true", &["did not write its output `out`"]);
    fails("mkfifo $out", &["neither a file nor a folder"]);
}

#[test]
fn a_command_sees_its_ports_and_nothing_else() {
    let script = "{ find . -type f | sort; echo $words $out; env | cut -d= -f1 | sort | tr '\\n' ' '; } > $out";
    let project = project(script, "    env: { MODE: fast }\n");
    project.run(&["pipeline.yaml"]).ok();
    let seen = project.read("result.txt");
    let mut lines = seen.lines();
    assert_eq!(lines.next(), Some("./in/words"), "{seen}");
    assert_eq!(lines.next(), Some("./out/out.txt"), "{seen}");
    assert_eq!(lines.next(), Some("in/words out/out.txt"), "{seen}");
    for name in lines.next().unwrap().split_whitespace() {
        let known = [
            "HOME", "LANG", "MODE", "PATH", "PWD", "OLDPWD", "SHLVL", "_", "out", "words",
        ];
        assert!(known.contains(&name) || name.starts_with("LC_"), "{name}");
    }
}

/// The limit that `docs/pipeline-language.md` states.
#[test]
fn what_an_absolute_path_reaches_is_in_no_key() {
    let project = project("cat OTHER > $out", "");
    let other = project.path("other.txt").display().to_string();
    project.edit("pipeline.yaml", "OTHER", &other);
    let ran = || project.run(&["pipeline.yaml", "--json"]).ok().steps("ran");
    assert_eq!(ran(), ["s"]);
    assert_eq!(project.read("result.txt"), "pear\n");
    project.write("other.txt", "quince\n");
    assert_eq!(ran(), Vec::<String>::new());
    assert_eq!(project.read("result.txt"), "pear\n");
}

#[test]
fn another_locale_is_another_key() {
    let project = project("cat $words > $out", "");
    let ran = |locale: &str| {
        let mut command = project.command(&["pipeline.yaml", "--json"]);
        let run = command.env("LC_ALL", locale).output().unwrap();
        crate::project::Run::of(run).ok().steps("ran").len()
    };
    assert_eq!([ran("C"), ran("C"), ran("C.UTF-8"), ran("C")], [1, 0, 1, 0]);
}

#[test]
fn a_secret_is_hidden_where_lines_are_cut() {
    let script = "printf \"%8190s$TOKEN\\n\" x; echo \"$RETURNS\"; echo > $out";
    let project = project(script, "    secrets: [TOKEN, RETURNS]\n");
    let mut command = project.command(&["pipeline.yaml"]);
    command.env("TOKEN", "hushhush").env("RETURNS", "quietly\r");
    crate::project::Run::of(command.output().unwrap()).ok();
    let log = project.run(&["show", "s"]).ok().stdout;
    assert!(log.contains("***"), "{log}");
    for part in ["hush", "quietly"] {
        assert!(!log.contains(part), "{part} in {log}");
    }
}

#[test]
fn what_is_printed_is_in_the_log_and_its_end_is_shown() {
    let script = "for i in $(seq 40); do echo line $i; done; sleep 0.5; echo trouble >&2; exit 7";
    let project = project(script, "");
    let run = project.run(&["pipeline.yaml", "--json"]);
    assert_eq!(run.code, Some(4));
    let events = run.events();
    let failed = events.iter().find(|e| e["status"] == "failed").unwrap();
    let why = failed["why"].as_str().unwrap();
    assert!(
        why.contains("exit status: 7") && why.contains("line 40"),
        "{why}"
    );
    assert!(
        why.contains("trouble") && !why.contains("line 9\n"),
        "{why}"
    );
    let folder = events.last().unwrap()["run_dir"].as_str().unwrap();
    let log = project.read(&format!("{folder}/logs/s.log"));
    assert!(
        log.starts_with("line 1\n") && log.contains("trouble\n"),
        "{log}"
    );
}

#[test]
fn time_up_kills_all_that_the_command_started() {
    let script = "sleep 1000 & echo $! > $PIDS; wait";
    let project = project(script, "    timeout: 300ms\n    env: { PIDS: PIDS_FILE }\n");
    let pids = project.path("pids").display().to_string();
    project.edit("pipeline.yaml", "PIDS_FILE", &pids);
    let run = project.run(&["pipeline.yaml"]);
    assert_eq!(run.code, Some(4));
    assert!(run.stderr.contains("`timeout` of 300ms"), "{}", run.stderr);
    let pid = project.read("pids");
    let is_gone = || {
        std::thread::sleep(Duration::from_millis(5));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    assert!((0..1000).any(|_| is_gone()));
}
