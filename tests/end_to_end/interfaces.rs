//! What other programs and people at a terminal read: events, completions, the manual, plain and
//! drawn output.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::project::{Project, Run};
use crate::required::skip;
use crate::terminal::on_a_terminal;

const FAN: &str = "\
name: fan
steps:
  make:
    foreach: { n: [1, 2, 3] }
    run: echo ${{ item.n }} > \"$out\"
    out: { out: out.txt }
  gone:
    when: \"false\"
    run: echo > \"$out\"
    out: { out: out.txt }
  bad:
    run: echo it broke >&2; exit 7
    in: { parts: make.out }
    out: { out: out.txt }
  behind:
    run: cat \"$x\" > \"$out\"
    in: { x: bad.out }
    out: { out: out.txt }
";

#[test]
fn global_options_stand_before_or_behind_a_command_and_those_of_a_run_do_not() {
    let project = Project::shell();
    project.run(&["pipeline.yaml"]).ok();
    for args in [&["--json", "runs"], &["runs", "--json"]] {
        assert_eq!(project.run(args).ok().events().len(), 1);
    }
    let elsewhere = project.run(&["--cache-dir", "other", "plan", "pipeline.yaml"]);
    assert!(elsewhere.ok().stdout.contains("never ran"));
    let refused = project.run(&["--force", "plan", "pipeline.yaml"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
}

#[test]
fn every_event_is_as_the_schema_and_the_page_say() {
    let project = Project::new();
    project.write("pipeline.yaml", FAN);
    let failed = project.run(&["pipeline.yaml", "--json", "--keep-going"]);
    assert_eq!(failed.code, Some(4), "{}", failed.stderr);
    let again = project.run(&["pipeline.yaml", "--json"]);
    let data = Project::new();
    data.write("rows.csv", "text,label\na,x\nb,y\n");
    data.write(
        "pipeline.yaml",
        "name: d\nsteps:\n  load:\n    uses: load\n    with:\n      name: nothing\n      stand_in: true\n      train: { url: \"http://127.0.0.1:9/a\", sha256: 0000000000000000000000000000000000000000000000000000000000000000 }\n      test: { url: \"http://127.0.0.1:9/b\", sha256: 0000000000000000000000000000000000000000000000000000000000000000 }\n",
    );
    let warned = data.run(&["pipeline.yaml", "--json", "--offline"]).ok();

    let schema: Value =
        serde_json::from_str(&project.run(&["schema", "--events"]).ok().stdout).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/events.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut seen = BTreeSet::new();
    for event in [&failed, &again, &warned]
        .iter()
        .flat_map(|run| run.events())
    {
        let errors: Vec<String> = schema.iter_errors(&event).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{event}: {errors:?}");
        let name = event["event"].as_str().unwrap().to_owned();
        let (_, section) = page.split_once(&format!("### `{name}`")).unwrap();
        let section = section.split("\n### ").next().unwrap();
        for field in event.as_object().unwrap().keys().filter(|f| *f != "event") {
            assert!(
                section.contains(&format!("`{field}`")),
                "docs/events.md: {name}.{field}"
            );
        }
        seen.insert(name);
    }
    for name in [
        "run_started",
        "step_expanded",
        "step_started",
        "step_finished",
        "warning",
        "run_finished",
    ] {
        assert!(seen.contains(name), "{name}: {seen:?}");
    }
    for status in ["ran", "cached", "failed", "skipped"] {
        assert!(page.contains(&format!("`{status}`")), "{status}");
    }
    let events = failed.events();
    assert_eq!(events.first().unwrap()["event"], "run_started");
    let last = events.last().unwrap();
    assert_eq!(last["event"], "run_finished");
    let counts = ["ran", "cached", "failed", "skipped"].map(|n| last[n].as_u64().unwrap());
    assert_eq!(counts, [3, 0, 1, 2], "{last}");
    assert_eq!(failed.steps("skipped"), ["gone", "behind"]);
    let wrong = serde_json::json!({ "event": "step_finished", "step": 1 });
    assert!(!schema.is_valid(&wrong), "the schema refuses something");
}

#[test]
fn the_schema_of_events_is_current() {
    let project = Project::new();
    let schema = project.run(&["schema", "--events"]).ok().stdout;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/events.schema.json");
    let kept = std::fs::read_to_string(path).unwrap();
    assert!(
        kept == schema,
        "run `cargo run -- schema --events > schemas/events.schema.json`"
    );
}

#[test]
fn the_shell_completes_steps_runs_and_kinds() {
    let project = Project::shell();
    project.run(&["pipeline.yaml", "--json"]).ok();
    let script = project.run(&["completions", "bash"]).ok().stdout;
    assert!(script.contains("FLOWRUN_COMPLETE"), "{script}");
    for shell in ["zsh", "fish", "powershell", "elvish"] {
        assert!(!project.run(&["completions", shell]).ok().stdout.is_empty());
    }
    // As the script of bash asks.
    let complete = |words: &[&str]| -> Vec<String> {
        let args = [&["--", "flowrun"], words].concat();
        let mut command = project.command(&args);
        command
            .env("FLOWRUN_COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", words.len().to_string())
            .env("_CLAP_IFS", "\n");
        let run = Run::of(command.output().unwrap()).ok();
        run.stdout.split('\n').map(str::to_owned).collect()
    };
    let has = |words: &[&str], wanted: &str| {
        let found = complete(words);
        assert!(found.iter().any(|w| w == wanted), "{words:?}: {found:?}");
    };
    has(&["--from", ""], "count");
    has(&["why", "s"], "strip");
    has(&["steps", "fin"], "finetune");
    project.write(
        "other.yaml",
        "name: o\nsteps:\n  elsewhere:\n    run: echo > \"$out\"\n    out: { out: out }\n",
    );
    has(&["other.yaml", "--from", ""], "elsewhere");
    has(
        &["--cache-dir=x", "other.yaml", "--until", "else"],
        "elsewhere",
    );
    has(&["cache", ""], "verify");
    let run = project.run(&["runs", "--json"]).events()[0]["run"].clone();
    has(&["show", ""], run.as_str().unwrap());
}

#[test]
fn a_full_output_is_an_error_with_a_message() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else {
        skip("dev-full", "there is no /dev/full");
        return;
    };
    let project = Project::shell();
    project.run(&["pipeline.yaml"]).ok();
    let commands: [&[&str]; 7] = [
        &["pipeline.yaml", "--json"],
        &["pipeline.yaml", "--json", "--force"],
        &["runs"],
        &["show"],
        &["graph"],
        &["steps"],
        &["schema"],
    ];
    for args in commands {
        let mut command = project.command(args);
        let run = command.stdout(full.try_clone().unwrap()).output().unwrap();
        let run = Run::of(run);
        assert_eq!(run.code, Some(1), "{args:?}: {}", run.stderr);
        assert!(
            run.stderr.contains("No space left on device"),
            "{args:?}: {}",
            run.stderr
        );
        assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
    }
    assert_eq!(project.run(&["runs", "--json"]).ok().events().len(), 3);
}

#[test]
fn a_step_kind_is_described_down_to_its_nested_params() {
    let project = Project::new();
    let kinds = project.kinds();
    assert!(
        kinds.contains(&"finetune".to_owned()) && kinds.len() > 10,
        "{kinds:?}"
    );
    for kind in &kinds {
        let text = project.run(&["steps", kind]).ok().stdout;
        assert!(
            text.contains("outputs:") && text.contains(&format!("uses: {kind}")),
            "{text}"
        );
        let json = project.run(&["steps", kind, "--json"]).ok().events();
        assert_eq!(json[0]["kind"], *kind);
    }
    let text = project.run(&["steps", "finetune"]).ok().stdout;
    for part in [
        "lora.rank  integer, default 16",
        "model  name in `models`, required",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let unknown = project.run(&["steps", "fintune"]);
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("finetune"), "{}", unknown.stderr);
}

#[test]
fn the_manual_has_every_command() {
    let project = Project::new();
    let page = project.run(&["man"]).ok().stdout;
    assert!(page.starts_with(".ie") || page.contains(".TH"), "{page}");
    for word in [
        "why",
        "lineage",
        "doctor",
        "FLOWRUN_CACHE_MAX_SIZE",
        "Exit codes",
    ] {
        assert!(page.replace('\\', "").contains(word), "{word}");
    }
    project.run(&["man", "--dir", "man1"]).ok();
    assert!(project.read("man1/flowrun-cache-gc.1").contains("dry"));
}

#[test]
fn piped_output_is_plain() {
    let project = Project::new();
    project.write("pipeline.yaml", FAN);
    let run = project.run(&["pipeline.yaml", "--keep-going"]);
    assert!(!run.stderr.contains('\u{1b}'), "{}", run.stderr);
    assert!(run.stdout.is_empty(), "{}", run.stdout);
    for part in ["error: bad: ", "it broke", "failed  bad", "skipped behind"] {
        assert!(run.stderr.contains(part), "{part} in\n{}", run.stderr);
    }
}

#[test]
fn the_rest_of_a_run_is_estimated_when_only_files_changed() {
    let project = Project::new();
    project.write("text.txt", "one");
    project.write(
        "pipeline.yaml",
        "\
steps:
  first:
    run: sleep 1.2; cat \"$text\" > \"$x\"
    in: { text: { file: text.txt } }
    out: { x: x.txt }
  second:
    run: sleep 1.2; cat \"$x\"
    in: { x: first.x }
",
    );
    let run = || on_a_terminal(&project, "pipeline.yaml", "", &[]);
    let Some(first) = run() else {
        return;
    };
    assert!(!first.contains("ETA"), "nothing is known yet: {first:?}");
    project.write("text.txt", "two");
    let again = run().unwrap();
    assert!(again.contains("running, ETA"), "{again:?}");
}

#[test]
fn a_terminal_gets_bars_and_colour_unless_it_says_no() {
    let project = Project::new();
    project.write("pipeline.yaml", FAN);
    let run = "pipeline.yaml --force --keep-going";
    let Some(drawn) = on_a_terminal(&project, run, "", &[]) else {
        return;
    };
    let colour = "\u{1b}[31m";
    assert!(
        drawn.contains("running") && drawn.contains(colour),
        "{drawn:?}"
    );
    let last = drawn.rsplit("\r\n\r\n").next().unwrap();
    assert!(
        last.contains("bad") && last.contains("record in"),
        "{last:?}"
    );
    let plain = on_a_terminal(&project, run, "", &[("NO_COLOR", "1")]).unwrap();
    assert!(plain.contains("running"), "bars have no colour: {plain:?}");
    assert!(
        !plain.contains(colour) && !plain.contains("\u{1b}[32m"),
        "{plain:?}"
    );
    for env in [("TERM", "dumb"), ("CI", "true")] {
        let lines = on_a_terminal(&project, run, "", &[env]).unwrap();
        assert!(lines.contains("make[1]: started"), "{env:?}: {lines:?}");
        assert!(
            !lines.contains("\u{1b}[1A"),
            "{env:?} moves the cursor: {lines:?}"
        );
    }
}
