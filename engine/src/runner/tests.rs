//! Real processes: this test binary, started again as the other end.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr
)]

use std::io::Write;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

use flowrun_cache::CompletionCache;
use serde_json::json;

use super::*;
use crate::step::{Cancel, Finished, InputArtifact, StepReporter, TraceSpan};
use crate::testing::{Toy, write};
use crate::vocabulary::Vocabulary;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Says that this process is the other end.
const CHILD: &str = "FLOWRUN_TEST_STEP_EXEC";

/// Does as `do` says.
fn toy() -> Arc<dyn Step> {
    Arc::new(Toy::new("toy", |ctx| {
        match ctx.params["do"].as_str().unwrap_or_default() {
            "abort" => {
                eprintln!("about to abort");
                std::process::abort();
            }
            "panic" => panic!("at the disco"),
            "fail" => {
                let error = StepError::new(crate::step::StepErrorKind::Transient, "busy");
                return Err(error.help("later"));
            }
            "eat" => {
                let mut hoard = Vec::new();
                for _ in 0..4096 {
                    hoard.push(vec![1u8; 1 << 20]);
                }
                return Err(StepError::failed(format!("ate {} MiB", hoard.len())));
            }
            "wait" => loop {
                ctx.check_cancelled()?;
                ctx.reporter.progress(1, 2, "naps", "");
                std::thread::sleep(Duration::from_millis(5));
            },
            "hang" => loop {
                ctx.reporter.progress(1, 2, "naps", "");
                std::thread::sleep(Duration::from_millis(100));
            },
            "trace" if ctx.reporter.traces() => ctx.reporter.span(TraceSpan {
                name: "chat toy".to_owned(),
                started_at: ctx.started_at,
                took: Duration::from_millis(5),
                failed: None,
                attributes: BTreeMap::from([("rows".to_owned(), json!(3))]),
            }),
            _ => {}
        }
        ctx.reporter.progress(3, 3, "rows", "text");
        ctx.reporter.warning("beware");
        ctx.reporter.log("a line");
        println!("a stray line");
        let text = std::fs::read_to_string(&ctx.input("x")?.path).unwrap();
        let secret = ctx.world.env.get("TOKEN").cloned().unwrap_or_default();
        write(ctx, "out", &format!("{text}{secret}"))?;
        Ok(StepOutcome::default()
            .metric("rows", 3)
            .metric("observed", json!(ctx.observed))
            .metric("at_once", ctx.at_once)
            .list("l", vec!["a".into()]))
    }))
}

#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    // The harness leaves its own line open.
    println!();
    let host = Host {
        vocabulary: Vocabulary {
            steps: BTreeMap::from([("toy".to_owned(), toy())]),
            ..Vocabulary::default()
        },
        env: std::env::vars().collect(),
        exe: PathBuf::new(),
    };
    let mut output = std::io::stdout();
    output.flush().unwrap();
    exec(host, std::io::stdin(), output, || std::process::exit(9)).unwrap();
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl StepReporter for Heard {
    fn progress(&self, done: u64, total: u64, unit: &str, text: &str) {
        self.log(&format!("{done}/{total} {unit} {text}"));
    }
    fn warning(&self, text: &str) {
        self.log(&format!("warning: {text}"));
    }
    fn log(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
    fn traces(&self) -> bool {
        true
    }
    fn span(&self, span: TraceSpan) {
        let attributes = serde_json::to_string(&span.attributes).unwrap();
        self.log(&format!("{} {:?} {attributes}", span.name, span.took));
    }
}

struct Ran {
    result: Result<StepOutcome, StepError>,
    heard: Vec<String>,
    dir: tempfile::TempDir,
}

fn run(what: &str, memory: u64, cancel: &Cancel) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let exe = std::env::current_exe().unwrap();
    let exe = exe.to_str().unwrap();
    let args = [
        "--exact",
        "runner::tests::child",
        "--nocapture",
        "--test-threads=1",
    ];
    let flag = format!("{CHILD}=1");
    let args: Vec<&str> = [flag.as_str(), exe].into_iter().chain(args).collect();
    let runner = Process::with_args(std::path::Path::new("/usr/bin/env"), &args, memory);
    let heard = Arc::new(Heard::default());
    let input = dir.path().join("x");
    std::fs::write(&input, "input ").unwrap();
    std::fs::create_dir(dir.path().join("out")).unwrap();
    let ctx = StepContext {
        step: "s".into(),
        params: json!({ "do": what }),
        observed: BTreeMap::from([("file".to_owned(), json!("a digest"))]),
        world: World {
            env: BTreeMap::from([("TOKEN".to_owned(), "secret".to_owned())]),
            ..World::default()
        },
        inputs: BTreeMap::from([(
            "x".to_owned(),
            vec![InputArtifact {
                path: input,
                digest: flowrun_cache::Digest::of_bytes(b"input "),
                label: "x".into(),
            }],
        )]),
        out_dir: dir.path().join("out"),
        work_dir: dir.path().join("work"),
        resume_path: dir.path().join("resume"),
        run_path: dir.path().join("run"),
        started_at: SystemTime::UNIX_EPOCH,
        completions: Arc::new(CompletionCache::in_memory()),
        actions: flowrun_cache::ActionCache::open(dir.path().join("actions")),
        finished: Finished::default(),
        at_once: 3,
        reporter: heard.clone(),
        cancel: cancel.clone(),
    };
    let result = runner.run(toy().as_ref(), &ctx);
    let heard = heard.0.lock().unwrap().clone();
    Ran { result, heard, dir }
}

#[test]
fn the_outcome_and_all_reports_come_back() {
    let ran = run("", 0, &Cancel::default());
    let outcome = ran.result.unwrap();
    assert_eq!(outcome.metrics["rows"], 3);
    assert_eq!(outcome.metrics["at_once"], 3);
    assert_eq!(outcome.metrics["observed"], json!({"file": "a digest"}));
    assert_eq!(outcome.lists["l"], ["a"]);
    for line in ["3/3 rows text", "warning: beware", "a line", "a stray line"] {
        assert!(
            ran.heard.iter().any(|l| l == line),
            "{line}: {:?}",
            ran.heard
        );
    }
    let out = std::fs::read_to_string(ran.dir.path().join("out/out")).unwrap();
    assert_eq!(out, "input secret");
}

#[test]
fn spans_come_back() {
    let ran = run("trace", 0, &Cancel::default());
    let span = r#"chat toy 5ms {"rows":3}"#;
    assert!(ran.heard.iter().any(|l| l == span), "{:?}", ran.heard);
}

#[test]
fn a_failure_keeps_its_kind_and_help_and_a_panic_is_one() {
    let error = run("fail", 0, &Cancel::default()).result.unwrap_err();
    assert_eq!(error.kind, crate::step::StepErrorKind::Transient);
    assert_eq!(
        (error.message.as_str(), error.help.as_deref()),
        ("busy", Some("later"))
    );
    let ran = run("panic", 0, &Cancel::default());
    assert_eq!(
        ran.result.unwrap_err().message,
        "the step panicked: at the disco"
    );
    assert!(
        ran.heard.iter().any(|l| l.contains("at the disco")),
        "{:?}",
        ran.heard
    );
}

#[test]
fn a_crash_is_a_failure_with_its_last_words() {
    let error = run("abort", 0, &Cancel::default()).result.unwrap_err();
    assert_eq!(error.kind, crate::step::StepErrorKind::Failed);
    assert!(error.message.contains("signal: 6"), "{}", error.message);
    assert!(
        error.message.contains("about to abort"),
        "{}",
        error.message
    );
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_bounded() {
    let error = run("eat", 400_000_000, &Cancel::default())
        .result
        .unwrap_err();
    assert_eq!(
        error.message,
        "needs more memory than its `resources.memory` of 400 MB"
    );
}

#[test]
fn work_that_is_asked_to_stop_stops_and_work_that_does_not_is_killed() {
    for (what, at_least) in [("wait", Duration::ZERO), ("hang", process::GRACE)] {
        let cancel = Cancel::default();
        let soon = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            soon.cancel();
        });
        let started = Instant::now();
        let ran = run(what, 0, &cancel);
        thread.join().unwrap();
        let error = ran.result.unwrap_err();
        assert_eq!(error.kind, crate::step::StepErrorKind::Cancelled, "{what}");
        assert!(started.elapsed() >= at_least, "{what}");
    }
}

#[test]
fn what_is_no_request_is_told() {
    let host = Host {
        vocabulary: Vocabulary::default(),
        env: BTreeMap::new(),
        exe: PathBuf::new(),
    };
    let error = exec(host, "nonsense".as_bytes(), std::io::sink(), || {}).unwrap_err();
    assert!(error.to_string().contains("no request"), "{error}");
}
