//! Runs of toy pipelines, each with the cache opened and closed as a program would.
#![allow(clippy::unwrap_used)]

mod cached;
mod damage;
mod failure;
mod fan_out;
mod order;
mod publishing;
mod random;
mod shell;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use crate::event::RunEvent;
use crate::record::RunRecord;
use crate::step::{StepOutcome, TraceSpan};
use crate::testing::{Bench, Toy, node, uses};

/// a → b → d, a → c → d.
fn diamond(text: &str) -> Vec<crate::pipeline::StepNode> {
    vec![
        node("a").text(text),
        node("b").text("b").input("x", "a.out"),
        node("c").text("c").input("x", "a.out"),
        node("d").input("x", "b.out").input("y", "c.out"),
    ]
}

#[test]
fn the_events_of_a_run_are_its_record() {
    let bench = Bench::new().unwrap();
    let ran = bench.run(&diamond("a"));
    let s = &ran.summary;
    assert!(s.ok && !s.interrupted && !s.gate_failed && s.first_error.is_none());
    assert_eq!((s.ran, s.cached, s.failed, s.skipped), (4, 0, 0, 0));
    assert!(matches!(
        &ran.events[0],
        RunEvent::RunStarted { steps: 4, .. }
    ));
    assert!(matches!(
        ran.events.last(),
        Some(RunEvent::RunFinished { ok: true, .. })
    ));
    let text = std::fs::read_to_string(s.run_dir.join("events.jsonl")).unwrap();
    let lines: Vec<String> = ran
        .events
        .iter()
        .map(|e| serde_json::to_string(e).unwrap())
        .collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    let record = RunRecord::load(&s.run_dir).unwrap();
    assert_eq!((record.ok, record.steps.len()), (Some(true), 4));
    assert_eq!(record.run, s.run_id);
    let plan = RunRecord::load_plan(&s.run_dir).unwrap();
    assert_eq!(plan.steps[3].after, ["b", "c"]);
}

#[test]
fn a_step_sees_what_finished_before_it() {
    let bench = Bench::new().unwrap();
    let last = Toy::new("last", |ctx| {
        let seen: Vec<_> = ctx
            .finished
            .to_vec()
            .iter()
            .map(|s| format!("{} {} {}", s.step, s.status, s.metrics["length"]))
            .collect();
        crate::testing::write(ctx, "out", &seen.join(", "))?;
        Ok(crate::step::StepOutcome::default())
    });
    let mut steps = vec![
        node("a").text("12345"),
        node("b").input("x", "a.out"),
        uses("last", Arc::new(last)).input("x", "b.out"),
    ];
    bench.run(&steps[..2]);
    steps[1] = node("b").text("!").input("x", "a.out");
    let ran = bench.run(&steps);
    let path = ran.events.iter().find_map(|event| match event {
        RunEvent::StepFinished { step, outputs, .. } if step == "last" => {
            Some(outputs["out"].path.clone())
        }
        _ => None,
    });
    let seen = std::fs::read_to_string(path.unwrap()).unwrap();
    assert_eq!(seen, "a cached 5, b ran 10");
    assert_eq!(ran.summary.steps.len(), 3);
}

#[test]
fn progress_is_throttled_and_secrets_are_masked_everywhere() {
    let mut bench = Bench::new().unwrap();
    bench.world.env.insert("TOKEN".into(), "s3cret".into());
    let chatty = Toy::new("chatty", |ctx| {
        for i in 0..10_000 {
            ctx.reporter.progress(i, 10_000, "rows", "s3cret");
        }
        ctx.reporter.progress(10_000, 10_000, "rows", "done");
        ctx.reporter.log("log s3cret");
        ctx.reporter.warning("warn s3cret");
        Err(crate::step::StepError::failed("fail s3cret").help("help s3cret"))
    });
    let step = uses("chatty", Arc::new(chatty)).change(|s| s.secrets = vec!["TOKEN".into()]);
    let ran = bench.run(&[step]);
    let progress = |e: &&RunEvent| matches!(e, RunEvent::Progress { .. });
    let told = ran.events.iter().filter(progress).count();
    assert!((2..2_000).contains(&told), "{told}");
    let last = ran.events.iter().rfind(progress);
    assert!(matches!(
        last,
        Some(RunEvent::Progress { done: 10_000, .. })
    ));
    let log = std::fs::read_to_string(ran.summary.run_dir.join("logs/chatty.log")).unwrap();
    assert_eq!(log, "log ***\nwarning: warn ***\n");
    let events = std::fs::read_to_string(ran.summary.run_dir.join("events.jsonl")).unwrap();
    assert!(
        !events.contains("s3cret") && events.contains("fail ***") && events.contains("help ***")
    );
    assert_eq!(ran.summary.first_error.unwrap().1.message, "fail ***");
}

#[test]
fn spans_are_told_to_those_who_trace_and_are_in_no_record() {
    let mut bench = Bench::new().unwrap();
    let toy = Toy::new("toy", |ctx| {
        let told = ctx.reporter.traces();
        ctx.reporter.span(TraceSpan {
            name: "unmistakable".to_owned(),
            started_at: ctx.started_at,
            took: Duration::ZERO,
            failed: None,
            attributes: BTreeMap::new(),
        });
        crate::testing::write(ctx, "out", &told.to_string())?;
        Ok(StepOutcome::default())
    });
    let step = uses("toy", Arc::new(toy));
    for traced in [true, false] {
        bench.options.traced = traced;
        bench.options.force = true;
        let ran = bench.run(std::slice::from_ref(&step));
        let spans = ran.events.iter().filter(|event| {
            matches!(event, RunEvent::Span { step, span } if step == "toy" && span.name == "unmistakable")
        });
        assert_eq!(spans.count(), usize::from(traced));
        let events = std::fs::read_to_string(ran.summary.run_dir.join("events.jsonl")).unwrap();
        assert!(!events.contains("unmistakable"), "{events}");
        assert!(ran.summary.ok);
    }
}

#[test]
fn a_report_is_copied_to_the_run() {
    let bench = Bench::new().unwrap();
    let mut report = Toy::join();
    report.outputs[0].ty = "report".into();
    let steps = [uses("report", Arc::new(report)).text("<html>")];
    for _ in 0..2 {
        let run = bench.run(&steps).summary.run_dir;
        assert_eq!(
            std::fs::read_to_string(run.join("report.html")).unwrap(),
            "<html>"
        );
    }
}

#[test]
fn jobs_pools_and_max_parallel_bound_what_runs_at_once() {
    let running = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let most = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (now, peak) = (Arc::clone(&running), Arc::clone(&most));
    let busy = Arc::new(Toy::new("busy", move |ctx| {
        peak.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(5));
        now.fetch_sub(1, Ordering::SeqCst);
        crate::testing::write(ctx, "out", "")?;
        Ok(crate::step::StepOutcome::default())
    }));
    let peak_of = |jobs: usize, change: fn(&mut crate::pipeline::StepNode)| {
        let mut bench = Bench::new().unwrap();
        bench.options.jobs = jobs;
        most.store(0, Ordering::SeqCst);
        let step = uses("s", busy.clone())
            .each_value("i", json!([1, 2, 3, 4, 5, 6, 7, 8]))
            .with(json!({ "i": "${{ item.i }}" }))
            .change(change);
        assert_eq!(bench.run(&[step]).summary.ran, 8);
        most.load(Ordering::SeqCst)
    };
    assert!((2..=3).contains(&peak_of(3, |_| {})));
    assert_eq!(peak_of(1, |_| {}), 1);
    assert_eq!(peak_of(8, |s| s.pool = Some("one".into())), 1);
    assert_eq!(peak_of(8, |s| s.resources.gpu = 0.6), 1);
    let two = |s: &mut crate::pipeline::StepNode| {
        s.level_mut().max_parallel = Some(2);
    };
    assert!(peak_of(8, two) <= 2);
}

#[test]
fn a_step_that_does_not_exist_is_named_with_those_that_do() {
    let mut bench = Bench::new().unwrap();
    bench.options.from = Some("e".into());
    let pipeline = crate::testing::pipeline(diamond("a"));
    let error = super::Selection::of(&pipeline, &bench.options).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the pipeline has no step `e`; it has a, b, c, d"
    );
}
