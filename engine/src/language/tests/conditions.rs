//! Items that a `when` leaves out of the steps inside a walked definition.
#![allow(clippy::panic)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use flowrun_cache::OutputRecord;
use serde_json::json;

use super::walked::{EXPRESSIONS, artifact, load, outermost, record, step};
use crate::expansion::{ActionRequest, Entry, expand};
use crate::pipeline::{Action, Pipeline};
use crate::step::StepError;

/// The items of a step, where each step before it gave a list with these labels.
fn expanded(
    pipeline: &Pipeline,
    name: &str,
    given: &[(&str, &[&str])],
) -> Result<Vec<ActionRequest>, StepError> {
    let given: BTreeMap<&str, &[&str]> = given.iter().copied().collect();
    let outputs = |step: &str, _: &str| given.get(step).map(|labels| record(Some(*labels)));
    let node = Arc::new(step(pipeline, name).clone());
    let items = expand(pipeline, &node, &EXPRESSIONS, outputs)?;
    Ok(items.unwrap_or_default())
}

fn ids(requests: &[ActionRequest]) -> Vec<&str> {
    requests.iter().map(|r| r.id.as_str()).collect()
}

fn command(request: &ActionRequest) -> &str {
    request.command.as_deref().unwrap_or_default()
}

/// A pipeline that walks `n` through `outer.yaml`, and that definition uses two others.
fn siblings(outer: &str, when: &str) -> Pipeline {
    let main = "\
steps:
  each:
    uses: ./outer.yaml
    foreach: { n: [3, 12] }
    with: { n: \"${{ item.n }}\" }
";
    let a = format!(
        "params:\n  n:\nout: {{ rows: make.rows }}\nsteps:\n  make:\n    when: {when}\n    \
         run: echo ${{{{ params.n }}}} > \"$rows\"\n    out: {{ rows: rows.txt }}\n"
    );
    let b = "\
params: { n: 0 }
in: { rows: any }
out: { seen: see.seen }
steps:
  see:
    run: echo ${{ params.n }} > \"$seen\"; cat \"$rows\"
    in: { rows: in.rows }
    out: { seen: seen.txt }
";
    load(&[
        ("main.yaml", main),
        ("outer.yaml", outer),
        ("a.yaml", &a),
        ("b.yaml", b),
    ])
}

const OUTER: &str = "\
params:
  n:
steps:
  one: { uses: ./a.yaml, with: { n: \"${{ params.n }}\" } }
  two: { uses: ./b.yaml, in: { rows: one.rows }, with: { n: \"${{ params.n * 10 }}\" } }
  three: { uses: ./b.yaml, in: { rows: two.seen } }
  here:
    run: cat \"$rows\" > \"$out\"
    in: { rows: one.rows }
    out: { out: out.txt }
";

#[test]
fn a_condition_means_the_same_in_the_steps_of_another_use() {
    let pipeline = siblings(OUTER, "${{ params.n < 9 }}");
    let outer = ("_0_n".to_owned(), json!("${{ item.n }}"));
    let one = ("_1_n".to_owned(), json!("${{ item._0_n }}"));
    let two = ("_2_n".to_owned(), json!("${{ item._0_n * 10 }}"));
    let of_two = outermost(&pipeline, "each/two/see");
    assert_eq!(of_two.conditions, ["item._1_n < 9"]);
    assert_eq!(of_two.bound, [outer.clone(), two.clone()]);
    assert_eq!(of_two.handed, std::slice::from_ref(&one));
    // One has no such param, one stands beside the uses.
    let of_three = outermost(&pipeline, "each/three/see");
    assert_eq!(of_three.conditions, ["item._1_n < 9"]);
    assert_eq!(of_three.bound, std::slice::from_ref(&outer));
    assert_eq!(of_three.handed, [two, one.clone()]);
    let here = outermost(&pipeline, "each/here");
    assert_eq!(here.bound, [outer]);
    assert_eq!(here.handed, [one]);

    let given: &[(&str, &[&str])] = &[("each/one/make", &["3"]), ("each/two/see", &["3"])];
    for (name, id) in [
        ("each/one/make", "each/one/make[3]"),
        ("each/two/see", "each/two/see[3]"),
        ("each/three/see", "each/three/see[3]"),
        ("each/here", "each/here[3]"),
    ] {
        let items = expanded(&pipeline, name, given).unwrap();
        assert_eq!(ids(&items), [id]);
    }
    let items = expanded(&pipeline, "each/two/see", given).unwrap();
    assert!(
        command(&items[0]).starts_with("echo 30 "),
        "it has its own param"
    );
}

#[test]
fn uses_beside_each_other_have_params_of_their_own() {
    let outer = OUTER.replace("params.n * 10", "params.n * 4");
    let pipeline = siblings(&outer, "${{ params.n > 9 }}");
    // 4 * 3 is more than 9, but the param of the first use is meant.
    let given: &[(&str, &[&str])] = &[("each/one/make", &["12"]), ("each/two/see", &["12"])];
    let items = expanded(&pipeline, "each/two/see", given).unwrap();
    assert_eq!(ids(&items), ["each/two/see[12]"]);
    assert!(command(&items[0]).starts_with("echo 48 "));
    let Action::Run(text) = &step(&pipeline, "each/three/see").action else {
        panic!("a command");
    };
    assert!(text.starts_with("echo 0 "), "{text}");
}

/// Walks `n` through the steps.
fn walk(steps: &str) -> Pipeline {
    let main = "\
steps:
  walk:
    uses: ./inner.yaml
    foreach: { n: [3, 5] }
    with: { n: \"${{ item.n }}\" }
";
    let inner = format!("params:\n  n:\nsteps:\n{steps}");
    load(&[("main.yaml", main), ("inner.yaml", &inner)])
}

const PARTS: &str = "  part:
    when: ${{ params.n < 4 }}
    run: echo > \"$out\"
    out: { out: out.txt }
  other:
    run: echo > \"$out\"
    out: { out: out.txt }
  each:
    foreach: { x: [part.out, other.out] }
    run: cat \"$x\" > \"$y\"
    in: { x: \"${{ item.x }}\" }
    out: { y: y.txt }
  all:
    run: cat \"$ys\"/* > \"$out\"
    in: { ys: each.y }
    out: { out: out.txt }
";

#[test]
fn an_item_is_left_out_of_what_walks_the_outputs_that_it_lacks() {
    let pipeline = walk(PARTS);
    let given: &[(&str, &[&str])] = &[
        ("walk/part", &["3"]),
        ("walk/other", &["3", "5"]),
        ("walk/each", &["3/out", "3/out#2"]),
    ];
    let each = expanded(&pipeline, "walk/each", given).unwrap();
    assert_eq!(ids(&each), ["walk/each[3/out]", "walk/each[3/out#2]"]);
    let all = expanded(&pipeline, "walk/all", given).unwrap();
    assert_eq!(ids(&all), ["walk/all[3]"]);
    assert_eq!(all[0].inputs["ys"].entries.len(), 2);
}

#[test]
fn lists_inside_an_item_that_is_left_out_need_not_fit_each_other() {
    let zipped = "  each:\n    foreach: { a: part.piece, b: [1, 2] }\n    run: cat \"$a\" > \"$y\"\n    \
                  in: { a: \"${{ item.a }}\" }\n    out: { y: y.txt }\n";
    let part = "  part:\n    foreach: { half: [a, b] }\n    run: echo > \"$piece\"\n    \
                out: { piece: piece.txt }\n";
    let when = "    when: ${{ params.n < 4 }}\n";
    let ends = ["walk/each[3/a]", "walk/each[3/b]"];
    // By a condition of its own: the lists of the other item have one element and two.
    let pipeline = walk(&format!("{part}{zipped}{when}"));
    let given: &[(&str, &[&str])] = &[("walk/part", &["3/a", "3/b", "5/a"])];
    let each = expanded(&pipeline, "walk/each", given).unwrap();
    assert_eq!(ids(&each), ends);
    // By one of the step whose list it walks.
    let pipeline = walk(&format!("{part}{when}{zipped}"));
    let given: &[(&str, &[&str])] = &[("walk/part", &["3/a", "3/b"])];
    let each = expanded(&pipeline, "walk/each", given).unwrap();
    assert_eq!(ids(&each), ends);
    // A condition on the elements is asked for each of them: it leaves out no item.
    let of_half = "    when: ${{ item.half != \"b\" and params.n < 4 }}\n";
    let pipeline = walk(&format!("{part}{of_half}{zipped}"));
    let part = expanded(&pipeline, "walk/part", &[]).unwrap();
    assert_eq!(ids(&part), ["walk/part[3/a]"]);
    assert!(outermost(&pipeline, "walk/each").conditions.is_empty());
    let given: &[(&str, &[&str])] = &[("walk/part", &["3/a"])];
    let error = expanded(&pipeline, "walk/each", given).err().unwrap();
    assert!(
        error.message.contains("lists of different lengths"),
        "{}",
        error.message
    );
}

#[test]
fn a_param_that_only_some_items_have_is_asked_of_those_alone() {
    let main = "\
steps:
  walk:
    uses: ./inner.yaml
    foreach: { cfg: [{ n: 3 }, {}, { n: 12 }] }
    when: item.cfg.n is defined
    with: { n: \"${{ item.cfg.n }}\" }
";
    let inner = "\
params:
  n:
steps:
  plain:
    run: echo ${{ params.n }} > \"$out\"
    out: { out: out.txt }
  small:
    when: ${{ params.n < 9 }}
    run: cat \"$x\" > \"$out\"
    in: { x: plain.out }
    out: { out: out.txt }
";
    let pipeline = load(&[("main.yaml", main), ("inner.yaml", inner)]);
    let plain = expanded(&pipeline, "walk/plain", &[]).unwrap();
    let (three, twelve) = ("{\"n\":3}", "{\"n\":12}");
    let commands: Vec<&str> = plain.iter().map(command).collect();
    assert_eq!(commands, ["echo 3 > \"$out\"", "echo 12 > \"$out\""]);
    let given: &[(&str, &[&str])] = &[("walk/plain", &[three, twelve])];
    let small = expanded(&pipeline, "walk/small", given).unwrap();
    assert_eq!(ids(&small), [format!("walk/small[{three}]")]);

    // Without the condition the param is missing, whoever asks.
    let main = main.replace("    when: item.cfg.n is defined\n", "");
    for inner in [
        inner.to_owned(),
        inner.replace("params.n < 9", "params.n is defined"),
    ] {
        let pipeline = load(&[("main.yaml", &main), ("inner.yaml", &inner)]);
        for name in ["walk/plain", "walk/small"] {
            let error = expanded(&pipeline, name, given).err().unwrap();
            let told = format!("a param of `{name}`: ");
            assert!(error.message.starts_with(&told), "{}", error.message);
        }
    }
}

#[test]
fn what_a_step_reads_is_asked_for_once_for_all_items() {
    let inner = "\
params:
  n:
steps:
  part:
    run: echo > \"$out\"
    out: { out: out.txt }
  both:
    run: cat \"$x\" \"$y\" > \"$out\"
    in: { x: part.out, y: part.out }
    out: { out: out.txt }
";
    let main = "\
steps:
  walk:
    uses: ./inner.yaml
    foreach: { n: [1, 2, 3, 4, 5, 6, 7, 8] }
    with: { n: \"${{ item.n }}\" }
";
    let pipeline = load(&[("main.yaml", main), ("inner.yaml", inner)]);
    let asked = RefCell::new(Vec::new());
    let outputs = |step: &str, port: &str| -> Option<OutputRecord> {
        asked.borrow_mut().push(format!("{step}.{port}"));
        Some(record(Some(&["1", "2", "3", "4", "5", "6", "7", "8"])))
    };
    let node = Arc::new(step(&pipeline, "walk/both").clone());
    let items = expand(&pipeline, &node, &EXPRESSIONS, outputs);
    let items = items.unwrap().unwrap_or_default();
    assert_eq!(items.len(), 8);
    for (item, label) in items.iter().zip(["1", "2", "3"]) {
        let Entry::Artifact { artifact: read, .. } = &item.inputs["y"].entries[0] else {
            panic!("an artifact");
        };
        assert_eq!(*read, artifact(label));
    }
    assert_eq!(*asked.borrow(), ["walk/part.out"]);
}
