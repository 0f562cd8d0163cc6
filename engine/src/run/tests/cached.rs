//! What is reused and what is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::diamond;
use crate::event::RunEvent;
use crate::pipeline::{CachePolicy, StepNode};
use crate::plan::{Plan, PlanStatus};
use crate::step::{Port, StepError};
use crate::testing::{Bench, Toy, node, uses};

/// Stale for one reason.
fn stale(why: &str) -> PlanStatus {
    PlanStatus::Stale {
        why: why.into(),
        changes: vec![why.into()],
        against: None,
    }
}

/// The status of the step at this place, less the run that it was compared with.
fn status(plan: &Plan, at: usize) -> PlanStatus {
    let mut status = plan.steps[at].status.clone();
    if let PlanStatus::Stale { against, .. } = &mut status {
        *against = None;
    }
    status
}

#[test]
fn a_second_run_does_nothing() {
    let bench = Bench::new().unwrap();
    assert!(!bench.plan(&diamond("a")).is_fresh());
    bench.run(&diamond("a"));
    assert!(bench.plan(&diamond("a")).is_fresh());
    let again = bench.run(&diamond("a"));
    assert_eq!(
        again.ends(),
        ["a cached", "b cached", "c cached", "d cached"]
    );
    assert!(again.summary.ok && again.summary.cached == 4);
    assert_eq!(again.why("d"), "nothing changed");
}

#[test]
fn names_do_not_count_but_versions_params_and_env_do() {
    let bench = Bench::new().unwrap();
    let step = |name: &str| node(name).with(json!({ "text": "t", "lr": 0.1 }));
    bench.run(&[step("new-name")]);
    assert_eq!(bench.run(&[step("old-name")]).ends(), ["old-name cached"]);
    let change = |changed: StepNode, why: &str| {
        let plan = bench.plan(std::slice::from_ref(&changed));
        assert_eq!(status(&plan, 0), stale(why));
        let ran = bench.run(&[changed]);
        assert_eq!((ran.ran(), ran.why("old-name")), (vec!["old-name"], why));
        assert_eq!(bench.run(&[step("old-name")]).summary.ran, 0);
    };
    change(
        node("old-name").with(json!({ "text": "t", "lr": 0.2 })),
        "param `lr`: 0.1 → 0.2",
    );
    change(
        step("old-name").change(|s| s.env = [("X".into(), "1".into())].into()),
        "env `X`: unset → \"1\"",
    );
    let mut newer = Toy::join();
    newer.version = 2;
    change(
        uses("old-name", Arc::new(newer)).with(json!({ "text": "t", "lr": 0.1 })),
        "step kind version 1 → 2",
    );
}

#[test]
fn how_an_output_is_called_is_nothing_to_the_step_that_reads_it() {
    let bench = Bench::new().unwrap();
    let steps = |output: &'static str| {
        let mut toy = Toy::new("toy", move |ctx| {
            crate::testing::write(ctx, output, "text")?;
            Ok(crate::step::StepOutcome::default())
        });
        toy.outputs = vec![Port::new(output, "file", "")];
        let reader = node("reader").input("x", &format!("maker.{output}"));
        [uses("maker", Arc::new(toy)).text(output), reader]
    };
    bench.run(&steps("old"));
    let again = bench.run(&steps("new"));
    assert_eq!(again.ends(), ["maker ran", "reader cached"]);
    // Nor is it that a file of the project was read before.
    std::fs::write(bench.root().join("file"), "text").unwrap();
    let from_file = node("reader").input("x", "file:file");
    assert_eq!(bench.run(&[from_file]).ends(), ["reader cached"]);
}

#[test]
fn a_plan_is_sure_of_what_runs_whatever_cannot_be_seen_from_here() {
    let mut bench = Bench::new().unwrap();
    let step = |cache| {
        let far = node("a").with(json!({ "far": "there" }));
        [far.change(|s| s.cache = cache)]
    };
    let plan = bench.plan(&step(CachePolicy::Reuse));
    assert!(matches!(plan.steps[0].status, PlanStatus::Unknown { .. }));
    let plan = bench.plan(&step(CachePolicy::Never));
    assert_eq!(status(&plan, 0), stale("`cache: never`"));
    bench.options.force = true;
    let plan = bench.plan(&step(CachePolicy::Reuse));
    assert_eq!(status(&plan, 0), stale("never ran"));
    assert_eq!(bench.run(&step(CachePolicy::Reuse)).ran(), ["a"]);
    bench.options.force = false;
    let plan = bench.plan(&step(CachePolicy::Reuse));
    assert!(matches!(plan.steps[0].status, PlanStatus::Unknown { .. }));
    bench.options.from = Some("a".into());
    let plan = bench.plan(&step(CachePolicy::Reuse));
    assert_eq!(status(&plan, 0), stale("asked to run again"));
}

#[test]
fn a_change_reruns_exactly_its_cone() {
    let bench = Bench::new().unwrap();
    bench.run(&diamond("a"));
    let mut changed = diamond("a");
    changed[2] = node("c").text("C").input("x", "a.out");
    let plan = bench.plan(&changed);
    let pending = PlanStatus::Pending {
        why: "after `c`".into(),
        after: vec!["c".into()],
    };
    let why_c = stale("param `text`: \"c\" → \"C\"");
    assert_eq!(
        [0, 1, 2, 3].map(|at| status(&plan, at)),
        [PlanStatus::Fresh, PlanStatus::Fresh, why_c, pending]
    );
    let ran = bench.run(&changed);
    assert_eq!(ran.ran(), ["c", "d"]);
    assert!(
        ran.why("d").starts_with("input `y` changed ("),
        "{}",
        ran.why("d")
    );
    assert_eq!(
        bench.run(&diamond("a")).ran(),
        [""; 0],
        "the old results are still there"
    );
}

#[test]
fn equal_bytes_stop_the_wave() {
    let bench = Bench::new().unwrap();
    let upper = || {
        Arc::new(Toy::new("upper", |ctx| {
            let text = ctx.params["text"].as_str().unwrap_or_default();
            crate::testing::write(ctx, "out", &text.to_uppercase())?;
            Ok(crate::step::StepOutcome::default())
        }))
    };
    let steps = |text: &str| {
        let first = uses("a", upper()).text(text);
        [
            first,
            node("b").input("x", "a.out"),
            node("c").input("x", "b.out"),
        ]
    };
    bench.run(&steps("word"));
    assert_eq!(
        bench.run(&steps("Word")).ends(),
        ["a ran", "b cached", "c cached"]
    );
}

#[test]
fn a_changed_file_or_observed_fact_is_noticed() {
    let bench = Bench::new().unwrap();
    let file = bench.root().join("data.txt");
    let tree = bench.root().join("folder");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("a"), "1").unwrap();
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    write("one");
    let listing = Arc::new(Toy::new("listing", |ctx| {
        let names =
            std::fs::read_dir(&ctx.input("x")?.path).map_err(|e| crate::testing::io(ctx, &e))?;
        crate::testing::write(ctx, "out", &names.count().to_string())?;
        Ok(crate::step::StepOutcome::default())
    }));
    // What the work is told is what its key holds.
    let told = Arc::new(Toy::new("told", |ctx| {
        let digest = flowrun_cache::Digest::of_file(&ctx.world.root.join("data.txt"));
        let digest = digest.map_err(|e| crate::testing::io(ctx, &e))?;
        assert_eq!(ctx.observed["data.txt"], json!(digest.short()));
        crate::testing::write(ctx, "out", "told")?;
        Ok(crate::step::StepOutcome::default())
    }));
    let steps = [
        node("reads").input("x", "file:data.txt"),
        uses("watches", told).with(json!({ "watch": "data.txt" })),
        uses("tree", listing).input("x", "file:folder"),
    ];
    bench.run(&steps);
    write("one");
    assert!(bench.plan(&steps).is_fresh(), "touched, not changed");
    assert_eq!(bench.run(&steps).summary.cached, 3);
    write("two");
    std::fs::write(tree.join("b"), "2").unwrap();
    let ran = bench.run(&steps);
    assert_eq!(ran.ran(), ["reads", "tree", "watches"]);
    assert!(ran.why("reads").starts_with("input `x` changed ("));
    assert!(
        ran.why("watches").starts_with("data.txt: "),
        "{}",
        ran.why("watches")
    );
    std::fs::remove_file(&file).unwrap();
    let ran = bench.run(&steps[..1]);
    let (id, error) = ran.summary.first_error.unwrap();
    assert!(
        id == "reads" && error.message.contains("data.txt"),
        "{}",
        error.message
    );
    assert!(
        matches!(&bench.plan(&steps[..1]).steps[0].status, PlanStatus::Stale { why, .. } if why.contains("data.txt"))
    );
}

#[test]
fn never_cached_runs_each_time_and_equal_results_stop_there() {
    let bench = Bench::new().unwrap();
    let steps = [
        node("a").text("t").change(|s| s.cache = CachePolicy::Never),
        node("b").input("x", "a.out"),
    ];
    bench.run(&steps);
    let ran = bench.run(&steps);
    assert_eq!(ran.ends(), ["a ran", "b cached"]);
    assert_eq!(ran.why("a"), "`cache: never`");
    assert_eq!(status(&bench.plan(&steps), 0), stale("`cache: never`"));
}

#[test]
fn from_until_only_and_force_choose_what_runs() {
    let mut bench = Bench::new().unwrap();
    let steps = diamond("a");
    bench.options.from = Some("b".into());
    assert_eq!(
        bench.run(&steps).ran(),
        ["a", "b", "c", "d"],
        "what is missing runs"
    );
    let ran = bench.run(&steps);
    assert_eq!(ran.ends(), ["a cached", "b ran", "c cached", "d ran"]);
    assert_eq!(ran.why("b"), "asked to run again");
    assert_eq!(status(&bench.plan(&steps), 1), stale("asked to run again"));
    bench.options.until = Some("b".into());
    assert_eq!(bench.run(&steps).ends(), ["a cached", "b ran"]);
    bench.options.from = None;
    assert_eq!(bench.run(&steps).ends(), ["a cached", "b cached"]);
    bench.options.until = None;
    bench.options.only = Some("c".into());
    assert_eq!(bench.run(&steps).ends(), ["a cached", "c ran"]);
    bench.options.only = None;
    bench.options.force = true;
    assert_eq!(bench.run(&steps).summary.ran, 4);
}

#[test]
fn published_files_are_put_back_when_missing_or_changed_even_with_the_same_times() {
    let bench = Bench::new().unwrap();
    let steps = [
        node("a")
            .text("right")
            .change(|s| s.publish = [("out".into(), "results/a.txt".into())].into()),
        uses("w", Arc::new(Toy::words()))
            .text("one two")
            .change(|s| s.publish = [("out".into(), "results/words".into())].into()),
    ];
    bench.run(&steps);
    let path = bench.root().join("results/a.txt");
    let read = || std::fs::read_to_string(&path).unwrap();
    assert_eq!(read(), "right");
    assert_eq!(
        std::fs::read_to_string(bench.root().join("results/words/two")).unwrap(),
        "two"
    );
    let times = std::fs::metadata(&path).unwrap().modified().unwrap();
    std::fs::write(&path, "wrong").unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(times).unwrap();
    assert_eq!(bench.run(&steps).summary.cached, 2);
    assert_eq!(read(), "right");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    bench.run(&steps);
    assert_eq!(read(), "right");
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    bench.run(&steps);
    assert_eq!(
        std::fs::metadata(&path).unwrap().modified().unwrap(),
        before,
        "left alone"
    );
    let bad = node("a").change(|s| s.publish = [("out".into(), "../a".into())].into());
    assert!(!bench.run(&[bad]).summary.ok);
}

#[test]
fn what_an_earlier_run_published_is_no_users_file_though_its_result_was_overwritten() {
    let bench = Bench::new().unwrap();
    let count = AtomicUsize::new(0);
    let ticks = Arc::new(Toy::new("ticks", move |ctx| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        crate::testing::write(ctx, "out", &format!("tick {n}"))?;
        Ok(crate::step::StepOutcome::default())
    }));
    let step = uses("ticks", ticks).change(|s| {
        s.cache = CachePolicy::Never;
        s.publish = [("out".into(), "t.txt".into())].into();
    });
    let quiet = step.clone().change(|s| s.publish.clear());
    let path = bench.root().join("t.txt");
    // The last but one is not published: only the record tells of what lies there then.
    for (n, step) in [&step, &step, &quiet, &step].into_iter().enumerate() {
        let ran = bench.run(std::slice::from_ref(step));
        assert!(ran.warnings().is_empty(), "{:?}", ran.warnings());
        assert!(!ran.summary.run_dir.join(crate::record::REPLACED).exists());
        if !step.publish.is_empty() {
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text, format!("tick {n}"));
        }
    }
    std::fs::write(&path, "mine").unwrap();
    let ran = bench.run(&[step]);
    let kept = ran.summary.run_dir.join(crate::record::REPLACED);
    assert_eq!(std::fs::read_to_string(kept.join("t.txt")).unwrap(), "mine");
}

#[test]
fn a_killed_runs_job_has_ended_before_the_step_runs_here() {
    let bench = Bench::new().unwrap();
    let step = [node("a").change(|s| s.cache = CachePolicy::Never)];
    let ran = bench.run(&step);
    let key = ran.events.iter().find_map(|event| match event {
        RunEvent::StepStarted { key, .. } => Some(key.clone()),
        _ => None,
    });
    let folder = bench.cache_dir().join("jobs").join(key.unwrap());
    let attempt = folder.join("1");
    std::fs::create_dir_all(&attempt).unwrap();
    let ordered = r#"{"version":1,"system":"a","id":"job-1","attempt":1}"#;
    std::fs::write(folder.join("job.json"), ordered).unwrap();
    std::fs::write(attempt.join("claimed"), "").unwrap();
    let worker = std::thread::spawn(move || {
        while !attempt.join("cancel").exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let answer = r#"{"failed":{"kind":"cancelled","message":"stopped","help":null}}"#;
        std::fs::write(attempt.join("messages.jsonl"), format!("{answer}\n"))
    });
    let ran = bench.run(&step);
    worker.join().unwrap().unwrap();
    assert_eq!(ran.ends(), ["a ran"]);
    assert!(!folder.exists());
    let log = std::fs::read_to_string(ran.summary.run_dir.join("logs/a.log")).unwrap();
    assert!(log.contains("job-1"), "{log}");
}

#[test]
fn the_history_survives_without_run_records_and_knows_restored_results() {
    let bench = Bench::new().unwrap();
    let step = |n: i32| [node("a").with(json!({ "n": n }))];
    bench.run(&step(1));
    bench.run(&step(2));
    bench.run(&step(1));
    assert_eq!(status(&bench.plan(&step(3)), 0), stale("param `n`: 1 → 3"));
    std::fs::remove_dir_all(bench.cache_dir().join("runs")).unwrap();
    assert_eq!(status(&bench.plan(&step(3)), 0), stale("param `n`: 2 → 3"));
}

#[test]
fn a_reason_names_the_nearest_run_that_gave_a_result() {
    let bench = Bench::new().unwrap();
    let step = |n: i32| [node("a").with(json!({ "n": n }))];
    let good = bench.run(&step(1));
    let fails = Toy::new("join", |_| Err(StepError::failed("no")));
    let failed = uses("a", Arc::new(fails)).with(json!({ "n": 2 }));
    assert!(!bench.run(&[failed]).summary.ok);
    let plan = bench.plan(&step(3));
    let change = "param `n`: 1 → 3".to_owned();
    let compared = PlanStatus::Stale {
        why: change.clone(),
        changes: vec![change],
        against: Some(good.summary.run_id),
    };
    assert_eq!(plan.steps[0].status, compared, "not: its result is gone");
}

#[test]
fn equal_actions_run_once() {
    // At once, and one after the other.
    for jobs in [4, 1] {
        let mut bench = Bench::new().unwrap();
        bench.options.jobs = jobs;
        let join = Arc::new(Toy::join());
        let steps: Vec<StepNode> = ["a", "b", "c", "d"]
            .map(|name| uses(name, join.clone()).text("same"))
            .into();
        let ran = bench.run(&steps);
        assert_eq!((ran.summary.ran, ran.summary.cached), (1, 3));
        // What is asked for again runs for each that asks.
        bench.options.force = true;
        let ran = bench.run(&steps);
        assert_eq!((ran.summary.ran, ran.summary.cached), (4, 0));
        assert_eq!(join.runs.load(std::sync::atomic::Ordering::SeqCst), 5);
    }
    // Where there is room, but not for two of them.
    let items = |change: fn(&mut StepNode)| {
        let bench = Bench::new().unwrap();
        let join = Arc::new(Toy::join());
        let step = uses("s", join).each_value("i", json!([1, 2, 3, 4, 5]));
        let summary = bench.run(&[step.change(change)]).summary;
        (summary.ran, summary.cached)
    };
    assert_eq!(items(|s| s.pool = Some("one".into())), (1, 4));
    assert_eq!(items(|s| s.cache = CachePolicy::Never), (5, 0));
    let alone = |s: &mut StepNode| (s.pool, s.cache) = (Some("one".into()), CachePolicy::Never);
    assert_eq!(items(alone), (5, 0));
}

#[test]
fn equal_actions_share_a_result_whose_gate_failed() {
    for jobs in [4, 1] {
        let mut bench = Bench::new().unwrap();
        (bench.options.jobs, bench.options.keep_going) = (jobs, true);
        let join = Arc::new(Toy::join());
        let gated = |name: &str| {
            uses(name, join.clone()).change(|s| s.expect = vec!["length > 1000".into()])
        };
        assert_eq!(bench.run(&[gated("a"), gated("b")]).summary.failed, 2);
        assert_eq!(join.runs.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
}

#[test]
fn when_skips_a_step_and_those_that_need_its_outputs() {
    let bench = Bench::new().unwrap();
    let steps = [
        node("a").change(|s| s.when = Some("false".into())),
        node("b").input("x", "a.out"),
        node("c")
            .text("c")
            .change(|s| s.needs = vec!["a".into(), "b".into()]),
        node("d").change(|s| s.when = Some("true".into())),
    ];
    let plan = bench.plan(&steps);
    assert!(matches!(plan.steps[1].status, PlanStatus::Skipped { .. }));
    let ran = bench.run(&steps);
    assert_eq!(ran.ends(), ["a skipped", "b skipped", "c ran", "d ran"]);
    assert!(ran.summary.ok && ran.summary.skipped == 2);
    assert_eq!(ran.why("a"), "its `when` is false");
    assert_eq!(ran.why("b"), "needs `a`, which was skipped");
}

#[test]
fn a_step_runs_without_what_only_an_optional_port_would_read() {
    let bench = Bench::new().unwrap();
    let mut join = Toy::join();
    join.inputs = vec![
        Port::new("x", "any", "").optional(),
        Port::new("y", "any", ""),
    ];
    let join = Arc::new(join);
    let step = |name: &str, action: &Arc<Toy>| uses(name, action.clone());
    let skipped = |name: &str| node(name).change(|s| s.when = Some("false".into()));
    let steps = [
        skipped("gone"),
        node("there").text("t"),
        step("lacks", &join)
            .input("x", "gone.out")
            .input("y", "there.out"),
        step("needs", &join)
            .input("x", "there.out")
            .input("y", "gone.out"),
    ];
    let status = |at: usize| bench.plan(&steps).steps[at].status.clone();
    assert!(matches!(status(2), PlanStatus::Pending { .. }));
    let ran = bench.run(&steps);
    assert_eq!(
        ran.ends(),
        ["gone skipped", "lacks ran", "needs skipped", "there ran"]
    );
    assert!(ran.summary.ok);
    assert_eq!(status(2), PlanStatus::Fresh);
    assert_eq!(bench.run(&steps).summary.cached, 2);
}
