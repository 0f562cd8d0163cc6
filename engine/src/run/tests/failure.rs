//! Failures, retries, gates, time limits and interruptions.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::diamond;
use crate::event::RunEvent;
use crate::pipeline::{Retry, StepNode};
use crate::step::{Cancel, Port, StepError, StepErrorKind, StepOutcome};
use crate::testing::{Bench, Toy, node, uses, write};

fn failing(name: &str) -> StepNode {
    uses(
        name,
        Arc::new(Toy::new("failing", |_| {
            Err(StepError::failed("no").help("do this"))
        })),
    )
}

#[test]
fn a_failure_stops_the_run_or_only_its_cone() {
    let mut bench = Bench::new().unwrap();
    bench.options.jobs = 1;
    let steps = [
        failing("bad"),
        node("behind").input("x", "bad.out"),
        node("after").change(|s| s.needs = vec!["behind".into()]),
        node("other").text("o"),
        node("more").input("x", "other.out"),
    ];
    let ran = bench.run(&steps);
    assert_eq!(
        ran.ends(),
        [
            "after skipped",
            "bad failed",
            "behind skipped",
            "more skipped",
            "other skipped"
        ]
    );
    assert_eq!(ran.why("more"), "the run stopped after `bad` failed");
    assert_eq!(ran.why("behind"), "needs `bad`, which did not finish");
    let s = &ran.summary;
    assert!(!s.ok && !s.interrupted && !s.gate_failed);
    assert_eq!((s.failed, s.skipped), (1, 4));
    let (id, error) = s.first_error.as_ref().unwrap();
    assert_eq!(
        (id.as_str(), error.help.as_deref()),
        ("bad", Some("do this"))
    );
    bench.options.keep_going = true;
    let ran = bench.run(&steps);
    assert_eq!(
        ran.ends(),
        [
            "after skipped",
            "bad failed",
            "behind skipped",
            "more ran",
            "other ran"
        ]
    );
    assert_eq!(ran.why("after"), "needs `behind`, which did not finish");
}

#[test]
fn only_transient_errors_are_tried_again() {
    let bench = Bench::new().unwrap();
    let flaky = |fails: u32, kind: StepErrorKind| {
        let tries = AtomicU32::new(0);
        let step = uses(
            "flaky",
            Arc::new(Toy::new("flaky", move |ctx| {
                if tries.fetch_add(1, Ordering::SeqCst) < fails {
                    return Err(StepError::new(kind, "busy"));
                }
                assert!(std::fs::read_dir(&ctx.out_dir).unwrap().next().is_none());
                write(ctx, "out", "")?;
                Ok(StepOutcome::default())
            })),
        );
        step.change(|s| {
            s.cache = crate::pipeline::CachePolicy::Never;
            s.retry = Retry {
                times: 2,
                backoff: Duration::from_millis(4),
            };
        })
    };
    let retries = |ran: &crate::testing::Ran| {
        let retry = |e: &&RunEvent| matches!(e, RunEvent::StepRetry { .. });
        ran.events.iter().filter(retry).count()
    };
    let ran = bench.run(&[flaky(2, StepErrorKind::Transient)]);
    assert!(ran.summary.ok && retries(&ran) == 2);
    let waits = ran.events.iter().filter_map(|e| match e {
        RunEvent::StepRetry {
            attempt, wait_ms, ..
        } => Some((*attempt, *wait_ms)),
        _ => None,
    });
    assert!(matches!(
        waits.collect::<Vec<_>>()[..],
        [(1, 2..=4), (2, 4..=8)]
    ));
    let ran = bench.run(&[flaky(3, StepErrorKind::Transient)]);
    assert!(!ran.summary.ok && retries(&ran) == 2);
    let ran = bench.run(&[flaky(1, StepErrorKind::Failed)]);
    assert!(!ran.summary.ok && retries(&ran) == 0);
}

#[test]
fn a_panic_is_a_failure() {
    let bench = Bench::new().unwrap();
    #[allow(clippy::panic)]
    let step = uses("bad", Arc::new(Toy::new("bad", |_| panic!("at the disco"))));
    let error = bench.run(&[step]).summary.first_error.unwrap().1;
    assert_eq!(error.message, "the step panicked: at the disco");
}

#[test]
fn an_output_that_was_not_written_is_named() {
    let bench = Bench::new().unwrap();
    let lazy = |kind| Toy::new(kind, |_| Ok(StepOutcome::default()));
    let error_of = |toy: Toy| {
        let ran = bench.run(&[uses("s", Arc::new(toy))]);
        ran.summary.first_error.unwrap().1.message
    };
    assert_eq!(
        error_of(lazy("lazy")),
        "`s` did not write its output `out` (out)"
    );
    let mut list = lazy("lazy-list");
    list.outputs[0].many = true;
    assert_eq!(
        error_of(list),
        "`s` did not say what its list output `out` holds"
    );
    let mut partial = Toy::new("partial", |_| {
        Ok(StepOutcome::default().list("out", vec!["a".into()]))
    });
    partial.outputs[0].many = true;
    assert_eq!(
        error_of(partial),
        "`s` did not write its output `out` (out/a)"
    );
}

#[test]
fn a_gate_that_is_not_met_fails_the_step_but_keeps_its_work() {
    let bench = Bench::new().unwrap();
    let join = Arc::new(Toy::join());
    let step = |gate: &str| {
        uses("s", join.clone()).text("12345").change(|s| {
            s.expect = vec![gate.into()];
            s.publish = [("out".into(), "out.txt".into())].into();
        })
    };
    let ran = bench.run(&[step("length >= 6")]);
    let s = &ran.summary;
    assert!(!s.ok && s.gate_failed && s.failed == 1);
    let (_, error) = s.first_error.as_ref().unwrap();
    assert_eq!(error.kind, StepErrorKind::Gate);
    assert_eq!(
        error.message,
        "the gate `length >= 6` was not met: the metrics are {\"length\":5}"
    );
    assert!(
        !bench.root().join("out.txt").exists(),
        "nothing is published"
    );
    assert!(!ran.digest("s", "out").is_empty());
    assert_eq!(bench.run(&[step("length >= 5")]).ends(), ["s cached"]);
    assert!(
        bench.run(&[step("length >= 6")]).summary.gate_failed,
        "cached, still not met"
    );
    assert_eq!(join.runs.load(Ordering::SeqCst), 1);
}

#[test]
fn time_up_asks_the_step_to_stop() {
    let bench = Bench::new().unwrap();
    let slow = Toy::new("slow", |ctx| {
        loop {
            ctx.check_cancelled()?;
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let step = uses("slow", Arc::new(slow)).change(|s| s.timeout = Some(Duration::from_millis(50)));
    let ran = bench.run(&[step]);
    assert_eq!(ran.ends(), ["slow failed"]);
    assert_eq!(ran.why("slow"), "took longer than its `timeout` of 50ms");
    assert!(!ran.summary.interrupted);
}

#[test]
fn an_interrupted_run_keeps_what_finished_and_the_next_goes_on() {
    let mut bench = Bench::new().unwrap();
    bench.options.jobs = 2;
    let waits = Arc::new(Mutex::new(true));
    let still = Arc::clone(&waits);
    let slow = Arc::new(Toy::new("slow", move |ctx| {
        while *still.lock().unwrap() {
            ctx.check_cancelled()?;
            std::thread::sleep(Duration::from_millis(1));
        }
        write(ctx, "out", "slow")?;
        Ok(StepOutcome::default())
    }));
    let steps = [
        node("quick").text("q"),
        uses("slow", slow).input("x", "quick.out"),
        node("last").input("x", "slow.out"),
    ];
    let cancel = bench.cancel.clone();
    bench.on_event = Arc::new(Mutex::new(move |event: &RunEvent| {
        if matches!(event, RunEvent::StepStarted { step, .. } if step == "slow") {
            cancel.cancel();
        }
    }));
    let ran = bench.run(&steps);
    assert_eq!(ran.ends(), ["last skipped", "quick ran", "slow skipped"]);
    let s = &ran.summary;
    assert!(s.interrupted && !s.ok && s.first_error.is_none() && s.failed == 0);
    assert_eq!(ran.why("slow"), "stopped before it finished");
    bench.cancel = Cancel::default();
    bench.on_event = Arc::new(Mutex::new(|_: &RunEvent| {}));
    *waits.lock().unwrap() = false;
    assert_eq!(
        bench.run(&steps).ends(),
        ["last ran", "quick cached", "slow ran"]
    );
}

#[test]
fn a_run_cancelled_before_it_begins_does_nothing() {
    let bench = Bench::new().unwrap();
    bench.cancel.cancel();
    let ran = bench.run(&diamond("a"));
    assert!(ran.summary.interrupted && ran.summary.skipped == 4);
    assert_eq!(ran.why("a"), "the run was interrupted");
}

#[test]
fn a_step_that_says_cancelled_on_its_own_has_failed() {
    let bench = Bench::new().unwrap();
    let liar = Toy::new("liar", |_| Err(StepError::cancelled()));
    let ran = bench.run(&[uses("liar", Arc::new(liar))]);
    assert_eq!((ran.summary.failed, ran.summary.interrupted), (1, false));
}

/// Asks a run to stop while it reads the pipe; false when it never reads it.
fn stop_when_read(pipe: &Path, cancel: &Cancel, is_over: &AtomicBool) -> bool {
    let mut writing = OpenOptions::new();
    // Without a reader this is an error at once.
    writing.write(true).custom_flags(nix::libc::O_NONBLOCK);
    while !is_over.load(Ordering::SeqCst) {
        if let Ok(writer) = writing.open(pipe) {
            cancel.cancel();
            // Now the reader sees the end.
            drop(writer);
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

#[test]
fn a_run_that_is_stopped_while_it_publishes_publishes_nothing_of_the_step() {
    let mut bench = Bench::new().unwrap();
    let mut three = Toy::new("three", |ctx| {
        write(ctx, "a", "new")?;
        write(ctx, "b", "")?;
        write(ctx, "c", "new")?;
        Ok(StepOutcome::default())
    });
    let ports = ["a", "b", "c"];
    three.outputs = ports.map(|port| Port::new(port, "file", "")).into();
    let step = uses("three", Arc::new(three));
    let hex = bench.run(std::slice::from_ref(&step)).digest("three", "b");
    let objects = bench.cache_dir().join("objects");
    let object = objects.join(&hex[..2]).join(&hex[2..]);
    // An empty file that is read only as far as the test lets it: `a` is copied then, `c` is not.
    std::fs::remove_file(&object).unwrap();
    let made = Command::new("mkfifo").arg(&object).status().unwrap();
    assert!(made.success());
    let paths = ports.map(|port| (port.to_owned(), format!("r/{port}.txt")));
    let step = step.change(|s| s.publish = paths.into());
    let is_over = Arc::new(AtomicBool::new(false));
    let (pipe, cancel, over) = (object.clone(), bench.cancel.clone(), Arc::clone(&is_over));
    let stopper = std::thread::spawn(move || stop_when_read(&pipe, &cancel, &over));
    let ran = bench.run(std::slice::from_ref(&step));
    is_over.store(true, Ordering::SeqCst);
    assert!(stopper.join().unwrap(), "stopped between its outputs");
    assert!(ran.summary.interrupted && !ran.summary.ok);
    assert_eq!(ran.ends(), ["three skipped"]);
    let left = bench.root().join("r").exists();
    assert!(!left, "neither an output nor a copy of one, nor a folder");
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, "").unwrap();
    bench.cancel = Cancel::default();
    assert_eq!(bench.run(&[step]).ends(), ["three cached"]);
    for (port, text) in [("a", "new"), ("b", ""), ("c", "new")] {
        let path = bench.root().join(format!("r/{port}.txt"));
        assert_eq!(std::fs::read_to_string(path).unwrap(), text);
    }
}

#[test]
fn what_a_step_made_is_kept_when_the_run_is_stopped_before_it_is_published() {
    let mut bench = Bench::new().unwrap();
    let cancel = bench.cancel.clone();
    let mut two = Toy::new("two", move |ctx| {
        write(ctx, "out", "new")?;
        write(ctx, "other", "new")?;
        // The last step is done; what follows it is not.
        cancel.cancel();
        Ok(StepOutcome::default())
    });
    two.outputs.push(Port::new("other", "file", ""));
    let published = [("out", "r/out.txt"), ("other", "r/other.txt")];
    let published = published.map(|(port, path)| (port.to_owned(), path.to_owned()));
    let step = uses("two", Arc::new(two)).change(|s| s.publish = published.into());
    let ran = bench.run(std::slice::from_ref(&step));
    assert!(ran.summary.interrupted && !ran.summary.ok);
    assert_eq!(ran.ends(), ["two skipped"]);
    assert!(!bench.root().join("r").exists());
    bench.cancel = Cancel::default();
    let again = bench.run(&[step]);
    assert_eq!(again.ends(), ["two cached"], "what it made is kept");
    for name in ["r/out.txt", "r/other.txt"] {
        let text = std::fs::read_to_string(bench.root().join(name)).unwrap();
        assert_eq!(text, "new");
    }
}
