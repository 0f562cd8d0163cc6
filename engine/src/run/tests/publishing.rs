//! Outputs in the project tree: all of a step, or none.

use std::path::Path;
use std::sync::Arc;

use crate::pipeline::StepNode;
use crate::step::{Port, StepOutcome};
use crate::testing::{Bench, Toy, node, uses, write};

/// A step with the outputs `other` and `out`, published to these paths in this order.
fn two(other: &str, out: &str) -> StepNode {
    let mut two = Toy::new("two", |ctx| {
        write(ctx, "other", "new")?;
        write(ctx, "out", "new")?;
        Ok(StepOutcome::default())
    });
    two.outputs = ["other", "out"]
        .map(|port| Port::new(port, "file", ""))
        .into();
    let paths = [("other", other), ("out", out)];
    let paths = paths.map(|(port, path)| (port.to_owned(), path.to_owned()));
    uses("two", Arc::new(two)).change(|s| s.publish = paths.into())
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn an_output_that_cannot_be_published_has_the_others_taken_back() {
    let bench = Bench::new().unwrap();
    let folder = bench.root().join("r");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("mine"), "mine").unwrap();
    std::fs::create_dir(folder.join("notes")).unwrap();
    std::fs::write(folder.join("notes/today"), "mine too").unwrap();
    // A name that no file system takes.
    let long = format!("r/{}", "x".repeat(300));
    for place in ["r/mine", "r/notes", "r/nothing"] {
        let ran = bench.run(&[two(place, &long)]);
        assert!(!ran.summary.ok);
        let (id, error) = ran.summary.first_error.clone().unwrap();
        assert_eq!(id, "two");
        for part in [
            "an output of `two` cannot be published: ",
            long.as_str(),
            "were taken back: all is as it was",
        ] {
            assert!(error.message.contains(part), "{}", error.message);
        }
        assert!(error.help.is_some() && ran.warnings().is_empty());
        assert_eq!(read(&folder.join("mine")), "mine");
        assert_eq!(read(&folder.join("notes/today")), "mine too");
        let left = std::fs::read_dir(&folder).unwrap().count();
        assert_eq!(left, 2, "neither an output nor a copy of one");
        for run in std::fs::read_dir(bench.cache_dir().join("runs")).unwrap() {
            assert!(!run.unwrap().path().join("replaced").exists());
        }
    }
    // What it made was kept.
    let ran = bench.run(&[two("r/mine", "r/out")]);
    assert_eq!(ran.ends(), ["two cached"]);
    assert_eq!(read(&folder.join("mine")), "new");
    assert_eq!(read(&folder.join("out")), "new");
    assert_eq!(ran.warnings().len(), 1, "what lay there is kept");
}

#[test]
fn folders_that_were_made_for_what_is_not_published_do_not_stay() {
    let bench = Bench::new().unwrap();
    std::fs::write(bench.root().join("file"), "mine").unwrap();
    std::fs::create_dir(bench.root().join("empty")).unwrap();
    let long = format!("s/{}", "x".repeat(300));
    // One cannot be put, the folder of one cannot be made.
    for out in [long.as_str(), "file/out.txt"] {
        let ran = bench.run(&[two("r/deep/a.txt", out)]);
        assert!(!ran.summary.ok);
        let ran = bench.run(&[two("empty/deep/a.txt", out)]);
        assert!(!ran.summary.ok);
        for folder in ["r", "s", "empty/deep"] {
            assert!(!bench.root().join(folder).exists(), "{folder} for {out}");
        }
        assert!(bench.root().join("empty").is_dir(), "it is the user's");
    }
    let ran = bench.run(&[two("r/deep/a.txt", "s/b.txt")]);
    assert!(ran.summary.ok);
    assert_eq!(read(&bench.root().join("r/deep/a.txt")), "new");
}

#[test]
fn a_file_in_the_way_of_a_folder_is_told_and_nothing_is_published() {
    let bench = Bench::new().unwrap();
    std::fs::write(bench.root().join("in"), "mine").unwrap();
    let ran = bench.run(&[two("a.txt", "in/out.txt")]);
    let (_, error) = ran.summary.first_error.unwrap();
    assert!(
        error.message.ends_with("; nothing was published") && error.message.contains("/in: "),
        "{}",
        error.message
    );
    assert!(!bench.root().join("a.txt").exists());
    assert_eq!(read(&bench.root().join("in")), "mine");
}

#[test]
fn outputs_of_one_step_do_not_lie_in_each_other() {
    let bench = Bench::new().unwrap();
    for (other, out) in [("r", "r/x"), ("r/x", "r")] {
        let ran = bench.run(&[two(other, out)]);
        let (_, error) = ran.summary.first_error.unwrap();
        assert!(
            error.message.contains("one of which lies in the other"),
            "{}",
            error.message
        );
        assert!(!bench.root().join("r/x").exists());
    }
}

#[test]
fn a_link_that_leads_nowhere_is_kept_too() {
    let bench = Bench::new().unwrap();
    let link = bench.root().join("a.txt");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let ran = bench.run(&[two("a.txt", "b.txt")]);
    assert!(ran.summary.ok);
    assert_eq!(read(&link), "new");
    assert_eq!(ran.warnings().len(), 1);
}

#[test]
fn a_plan_names_what_a_run_publishes_again() {
    let bench = Bench::new().unwrap();
    let to = |path: &'static str| {
        move |s: &mut StepNode| s.publish = [("out".into(), path.into())].into()
    };
    let steps = [
        node("a").text("right").change(to("./r/a.txt")),
        uses("w", Arc::new(Toy::words()))
            .text("one two")
            .change(to("r/words")),
    ];
    let told = || -> Vec<String> {
        let plan = bench.plan(&steps);
        let told: Vec<String> = plan
            .to_publish()
            .map(|one| format!("{} {}", one.path, one.found.word()))
            .collect();
        assert_eq!(plan.is_idle(), plan.is_fresh() && told.is_empty());
        told
    };
    assert!(told().is_empty(), "what is to be made is not known");
    assert!(!bench.plan(&steps).is_fresh());
    bench.run(&steps);
    assert!(told().is_empty());
    let (a, two) = (
        bench.root().join("r/a.txt"),
        bench.root().join("r/words/two"),
    );
    std::fs::write(&a, "wrong").unwrap();
    std::fs::remove_file(&two).unwrap();
    assert_eq!(told(), ["r/a.txt changed", "r/words/two missing"]);
    assert!(bench.plan(&steps).is_fresh());
    std::fs::remove_file(&a).unwrap();
    std::os::unix::fs::symlink("nowhere", &a).unwrap();
    std::fs::create_dir(&two).unwrap();
    assert_eq!(told(), ["r/a.txt changed", "r/words/two changed"]);
    assert!(!two.is_file(), "a plan publishes nothing");
    assert_eq!(bench.run(&steps).summary.ran, 0);
    assert!(told().is_empty());
    // What a gate holds back is not published: the run ends there. So does a path that leads out.
    let gated = steps[0].clone().change(|s| {
        s.expect = vec!["length >= 6".into()];
        to("r/gated.txt")(s);
    });
    let plan = bench.plan(&[gated]);
    assert!(plan.steps[0].status.is_stale() && plan.to_publish().next().is_none());
    let why = plan.steps[0].status.why();
    assert!(
        why.starts_with("the gate `length >= 6` was not met"),
        "{why}"
    );
    let bad = steps[0].clone().change(to("../a"));
    let plan = bench.plan(&[bad]);
    let why = "`../a` must be a relative path without `..`";
    assert!(plan.steps[0].status.is_stale());
    assert_eq!(plan.steps[0].status.why(), why);
}
