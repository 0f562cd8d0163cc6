//! `hooks:`: who is told that a run ended.

use serde_json::Value;

use crate::files;
use crate::project::{Project, Run};
use crate::receiver::Receiver;
use crate::server::free_port;

const STEPS: &str = r#"
steps:
  count:
    run: printf '{"lines":3}' > "$metrics"
    out: { metrics: metrics.json }
"#;

const FAILS: &str = r#"
  break:
    needs: [count]
    run: echo no luck >&2; exit 7
"#;

const SECRET: &str = "s3cret-of-the-hook";

fn project(hooks: &str, more: &str) -> Project {
    let project = Project::new();
    project.write("p.yaml", &format!("name: p\nhooks:\n{hooks}{STEPS}{more}"));
    project
}

fn run(project: &Project, args: &[&str]) -> Run {
    let mut command = project.command(&["p.yaml", "--json"]);
    command.args(args).env("HOOK_TOKEN", SECRET);
    Run::of(command.output().unwrap())
}

/// The JSON that a hook left in a file.
fn told(project: &Project, file: &str) -> Value {
    serde_json::from_str(&project.read(file)).unwrap()
}

/// Nothing under the project's cache, and nothing that was printed, holds the secret.
fn assert_secret(project: &Project, run: &Run) {
    assert!(!run.stdout.contains(SECRET) && !run.stderr.contains(SECRET));
    let cache = project.path(".flowrun");
    assert!(files::below(&cache).len() > 5);
    let holding = files::holding(&cache, SECRET);
    assert!(holding.is_empty(), "{holding:?}");
}

#[test]
fn a_command_is_told_that_a_run_ended_also_when_nothing_was_to_do() {
    let hooks = r#"  tell:
    secrets: [HOOK_TOKEN]
    command:
      - sh
      - -c
      - |
        cat > told.json
        echo "$FLOWRUN_EVENT $FLOWRUN_STATUS $FLOWRUN_PIPELINE $FLOWRUN_HOOK $UNRELATED." > env.txt
        test -d "$FLOWRUN_RUN_DIR" && test -n "$HOOK_TOKEN" && echo "token $HOOK_TOKEN"
  only-bad:
    on: [failed]
    command: [touch, bad]
"#;
    let project = project(hooks, "");
    let first = run(&project, &[]).ok();
    let json = told(&project, "told.json");
    assert_eq!(
        (&json["hook"], &json["event"], &json["status"], &json["ok"]),
        (
            &"tell".into(),
            &"finished".into(),
            &"ok".into(),
            &true.into()
        )
    );
    assert_eq!((&json["version"], &json["ran"]), (&1.into(), &1.into()));
    assert_eq!(json["run"], first.events()[0]["run"]);
    assert_eq!(json["metrics"]["count"]["lines"], 3);
    assert_eq!(project.read("env.txt"), "finished ok p tell .\n");
    assert!(!project.path("bad").exists());
    let run_dir = json["run_dir"].as_str().unwrap();
    let log = std::fs::read_to_string(format!("{run_dir}/hooks/tell.log")).unwrap();
    assert_eq!(log, "token ***\n");
    assert_secret(&project, &first);
    for _ in 0..2 {
        std::fs::remove_file(project.path("told.json")).unwrap();
        let again = run(&project, &[]).ok();
        assert_eq!(again.steps("cached"), ["count"]);
        let json = told(&project, "told.json");
        assert_eq!(json["run"], again.events()[0]["run"]);
        assert_eq!((&json["cached"], &json["ran"]), (&1.into(), &0.into()));
        assert_secret(&project, &again);
    }
    // A hook is in no key.
    project.edit("p.yaml", "only-bad", "another");
    assert_eq!(run(&project, &[]).ok().steps("cached"), ["count"]);
}

#[test]
fn a_secret_of_several_lines_is_in_no_log_and_no_warning_nor_a_part_of_it() {
    let hooks = r#"  lines:
    secrets: [HOOK_TOKEN]
    command: [sh, -c, 'printf "%s" "$HOOK_TOKEN" | while read -r line; do echo "got $line."; done; exit 3']
  long:
    secrets: [HOOK_TOKEN]
    command: [sh, -c, 'head -c 1048570 /dev/zero | tr "\0" x; printf "%s" "$HOOK_TOKEN"; head -c 100 /dev/zero | tr "\0" y']
"#;
    let project = project(hooks, "");
    let mut command = project.command(&["p.yaml", "--json"]);
    command.env("HOOK_TOKEN", format!("{SECRET}-1\n{SECRET}-2\n"));
    let ended = Run::of(command.output().unwrap()).ok();
    let events = ended.events();
    let last = events.iter().find(|e| e["event"] == "run_finished");
    let run_dir = last.unwrap()["run_dir"].as_str().unwrap();
    let log = |name: &str| project.read(&format!("{run_dir}/hooks/{name}"));
    assert_eq!(log("lines.log"), "got ***.\ngot ***.\n");
    assert!(ended.stderr.contains("(exit status: 3): got ***."));
    // Where it is cut, no part of the secret stays.
    let long = log("long.log");
    assert!(long.len() >= 1_048_570 && long.trim_start_matches('x').is_empty());
    assert_secret(&project, &ended);
}

#[test]
fn a_failed_run_is_told_with_what_failed_and_stays_as_it_was() {
    let hooks = "  bad: { on: [failed], command: [sh, -c, 'cat > bad.json; exit 3'] }
  all: { on: [finished, failed], command: [sh, -c, 'cat > all.json'] }
  gone: { command: [./no-such-program] }
";
    let project = project(hooks, FAILS);
    let ended = run(&project, &[]);
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    let json = told(&project, "bad.json");
    assert_eq!(
        (&json["event"], &json["status"]),
        (&"failed".into(), &"failed".into())
    );
    let failure = &json["failures"][0];
    assert_eq!(
        (&failure["step"], &failure["kind"]),
        (&"break".into(), &"run".into())
    );
    assert!(failure["why"].as_str().unwrap().contains("no luck"));
    assert_eq!(told(&project, "all.json")["event"], "failed");
    for words in [
        "hook `bad`: `sh` failed (exit status: 3)",
        "hook `gone`: `./no-such-program`",
    ] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
    // Nor does a hook that fails make a good run a bad one.
    project.edit("p.yaml", "exit 7", "exit 0");
    project.edit("p.yaml", "cat > all.json", "cat > all.json; exit 9");
    let ended = run(&project, &[]).ok();
    assert_eq!(told(&project, "all.json")["event"], "finished");
    assert!(
        ended
            .stderr
            .contains("hook `all`: `sh` failed (exit status: 9)")
    );
}

#[test]
fn a_command_that_takes_too_long_is_ended_with_what_it_started() {
    let hooks =
        "  slow: { timeout: 300ms, command: [sh, -c, 'sleep 600 & echo $! > pid; wait'] }\n";
    let project = project(hooks, "");
    let ended = run(&project, &[]).ok();
    assert!(
        ended.stderr.contains("took longer than its `timeout`"),
        "{}",
        ended.stderr
    );
    let pid = project.read("pid");
    let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    // Killed, and perhaps not reaped by its new parent yet.
    assert!(!status.is_ok_and(|status| !status.contains(") Z ")));
}

#[test]
fn a_hook_may_run_a_pipeline_on_the_same_cache() {
    let hooks = format!(
        "  next: {{ command: [{}, other.yaml, --no-wait] }}\n",
        env!("CARGO_BIN_EXE_flowrun")
    );
    let project = project(&hooks, "");
    project.write(
        "other.yaml",
        "steps:\n  a: { run: 'echo x > \"$out\"', out: { out: o }, publish: { out: other.txt } }\n",
    );
    let ended = run(&project, &[]).ok();
    assert_eq!(
        ended.stderr.matches("warning").count(),
        0,
        "{}",
        ended.stderr
    );
    assert_eq!(project.read("other.txt"), "x\n");
    std::fs::remove_file(project.path("other.txt")).unwrap();
    run(&project, &[]).ok();
    assert_eq!(project.read("other.txt"), "x\n");
}

#[test]
fn a_webhook_is_tried_again_and_its_secrets_stay_secret() {
    let server = Receiver::start(|before, _| match before {
        0 => (503, String::new()),
        _ => (200, "{}".to_owned()),
    });
    let hooks = format!(
        "  chat:
    secrets: [HOOK_TOKEN]
    webhook:
      url: {}/hooks/${{HOOK_TOKEN}}
      headers: {{ authorization: 'Bearer ${{HOOK_TOKEN}}', x-plain: yes-please }}
",
        server.url
    );
    let project = project(&hooks, FAILS);
    let ended = run(&project, &[]);
    assert_eq!(ended.code, Some(4));
    assert!(!ended.stderr.contains("hook `chat`"), "{}", ended.stderr);
    let sent = server.sent();
    assert_eq!(sent.len(), 2);
    for one in &sent {
        assert_eq!(
            (one.method.as_str(), &one.path),
            ("POST", &format!("/hooks/{SECRET}"))
        );
        assert_eq!(one.headers["authorization"], format!("Bearer {SECRET}"));
        assert_eq!(one.headers["x-plain"], "yes-please");
        assert_eq!(one.headers["content-type"], "application/json");
        assert_eq!(
            one.headers["idempotency-key"],
            sent[0].headers["idempotency-key"]
        );
        assert_eq!(one.json()["status"], "failed");
        assert_eq!(one.json()["failures"][0]["step"], "break");
    }
    assert_secret(&project, &ended);
}

#[test]
fn a_webhook_that_is_refused_is_a_warning_without_its_secret() {
    let server = Receiver::start(|_, sent| (404, sent.path.clone()));
    let nobody = free_port();
    let hooks = format!(
        "  refused:
    secrets: [HOOK_TOKEN]
    webhook: {{ url: '{}/${{HOOK_TOKEN}}' }}
  nobody:
    secrets: [HOOK_TOKEN]
    webhook: {{ url: 'http://127.0.0.1:{nobody}/${{HOOK_TOKEN}}', retries: 1 }}
  far: {{ webhook: {{ url: 'https://example.invalid/' }} }}
",
        server.url
    );
    let project = project(&hooks, "");
    let ended = run(&project, &["--offline"]).ok();
    let said = &ended.stderr;
    assert!(
        said.contains(&format!("hook `refused`: {} answered 404", server.url)),
        "{said}"
    );
    // What will not pass is not tried again.
    assert_eq!(server.sent().len(), 1);
    assert!(
        said.contains(&format!("hook `nobody`: http://127.0.0.1:{nobody}: ")),
        "{said}"
    );
    assert!(said.contains("(2 tries)"), "{said}");
    assert!(
        said.contains("hook `far`: https://example.invalid was not told"),
        "{said}"
    );
    assert_secret(&project, &ended);
}

#[test]
fn a_secret_that_is_not_set_is_told_before_anything_runs() {
    let project = project(
        "  chat: { secrets: [HOOK_TOKEN], command: [\"true\"] }\n",
        "",
    );
    let ended = project.run(&["p.yaml"]);
    assert_eq!(ended.code, Some(3));
    assert!(
        ended.stderr.contains("the secret `HOOK_TOKEN` is not set"),
        "{}",
        ended.stderr
    );
}
