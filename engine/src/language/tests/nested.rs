//! `foreach` on a use of a step definition inside a definition whose use has a `foreach`.
#![allow(clippy::panic)]

use std::sync::Arc;

use serde_json::json;

use super::mistakes_in;
use super::walked::{EXPRESSIONS, artifact, levels, load, outermost, record, step};
use crate::expansion::{ActionRequest, Entry, expand};
use crate::pipeline::{ForeachList, Pipeline, Source};
use crate::step::StepError;

const MAIN: &str = "\
steps:
  load: { uses: load, with: { path: rows.csv } }
  outer:
    uses: ./outer.yaml
    foreach: { n: [3, 5], max_parallel: 2 }
    in: { rows: load.train }
    with: { n: \"${{ item.n }}\" }
  all:
    run: cat \"$x\"/* > \"$y\"
    in: { x: outer.marks }
    out: { y: y.txt }
";

const OUTER: &str = "\
params:
  n:
in: { rows: examples }
out: { marks: inner.mark, both: join.both }
steps:
  part:
    foreach: { half: [a, b] }
    run: echo '${{ params.n }}${{ item.half }}' > \"$piece\"; cat \"$rows\"
    in: { rows: in.rows }
    out: { piece: piece.txt }
  inner:
    uses: ./inner.yaml
    foreach: { piece: part.piece, k: [7, 8], max_parallel: 1 }
    in: { piece: \"${{ item.piece }}\", rows: in.rows }
    with: { k: \"${{ item.k * params.n }}\" }
  join:
    run: cat \"$all\"/* > \"$both\"
    in: { all: inner.mark }
    out: { both: both.txt }
";

const INNER: &str = "\
params:
  k:
in: { piece: file, rows: examples }
out: { mark: mark.mark }
steps:
  cut:
    run: head -n ${{ params.k }} \"$piece\" > \"$head\"; cat \"$rows\"
    in: { piece: in.piece, rows: in.rows }
    out: { head: head.txt }
  mark:
    run: cat \"$head\" > \"$mark\"
    in: { head: cut.head }
    out: { mark: mark.txt }
";

fn pipeline(outer: &str, inner: &str) -> Pipeline {
    load(&[
        ("main.yaml", MAIN),
        ("outer.yaml", outer),
        ("inner.yaml", inner),
    ])
}

/// The items of a step, where the steps before it made all that there can be.
fn expanded(pipeline: &Pipeline, name: &str) -> Result<Vec<ActionRequest>, StepError> {
    let outputs = |step: &str, _: &str| match step {
        "load" => Some(record(None)),
        _ => Some(record(Some(&["3/a", "3/b", "5/a", "5/b"]))),
    };
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

/// What a port reads, by the text that [`artifact`] was made of, and its label.
fn reads(request: &ActionRequest, port: &str, text: &str, label: &str) -> bool {
    let entries = &request.inputs[port].entries;
    entries.iter().any(|entry| match entry {
        Entry::Artifact {
            artifact: found,
            label: shown,
        } => *found == artifact(text) && shown == label,
        Entry::File(_) => false,
    })
}

#[test]
fn the_steps_of_the_inner_use_walk_its_lists_within_each_item_around() {
    let pipeline = pipeline(OUTER, INNER);
    let [outer, inner] = levels(&pipeline, "outer/inner/cut") else {
        panic!("two levels");
    };
    assert_eq!(outer.walker.as_deref(), Some("outer"));
    assert_eq!(outer.max_parallel, Some(2));
    let n = ("_0_n".to_owned(), json!("${{ item.n }}"));
    assert_eq!(outer.bound, [n]);
    assert_eq!(inner.walker.as_deref(), Some("outer/inner"));
    assert_eq!(inner.max_parallel, Some(1));
    let k = ("_1_k".to_owned(), json!("${{ item.k * item._0_n }}"));
    assert_eq!(inner.bound, [k]);
    let sibling = |step: &str, output: &str, levels: usize, many: bool| Source::Sibling {
        step: step.into(),
        output: output.into(),
        levels,
        many,
    };
    let ForeachList::Artifacts(pieces) = &inner.vars["piece"] else {
        panic!("artifacts");
    };
    assert_eq!(pieces[..], [sibling("outer/part", "piece", 1, true)]);
    let mark = step(&pipeline, "outer/inner/mark");
    assert_eq!(
        mark.inputs["head"],
        [sibling("outer/inner/cut", "head", 2, false)]
    );
    let join = step(&pipeline, "outer/join");
    assert_eq!(
        join.inputs["all"],
        [sibling("outer/inner/mark", "mark", 1, true)]
    );
    let all = Source::Output {
        step: "outer/inner/mark".into(),
        output: "mark".into(),
    };
    assert_eq!(step(&pipeline, "all").inputs["x"], [all]);
}

#[test]
fn each_item_reads_what_was_made_of_it_at_its_level() {
    let pipeline = pipeline(OUTER, INNER);
    let cut = expanded(&pipeline, "outer/inner/cut").unwrap();
    assert_eq!(
        ids(&cut),
        [
            "outer/inner/cut[3/a]",
            "outer/inner/cut[3/b]",
            "outer/inner/cut[5/a]",
            "outer/inner/cut[5/b]"
        ]
    );
    assert!(
        command(&cut[3]).starts_with("head -n 40 "),
        "{}",
        command(&cut[3])
    );
    assert!(reads(&cut[3], "piece", "5/b", "b") && reads(&cut[3], "rows", "one", "rows"));
    let mark = expanded(&pipeline, "outer/inner/mark").unwrap();
    assert_eq!(mark.len(), 4);
    assert!(reads(&mark[2], "head", "5/a", "head") && !mark[2].inputs["head"].list);
    let join = expanded(&pipeline, "outer/join").unwrap();
    assert_eq!(ids(&join), ["outer/join[3]", "outer/join[5]"]);
    let all = &join[1].inputs["all"];
    assert!(all.list && all.entries.len() == 2);
    assert!(reads(&join[1], "all", "5/a", "a") && reads(&join[1], "all", "5/b", "b"));
}

#[test]
fn a_condition_leaves_out_items_of_the_level_that_it_names() {
    // Of the level inside: what reads the list of an item around gets a shorter one.
    let inner = INNER.replace("  cut:\n", "  cut:\n    when: ${{ params.k > 30 }}\n");
    let of_inner = pipeline(OUTER, &inner);
    let [around, within] = levels(&of_inner, "outer/inner/mark") else {
        panic!("two levels");
    };
    assert!(around.conditions.is_empty());
    assert_eq!(within.conditions, ["item._1_k > 30"]);
    assert!(outermost(&of_inner, "outer/join").conditions.is_empty());
    for name in ["outer/inner/cut", "outer/inner/mark"] {
        let items = expanded(&of_inner, name).unwrap();
        let left = [format!("{name}[5/a]"), format!("{name}[5/b]")];
        assert_eq!(ids(&items), left);
    }
    assert_eq!(expanded(&of_inner, "outer/join").unwrap().len(), 2);

    // Of the level around: with it goes what needs all that is inside.
    let outer = OUTER.replace(
        "    uses: ./inner.yaml\n",
        "    uses: ./inner.yaml\n    when: ${{ params.n > 3 }}\n",
    );
    let of_outer = pipeline(&outer, INNER);
    for name in ["outer/inner/cut", "outer/inner/mark", "outer/join"] {
        let level = outermost(&of_outer, name);
        assert_eq!(level.conditions, ["item._0_n > 3"], "{name}");
    }
    let join = expanded(&of_outer, "outer/join").unwrap();
    assert_eq!(ids(&join), ["outer/join[5]"]);
    let cut = expanded(&of_outer, "outer/inner/cut").unwrap();
    assert_eq!(ids(&cut), ["outer/inner/cut[5/a]", "outer/inner/cut[5/b]"]);
}

#[test]
fn a_list_may_differ_from_item_to_item() {
    let main = "\
steps:
  sets:
    uses: ./each.yaml
    foreach: { name: [a, b], sizes: [[1, 2], [3]] }
    with: { name: \"${{ item.name }}\", sizes: \"${{ item.sizes }}\" }
";
    let each = "\
params:
  name:
  sizes:
steps:
  one:
    uses: ./one.yaml
    foreach: { size: \"${{ params.sizes }}\" }
    with: { size: \"${{ item.size }}\", name: \"${{ params.name }}\" }
  pair:
    foreach: { x: [\"${{ params.name }}\", \"$${{ x }}\"] }
    run: echo '${{ item.x }}' > \"$out\"
    out: { out: out.txt }
  fixed:
    foreach: { x: [\"$${{ x }}\"] }
    run: echo '${{ item.x }}' > \"$out\"
    out: { out: out.txt }
";
    let one = "\
params:
  size:
  name:
steps:
  say:
    run: echo ${{ params.name }} ${{ params.size }} > \"$out\"
    out: { out: out.txt }
";
    let of = |main: &str| load(&[("main.yaml", main), ("each.yaml", each), ("one.yaml", one)]);
    let pipeline = of(main);
    let say = expanded(&pipeline, "sets/one/say").unwrap();
    let labels = [
        "sets/one/say[a/1]",
        "sets/one/say[a/2]",
        "sets/one/say[b/3]",
    ];
    assert_eq!(ids(&say), labels);
    assert_eq!(command(&say[2]), "echo b 3 > \"$out\"");
    // What is to come out as it is does, whether or not something beside it waits.
    let pair = expanded(&pipeline, "sets/pair").unwrap();
    let commands: Vec<&str> = pair.iter().map(command).collect();
    let literal = "echo '${{ x }}' > \"$out\"";
    assert_eq!(
        commands,
        [
            "echo 'a' > \"$out\"",
            literal,
            "echo 'b' > \"$out\"",
            literal
        ]
    );
    let fixed = expanded(&pipeline, "sets/fixed").unwrap();
    assert_eq!(command(&fixed[1]), literal);

    let wrong = of(&main.replace("[[1, 2], [3]]", "[[1, 2], 3]"));
    let error = expanded(&wrong, "sets/one/say").err().unwrap();
    assert_eq!(
        error.message,
        "`sets/one/say` walks `size`, which is `3` for the item `b`"
    );
}

#[test]
fn each_mistake_of_a_nested_walk_is_found() {
    let cases: &[(&str, &str, &str)] = &[
        (
            "k: [7, 8]",
            "n: [7, 8]",
            "`n` is a variable of the `foreach` around already",
        ),
        (
            "piece: part.piece",
            "piece: part.pieces",
            "the step `part` has no output `pieces`",
        ),
        (
            "k: [7, 8]",
            "k: \"to ${{ params.n }}\"",
            "`foreach` walks a list",
        ),
        (
            "k: [7, 8]",
            "k: \"${{ item.n }}\"",
            "`item` is known only in",
        ),
        (
            "max_parallel: 1",
            "max_parallel: \"${{ params.n }}\"",
            "`params.n` depends on the item",
        ),
    ];
    for (from, to, words) in cases {
        assert!(OUTER.contains(from), "{from}");
        let outer = OUTER.replacen(from, to, 1);
        let found = mistakes_in(&[
            ("main.yaml", MAIN),
            ("outer.yaml", &outer),
            ("inner.yaml", INNER),
        ]);
        let told = found
            .iter()
            .filter(|m| m.starts_with("outer.yaml:") && m.contains(words));
        assert_eq!(told.count(), 1, "{to}: {words}\n{found:#?}");
    }
    let circle = OUTER.replace("piece: part.piece", "piece: inner.mark");
    let found = mistakes_in(&[
        ("main.yaml", MAIN),
        ("outer.yaml", &circle),
        ("inner.yaml", INNER),
    ]);
    assert!(
        found
            .iter()
            .any(|m| m.contains("steps wait for each other")),
        "{found:#?}"
    );
}
