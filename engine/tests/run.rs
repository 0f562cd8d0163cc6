//! Shell steps through the whole run: cache, early cutoff, forcing, failure.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowrun_cache::{Cache, LockWait, OpenOptions};
use flowrun_engine::Diagnostics;
use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::pipeline::{Action, Pipeline, Source, StepNode};
use flowrun_engine::run::{Expressions, RunOptions, RunSummary, run};
use flowrun_engine::step::{Cancel, Port, World};
use flowrun_engine::tracking::Tracking;

fn shell(name: &str, command: &str, inputs: &[(&str, Source)]) -> StepNode {
    StepNode {
        inputs: inputs
            .iter()
            .map(|(p, s)| ((*p).to_owned(), vec![s.clone()]))
            .collect(),
        outputs: vec![Port::new("out", "file", "")],
        out_paths: BTreeMap::from([("out".to_owned(), "result.txt".to_owned())]),
        ..StepNode::new(name, Action::Run(command.into()))
    }
}

fn output(step: &str) -> Source {
    Source::Output {
        step: step.into(),
        output: "out".into(),
    }
}

/// strip (drops comments) → upper → count
fn chain(root: &Path) -> Pipeline {
    let source = Source::File(root.join("source.txt"));
    Pipeline {
        name: "chain".into(),
        about: None,
        file: root.join("chain.yaml"),
        root: root.to_owned(),
        profiles: vec![],
        params: BTreeMap::new(),
        models: BTreeMap::new(),
        pools: BTreeMap::new(),
        runners: BTreeMap::new(),
        hooks: BTreeMap::new(),
        tracking: Tracking::default(),
        uses: BTreeMap::new(),
        sources: vec![],
        warnings: Diagnostics::default(),
        steps: Vec::from(
            [
                shell(
                    "strip",
                    "grep -v '^#' \"$text\" > \"$out\"",
                    &[("text", source)],
                ),
                shell(
                    "upper",
                    "tr a-z A-Z < \"$text\" > \"$out\"",
                    &[("text", output("strip"))],
                ),
                shell(
                    "count",
                    "wc -c < \"$text\" > \"$out\"",
                    &[("text", output("upper"))],
                ),
            ]
            .map(Arc::new),
        ),
    }
}

fn options() -> RunOptions {
    RunOptions {
        from: None,
        until: None,
        only: None,
        force: false,
        jobs: 2,
        keep_going: false,
        capacity: flowrun_engine::run::Capacity::default(),
        expressions: Expressions {
            resolve_item: |value, _| Ok(value.clone()),
            eval_bool: |_, _| Ok(true),
        },
        remember: None,
        traced: false,
        remote: None,
    }
}

async fn go(
    pipeline: &Pipeline,
    options: RunOptions,
) -> (RunSummary, BTreeMap<String, StepStatus>) {
    let cache_options = OpenOptions {
        wait: LockWait::Wait,
        command: "test".into(),
        on_wait: None,
    };
    let cache = Arc::new(Cache::open(&pipeline.root.join("cache"), &cache_options).unwrap());
    let env = std::env::vars().filter(|(k, _)| k == "PATH").collect();
    let world = World {
        root: pipeline.root.clone(),
        env,
        ..World::default()
    };
    let (events, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let summary = run(
        Arc::new(pipeline.clone()),
        cache,
        world,
        options,
        Cancel::default(),
        events,
    )
    .await
    .unwrap();
    let mut statuses = BTreeMap::new();
    while let Some(event) = heard.recv().await {
        if let RunEvent::StepFinished { step, status, .. } = event {
            statuses.insert(step, status);
        }
    }
    (summary, statuses)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rerun_does_nothing_and_equal_bytes_stop_the_wave() {
    let dir = tempfile::tempdir().unwrap();
    let pipeline = chain(dir.path());
    std::fs::write(dir.path().join("source.txt"), "# one\nhello\n").unwrap();
    let (first, _) = go(&pipeline, options()).await;
    assert!(first.ok, "{:?}", first.first_error);
    assert_eq!((first.ran, first.cached), (3, 0));
    let (second, _) = go(&pipeline, options()).await;
    assert_eq!((second.ran, second.cached), (0, 3));
    std::fs::write(dir.path().join("source.txt"), "# two\nhello\n").unwrap();
    let (third, statuses) = go(&pipeline, options()).await;
    assert_eq!((third.ran, third.cached), (1, 2));
    assert_eq!(statuses["strip"], StepStatus::Ran);
}

#[tokio::test(flavor = "multi_thread")]
async fn from_reruns_the_step_and_what_follows() {
    let dir = tempfile::tempdir().unwrap();
    let pipeline = chain(dir.path());
    std::fs::write(dir.path().join("source.txt"), "hello\n").unwrap();
    go(&pipeline, options()).await;
    let from = RunOptions {
        from: Some("upper".into()),
        ..options()
    };
    let (_, statuses) = go(&pipeline, from).await;
    assert_eq!(statuses["strip"], StepStatus::Cached);
    assert_eq!(statuses["upper"], StepStatus::Ran);
    assert_eq!(statuses["count"], StepStatus::Ran);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_shows_the_tail_and_skips_what_follows() {
    let dir = tempfile::tempdir().unwrap();
    let mut pipeline = chain(dir.path());
    std::fs::write(dir.path().join("source.txt"), "hello\n").unwrap();
    Arc::make_mut(&mut pipeline.steps[1]).action = Action::Run("echo told you >&2; exit 3".into());
    let (summary, statuses) = go(&pipeline, options()).await;
    assert!(!summary.ok);
    let (step, error) = summary.first_error.unwrap();
    assert_eq!(step, "upper");
    assert!(error.message.contains("told you"), "{}", error.message);
    assert_eq!(statuses["strip"], StepStatus::Ran);
    assert_eq!(statuses["count"], StepStatus::Skipped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_sees_only_what_it_declares() {
    let dir = tempfile::tempdir().unwrap();
    let mut pipeline = chain(dir.path());
    std::fs::write(dir.path().join("source.txt"), "hello\n").unwrap();
    Arc::make_mut(&mut pipeline.steps[1]).action =
        Action::Run("cat ../../source.txt source.txt > \"$out\"".into());
    assert!(!go(&pipeline, options()).await.0.ok);
    Arc::make_mut(&mut pipeline.steps[1]).action =
        Action::Run("env | grep -c '^CARGO' > \"$out\"; true".into());
    let (summary, _) = go(&pipeline, options()).await;
    assert!(
        !summary.ok,
        "`grep -c` finds nothing and fails under `sh -e`"
    );
}
