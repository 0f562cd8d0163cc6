//! `foreach`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;

use crate::event::RunEvent;
use crate::pipeline::StepNode;
use crate::plan::PlanStatus;
use crate::testing::{Bench, Toy, node, uses};

fn words(text: &str) -> StepNode {
    uses("words", Arc::new(Toy::words())).text(text)
}

#[test]
fn items_of_a_list_that_exists_only_at_run_time_are_cached_one_by_one() {
    let bench = Bench::new().unwrap();
    let join = Arc::new(Toy::join());
    let steps = |text: &str| {
        let each = uses("each", join.clone()).each("word", "words.out");
        let each = each
            .input("x", "item.word")
            .with(json!({ "text": "${{ item.word }}=" }));
        [words(text), each, node("all").input("parts", "each.out")]
    };
    let ran = bench.run(&steps("b a c"));
    assert_eq!(
        ran.ends(),
        [
            "all ran",
            "each[a] ran",
            "each[b] ran",
            "each[c] ran",
            "words ran"
        ]
    );
    let expanded = ran.events.iter().find_map(|event| match event {
        RunEvent::StepExpanded { step, items } => Some((step.as_str(), items.join(" "))),
        _ => None,
    });
    assert_eq!(expanded, Some(("each", "b a c".to_owned())));
    let text = std::fs::read_to_string(
        bench
            .cache_dir()
            .join("objects")
            .join(&ran.digest("all", "out")[..2])
            .join(&ran.digest("all", "out")[2..]),
    );
    assert_eq!(
        text.unwrap(),
        "(b:b=(b:b))(a:a=(a:a))(c:c=(c:c))",
        "in item order"
    );
    let plan = bench.plan(&steps("b a d"));
    assert!(matches!(plan.steps[1].status, PlanStatus::Pending { .. }));
    let ran = bench.run(&steps("b a d"));
    assert_eq!(ran.ran(), ["all", "each[d]", "words"]);
    let plan = bench.plan(&steps("b a d"));
    assert!(plan.is_fresh());
    assert_eq!(plan.find("each[d]").map(|s| s.items.len()), Some(3));
    assert_eq!(join.runs.load(Ordering::SeqCst), 4);
    assert_eq!(ran.why("all"), "input `parts`: `c` is gone, `d` is new");
}

#[test]
fn an_empty_list_gives_empty_lists() {
    let bench = Bench::new().unwrap();
    let each = node("each")
        .each("word", "words.out")
        .input("x", "item.word");
    let steps = [words(""), each, node("all").input("parts", "each.out")];
    assert_eq!(bench.run(&steps).ends(), ["all ran", "words ran"]);
    assert_eq!(bench.run(&steps).summary.cached, 2);
}

#[test]
fn two_lists_are_walked_in_step() {
    let bench = Bench::new().unwrap();
    let other = uses("other", Arc::new(Toy::words())).text("x y");
    let each = node("each")
        .each("a", "words.out")
        .each("b", "other.out")
        .each_value("n", json!([1, 2]))
        .input("x", "item.a")
        .input("y", "item.b")
        .with(json!({ "text": "${{ item.n }}" }));
    let ran = bench.run(&[words("one two"), other.clone(), each.clone()]);
    assert_eq!(
        ran.ends(),
        ["each[one] ran", "each[two] ran", "other ran", "words ran"]
    );
    let ran = bench.run(&[words("one two three"), other, each]);
    let (id, error) = ran.summary.first_error.unwrap();
    assert_eq!(id, "each");
    assert_eq!(
        error.message,
        "`each` walks lists of different lengths: `a` has 3, `b` has 2, `n` has 2"
    );
}

#[test]
fn labels_of_values_are_short_and_distinct() {
    let bench = Bench::new().unwrap();
    let long = "x".repeat(60);
    let each = node("e")
        .each_value("v", json!(["a b\nc", 1, "1", {"k": 1}, long, long]))
        .with(json!({ "text": "${{ item.v }}" }));
    let plan = bench.plan(&[each]);
    let ids: Vec<&str> = plan.steps[0].items.iter().map(|i| i.id.as_str()).collect();
    let cut = "x".repeat(40);
    let (first, second) = (format!("e[{cut}…]"), format!("e[{cut}…#2]"));
    let expected = [
        "e[a b c]",
        "e[1]",
        "e[1#2]",
        "e[{\"k\":1}]",
        &first,
        &second,
    ];
    assert_eq!(ids, expected);
}

#[test]
fn when_may_ask_for_each_item() {
    let bench = Bench::new().unwrap();
    let each = node("each")
        .each("word", "words.out")
        .input("x", "item.word")
        .change(|s| s.when = Some("item.word != b".into()));
    let steps = [words("a b c"), each, node("all").input("parts", "each.out")];
    assert_eq!(
        bench.run(&steps).ends(),
        ["all ran", "each[a] ran", "each[c] ran", "words ran"]
    );
}

#[test]
fn lists_of_lists_are_flattened_and_files_of_items_published_apart() {
    let bench = Bench::new().unwrap();
    let split = uses("split", Arc::new(Toy::words()))
        .each_value("t", json!(["a b", "c"]))
        .with(json!({ "text": "${{ item.t }}" }));
    let each = |path: &str| {
        node("each")
            .each("w", "split.out")
            .input("x", "item.w")
            .change(|s| s.publish = [("out".into(), path.to_owned())].into())
    };
    let ran = bench.run(&[split.clone(), each("r/${{ item.w }}.txt")]);
    assert_eq!(
        ran.ran(),
        [
            "each[a b/a]",
            "each[a b/b]",
            "each[c/c]",
            "split[a b]",
            "split[c]"
        ]
    );
    let text = std::fs::read_to_string(bench.root().join("r/c/c.txt")).unwrap();
    assert_eq!(text, "(c/c:c)");
    let ran = bench.run(&[split, each("r/same.txt")]);
    let error = ran.summary.first_error.unwrap().1;
    assert_eq!(error.message, "`each` would publish twice to `r/same.txt`");
}

#[test]
fn one_failed_item_leaves_the_others_cached() {
    let mut bench = Bench::new().unwrap();
    bench.options.keep_going = true;
    let picky = Arc::new(Toy::new("picky", |ctx| {
        if ctx.input("x")?.label == "bad" {
            return Err(crate::step::StepError::failed("no"));
        }
        crate::testing::write(ctx, "out", "")?;
        Ok(crate::step::StepOutcome::default())
    }));
    let each = uses("each", picky)
        .each("w", "words.out")
        .input("x", "item.w");
    let steps = [
        words("a bad b"),
        each,
        node("all").input("parts", "each.out"),
    ];
    let ran = bench.run(&steps);
    assert_eq!(
        ran.ends(),
        [
            "all skipped",
            "each[a] ran",
            "each[b] ran",
            "each[bad] failed",
            "words ran"
        ]
    );
    let again = bench.run(&steps).summary;
    assert_eq!((again.cached, again.failed, again.skipped), (3, 1, 1));
}
