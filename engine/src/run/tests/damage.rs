//! Missing and damaged objects: a miss, never an error.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::pipeline::StepNode;
use crate::testing::{Bench, Ran, Toy, node, uses};

fn object(bench: &Bench, ran: &Ran, step: &str) -> PathBuf {
    let hex = ran.digest(step, "out");
    bench
        .cache_dir()
        .join("objects")
        .join(&hex[..2])
        .join(&hex[2..])
}

/// Changes bytes, not the length: nothing but a hash can tell.
fn flip(path: &PathBuf) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[0] ^= 1;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn chain(last: &str) -> Vec<StepNode> {
    vec![
        node("a").text("a"),
        node("b").text("b").input("x", "a.out"),
        node("c").text(last).input("x", "b.out"),
    ]
}

#[test]
fn a_missing_object_is_made_again_with_a_warning() {
    let bench = Bench::new().unwrap();
    let first = bench.run(&chain("c"));
    std::fs::remove_file(object(&bench, &first, "b")).unwrap();
    let plan = bench.plan(&chain("c"));
    let status = &plan.steps[1].status;
    assert!(status.is_stale(), "{status:?}");
    assert_eq!(
        status.why(),
        "an output is missing from the cache or damaged"
    );
    let ran = bench.run(&chain("c"));
    assert_eq!(ran.ends(), ["a cached", "b ran", "c cached"]);
    assert!(
        ran.summary.ok && ran.warnings().len() == 1,
        "{:?}",
        ran.warnings()
    );
    assert_eq!(ran.digest("c", "out"), first.digest("c", "out"));
}

#[test]
fn damage_found_when_an_input_is_read_goes_back_to_whoever_made_it() {
    let bench = Bench::new().unwrap();
    let first = bench.run(&chain("c"));
    flip(&object(&bench, &first, "b"));
    assert_eq!(bench.run(&chain("c")).summary.cached, 3, "nobody reads it");
    let ran = bench.run(&chain("C"));
    assert_eq!(ran.ran(), ["b", "c"]);
    let s = &ran.summary;
    assert_eq!(
        (s.ok, s.ran, s.cached, s.failed, s.steps.len()),
        (true, 2, 1, 0, 3)
    );
    assert!(
        ran.warnings()[0].starts_with("an input ("),
        "{:?}",
        ran.warnings()
    );
    assert_eq!(ran.digest("b", "out"), first.digest("b", "out"));
    let record = crate::record::RunRecord::load(&s.run_dir).unwrap();
    assert_eq!(record.steps.len(), 3);
    assert_eq!(
        record.step("b").unwrap().status,
        crate::event::StepStatus::Ran
    );
}

#[test]
fn damage_all_the_way_up_is_mended_all_the_way_up() {
    let bench = Bench::new().unwrap();
    let first = bench.run(&chain("c"));
    flip(&object(&bench, &first, "a"));
    flip(&object(&bench, &first, "b"));
    let ran = bench.run(&chain("C"));
    assert_eq!((ran.ran(), ran.summary.ok), (vec!["a", "b", "c"], true));
}

#[test]
fn damaged_items_of_a_list_are_made_again_alone() {
    let bench = Bench::new().unwrap();
    let steps = |text: &str| {
        let each = |name: &str, from: &str, text: &str| {
            node(name).each("w", from).input("x", "item.w").text(text)
        };
        [
            uses("words", Arc::new(Toy::words())).text("one two three"),
            each("e", "words.out", "e"),
            each("f", "e.out", text),
            node("all").input("parts", "f.out"),
        ]
    };
    let first = bench.run(&steps("f"));
    flip(&object(&bench, &first, "e[two]"));
    let ran = bench.run(&steps("F"));
    assert_eq!(ran.ran(), ["all", "e[two]", "f[one]", "f[three]", "f[two]"]);
    let s = &ran.summary;
    assert_eq!((s.ok, s.ran, s.cached, s.steps.len()), (true, 5, 3, 8));
}

#[test]
fn a_step_that_now_makes_other_bytes_is_taken_as_it_is() {
    let bench = Bench::new().unwrap();
    let clock = Arc::new(Toy::new("clock", |ctx| {
        let now = std::time::SystemTime::now();
        crate::testing::write(ctx, "out", &format!("{now:?}"))?;
        Ok(crate::step::StepOutcome::default())
    }));
    let steps = |text: &str| {
        [
            uses("a", clock.clone()),
            node("b").text(text).input("x", "a.out"),
        ]
    };
    let first = bench.run(&steps("b"));
    flip(&object(&bench, &first, "a"));
    let ran = bench.run(&steps("B"));
    assert_eq!((ran.ran(), ran.summary.ok), (vec!["a", "b"], true));
    assert_ne!(ran.digest("a", "out"), first.digest("a", "out"));
    assert_eq!(bench.run(&steps("B")).summary.cached, 2);
}

#[test]
fn a_damaged_copy_of_a_project_file_is_stored_again() {
    let bench = Bench::new().unwrap();
    std::fs::write(bench.root().join("f"), "text").unwrap();
    let step = |text: &str| [node("a").text(text).input("x", "file:f")];
    bench.run(&step("1"));
    let hex = flowrun_cache::Digest::of_bytes(b"text").to_hex();
    flip(
        &bench
            .cache_dir()
            .join("objects")
            .join(&hex[..2])
            .join(&hex[2..]),
    );
    let ran = bench.run(&step("2"));
    assert!(ran.summary.ok && ran.summary.ran == 1, "{:?}", ran.events);
}

#[test]
fn a_damaged_output_is_noticed_when_it_is_published() {
    let bench = Bench::new().unwrap();
    let publish = |s: &mut StepNode| s.publish = [("out".into(), "a.txt".into())].into();
    let steps = [node("a").text("text").change(publish)];
    let first = bench.run(&steps);
    flip(&object(&bench, &first, "a"));
    std::fs::remove_file(bench.root().join("a.txt")).unwrap();
    let ran = bench.run(&steps);
    assert_eq!((ran.ran(), ran.summary.ok), (vec!["a"], true));
    assert_eq!(
        std::fs::read_to_string(bench.root().join("a.txt")).unwrap(),
        "text"
    );
}

#[test]
fn a_damaged_result_is_made_again_with_a_warning() {
    let bench = Bench::new().unwrap();
    bench.run(&chain("c"));
    let mut files = Vec::new();
    for folder in std::fs::read_dir(bench.cache_dir().join("actions")).unwrap() {
        files.extend(std::fs::read_dir(folder.unwrap().path()).unwrap());
    }
    assert_eq!(files.len(), 3);
    for file in files {
        std::fs::write(file.unwrap().path(), "{").unwrap();
    }
    let ran = bench.run(&chain("c"));
    assert_eq!((ran.summary.ran, ran.summary.ok), (3, true));
    assert_eq!(ran.warnings().len(), 3);
}
