//! `foreach` and `expect` on a use of a step definition.
#![allow(clippy::panic)]

use std::sync::Arc;

use flowrun_cache::{Artifact, ArtifactKind, Digest, ListItem, OutputRecord, OutputValue};
use serde_json::json;

use super::{load_options, mistakes_in, project, vocabulary};
use crate::expansion::{Entry, Expressions, expand};
use crate::language::{eval_bool, load_pipeline, resolve_item};
use crate::pipeline::{Action, ForeachList, Level, Pipeline, Source, StepNode};

const SCORE: &str = "\
params:
  n:
  note: plain
in:
  rows: examples
out:
  rows: filter.train
  metrics: count.metrics
steps:
  filter:
    uses: filter-top-n
    in: { train: in.rows }
    with:
      n: ${{ params.n }}
  count:
    run: echo '${{ params.n * 2 }} ${{ params.note }} $${{ left }}' > \"$metrics\"; cat \"$rows\"
    in: { rows: filter.train }
    out: { metrics: metrics.json }
";

const MAIN: &str = "\
params: { sizes: [3, 5], least: 1 }
steps:
  load:
    uses: load
    with: { path: rows.csv }
  clean:
    uses: ./score.yaml
    foreach:
      size: ${{ params.sizes }}
      max_parallel: 2
    in: { rows: load.train }
    with:
      n: ${{ item.size }}
    expect: [\"lines >= ${{ params.least }}\"]
    publish: { metrics: \"results/${{ item.size }}.json\" }
  all:
    run: cat \"$parts\"/* > \"$out\"
    in: { parts: clean.rows }
    out: { out: out.txt }
";

pub(super) fn load(files: &[(&str, &str)]) -> Pipeline {
    let dir = project(files);
    let options = load_options(dir.path());
    load_pipeline(&dir.path().join("main.yaml"), &vocabulary(), &options).unwrap()
}

pub(super) fn step<'a>(pipeline: &'a Pipeline, name: &str) -> &'a StepNode {
    let mut steps = pipeline.steps.iter();
    steps.find(|step| step.name == name).unwrap()
}

/// The levels of a step's fan-out.
pub(super) fn levels<'a>(pipeline: &'a Pipeline, name: &str) -> &'a [Level] {
    &step(pipeline, name).foreach.as_ref().unwrap().levels
}

/// The outermost of them.
pub(super) fn outermost<'a>(pipeline: &'a Pipeline, name: &str) -> &'a Level {
    &levels(pipeline, name)[0]
}

fn output(step: &str, output: &str) -> Source {
    Source::Output {
        step: step.into(),
        output: output.into(),
    }
}

pub(super) fn artifact(text: &str) -> Artifact {
    Artifact {
        digest: Digest::of_bytes(text.as_bytes()),
        kind: ArtifactKind::File,
        size: 1,
        executable: false,
    }
}

/// One artifact, or a list of those named.
pub(super) fn record(labels: Option<&[&str]>) -> OutputRecord {
    let item = |label: &&str| ListItem {
        label: (*label).to_owned(),
        artifact: artifact(label),
    };
    OutputRecord {
        ty: "examples".into(),
        value: match labels {
            None => OutputValue::One(artifact("one")),
            Some(labels) => OutputValue::List(labels.iter().map(item).collect()),
        },
    }
}

pub(super) const EXPRESSIONS: Expressions = Expressions {
    resolve_item,
    eval_bool,
};

#[test]
fn the_steps_inside_walk_the_lists_of_the_use() {
    let pipeline = load(&[("main.yaml", MAIN), ("score.yaml", SCORE)]);
    let names: Vec<&str> = pipeline.steps.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["load", "clean/filter", "clean/count", "all"]);
    let (filter, count) = (
        step(&pipeline, "clean/filter"),
        step(&pipeline, "clean/count"),
    );
    assert_eq!(
        filter.params,
        json!({"n": "${{ item._0_n }}", "normalise": true})
    );
    for name in ["clean/filter", "clean/count"] {
        let [level] = levels(&pipeline, name) else {
            panic!("one level");
        };
        assert_eq!(level.walker.as_deref(), Some("clean"));
        assert_eq!(level.max_parallel, Some(2));
        assert_eq!(
            level.bound,
            [("_0_n".to_owned(), json!("${{ item.size }}"))]
        );
        assert!(level.conditions.is_empty());
        let ForeachList::Values(values) = &level.vars["size"] else {
            panic!("plain values");
        };
        assert_eq!(values[..], [json!(3), json!(5)]);
    }
    assert_eq!(filter.inputs["train"], [output("load", "train")]);
    let sibling = Source::Sibling {
        step: "clean/filter".into(),
        output: "train".into(),
        levels: 1,
        many: false,
    };
    assert_eq!(count.inputs["rows"], [sibling]);
    assert_eq!(
        step(&pipeline, "all").inputs["parts"],
        [output("clean/filter", "train")]
    );
    assert_eq!(count.expect, ["lines >= 1"]);
    assert!(filter.expect.is_empty(), "it makes no `metrics`");
    assert_eq!(count.publish["metrics"], "results/${{ item.size }}.json");
}

#[test]
fn each_item_reads_what_was_made_of_it_and_its_own_params() {
    let pipeline = load(&[("main.yaml", MAIN), ("score.yaml", SCORE)]);
    let outputs = |step: &str, _: &str| match step {
        "load" => Some(record(None)),
        "clean/filter" => Some(record(Some(&["3", "5"]))),
        _ => None,
    };
    let expanded = |name: &str| {
        let node = Arc::new(step(&pipeline, name).clone());
        expand(&pipeline, &node, &EXPRESSIONS, outputs)
            .unwrap()
            .unwrap()
    };
    let filters = expanded("clean/filter");
    let ids: Vec<&str> = filters.iter().map(|r| r.id.as_str()).collect();
    assert_eq!(ids, ["clean/filter[3]", "clean/filter[5]"]);
    assert_eq!(filters[1].key_params, json!({"n": 5, "normalise": true}));
    let counts = expanded("clean/count");
    assert_eq!(
        counts[1].command.as_deref(),
        Some("echo '10 plain ${{ left }}' > \"$metrics\"; cat \"$rows\"")
    );
    assert_eq!(counts[1].publish["metrics"], "results/5.json");
    let [
        Entry::Artifact {
            artifact: read,
            label,
        },
    ] = &counts[1].inputs["rows"].entries[..]
    else {
        panic!("one artifact");
    };
    assert_eq!(*read, artifact("5"));
    assert_eq!(label, "rows", "as a step that is not walked would see it");
    assert!(!counts[1].inputs["rows"].list);
}

#[test]
fn an_item_that_is_left_out_is_left_out_of_what_reads_it() {
    let main = MAIN.replace(
        "    in: { rows: load.train }\n",
        "    in: { rows: load.train }\n    when: ${{ item.size > 3 }}\n",
    );
    // Two items of one size would be published to one path.
    let main = main.replace(
        "    publish: { metrics: \"results/${{ item.size }}.json\" }\n",
        "",
    );
    let score = SCORE.replace(
        "    uses: filter-top-n\n",
        "    uses: filter-top-n\n    when: ${{ params.n < 9 }}\n",
    );
    let pipeline = load(&[("main.yaml", &main), ("score.yaml", &score)]);
    let both = "(item.size > 3) and (item._0_n < 9)";
    assert_eq!(step(&pipeline, "clean/filter").when.as_deref(), Some(both));
    let count = step(&pipeline, "clean/count");
    assert_eq!(count.when.as_deref(), Some("item.size > 3"));
    assert_eq!(
        outermost(&pipeline, "clean/count").conditions,
        ["item.size > 3", both]
    );
    let sizes = |sizes: &str| {
        let main = main.replace("[3, 5]", sizes);
        let pipeline = load(&[("main.yaml", &main), ("score.yaml", &score)]);
        let node = Arc::new(step(&pipeline, "clean/count").clone());
        let outputs = |_: &str, _: &str| Some(record(Some(&["4", "4#2", "5"])));
        let all = expand(&pipeline, &node, &EXPRESSIONS, outputs)
            .unwrap()
            .unwrap();
        all.into_iter().map(|r| r.id).collect::<Vec<_>>()
    };
    assert_eq!(
        sizes("[1, 4, 9, 4, 5]"),
        ["clean/count[4]", "clean/count[4#2]", "clean/count[5]"]
    );
}

#[test]
fn lists_that_exist_only_at_run_time_are_walked_too() {
    let judge = "\
in: { adapter: adapter, devset: examples }
out: { scores: score.scores }
steps:
  score:
    uses: evaluate
    in: { adapter: in.adapter, devset: in.devset }
";
    let main = "\
models: { m: { provider: x } }
steps:
  load: { uses: load, with: { path: rows.csv } }
  tune: { uses: finetune, in: { rows: load.train }, with: { model: m } }
  judge:
    uses: ./judge.yaml
    foreach: { checkpoint: tune.checkpoints }
    in:
      adapter: ${{ item.checkpoint }}
      devset: load.test
  select: { uses: select, in: { scores: judge.scores } }
";
    let pipeline = load(&[("main.yaml", main), ("judge.yaml", judge)]);
    let score = step(&pipeline, "judge/score");
    assert_eq!(score.inputs["adapter"], [Source::Item("checkpoint".into())]);
    let ForeachList::Artifacts(sources) = &outermost(&pipeline, "judge/score").vars["checkpoint"]
    else {
        panic!("artifacts");
    };
    assert_eq!(sources[..], [output("tune", "checkpoints")]);
    // A label may hold what parts it from the labels inside the item.
    let node = Arc::new(score.clone());
    let outputs = |step: &str, _: &str| match step {
        "tune" => Some(record(Some(&["a/1", "b"]))),
        _ => Some(record(None)),
    };
    let items = expand(&pipeline, &node, &EXPRESSIONS, outputs)
        .unwrap()
        .unwrap();
    let ids: Vec<&str> = items.iter().map(|r| r.id.as_str()).collect();
    assert_eq!(ids, ["judge/score[a:1]", "judge/score[b]"]);
    let wrong = main
        .replace("adapter: ${{ item.checkpoint }}", "adapter: load.test")
        .replace("devset: load.test", "devset: ${{ item.checkpoint }}");
    let found = mistakes_in(&[("main.yaml", &wrong), ("judge.yaml", judge)]);
    assert!(
        found.iter().any(|m| m.contains("takes `examples`")),
        "{found:#?}"
    );
}

#[test]
fn definitions_within_a_walked_one_walk_along() {
    let outer = "\
params: { n: 1 }
in: { rows: examples }
out: { rows: inner.rows, metrics: inner.metrics }
steps:
  inner:
    uses: ./score.yaml
    in: { rows: in.rows }
    with:
      n: ${{ params.n * 2 }}
      note: \"$${{ kept }}\"
";
    let main = MAIN.replace("./score.yaml", "./outer.yaml");
    let files = [
        ("main.yaml", &*main),
        ("outer.yaml", outer),
        ("score.yaml", SCORE),
    ];
    let pipeline = load(&files);
    let count = step(&pipeline, "clean/inner/count");
    let level = outermost(&pipeline, "clean/inner/count");
    assert_eq!(level.walker.as_deref(), Some("clean"));
    assert_eq!(
        level.bound,
        [
            ("_0_n".to_owned(), json!("${{ item.size }}")),
            ("_1_n".to_owned(), json!("${{ item._0_n * 2 }}")),
        ]
    );
    assert_eq!(
        count.expect,
        ["lines >= 1"],
        "handed on to the step that makes `metrics`"
    );
    let Action::Run(command) = &count.action else {
        panic!("a command");
    };
    assert!(command.contains("$${{ kept }}"), "{command}");
    let node = Arc::new(count.clone());
    let outputs = |_: &str, _: &str| Some(record(Some(&["3", "5"])));
    let items = expand(&pipeline, &node, &EXPRESSIONS, outputs)
        .unwrap()
        .unwrap();
    let command = items[0].command.as_deref().unwrap();
    assert!(
        command.starts_with("echo '12 ${{ kept }} ${{ left }}'"),
        "{command}"
    );
}

#[test]
fn a_step_inside_may_walk_lists_of_its_own_within_each_item() {
    let inner = "\
params:
  n:
in: { rows: examples }
out: { both: join.both }
steps:
  part:
    foreach: { half: [a, b] }
    run: echo '${{ params.n }}${{ item.half }}' > \"$piece\"; cat \"$rows\"
    in: { rows: in.rows }
    out: { piece: piece.txt }
  each:
    foreach: { piece: part.piece }
    run: cat \"$x\" > \"$y\"
    in: { x: \"${{ item.piece }}\" }
    out: { y: y.txt }
  join:
    run: cat \"$all\"/* > \"$both\"
    in: { all: each.y }
    out: { both: both.txt }
";
    let main = "\
steps:
  load: { uses: load, with: { path: rows.csv } }
  cut:
    uses: ./inner.yaml
    foreach: { n: [3, 5] }
    in: { rows: load.train }
    with:
      n: ${{ item.n }}
";
    let pipeline = load(&[("main.yaml", main), ("inner.yaml", inner)]);
    let pieces = ["3/a", "3/b", "5/a", "5/b"];
    let outputs = |step: &str, _: &str| match step {
        "load" => Some(record(None)),
        _ => Some(record(Some(&pieces))),
    };
    let expanded = |name: &str| {
        let node = Arc::new(step(&pipeline, name).clone());
        let items = expand(&pipeline, &node, &EXPRESSIONS, outputs);
        items.unwrap().unwrap()
    };
    let parts = expanded("cut/part");
    let ids: Vec<&str> = parts.iter().map(|r| r.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "cut/part[3/a]",
            "cut/part[3/b]",
            "cut/part[5/a]",
            "cut/part[5/b]"
        ]
    );
    let command = parts[3].command.as_deref().unwrap();
    assert!(command.starts_with("echo '5b'"), "{command}");
    let each = expanded("cut/each");
    let ids: Vec<&str> = each.iter().map(|r| r.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "cut/each[3/a]",
            "cut/each[3/b]",
            "cut/each[5/a]",
            "cut/each[5/b]"
        ]
    );
    let read = |input: &Entry| match input {
        Entry::Artifact { artifact, .. } => artifact.digest,
        Entry::File(_) => panic!("an artifact"),
    };
    assert_eq!(
        read(&each[2].inputs["x"].entries[0]),
        artifact("5/a").digest
    );
    let joined = expanded("cut/join");
    assert_eq!(joined.len(), 2);
    let all = &joined[1].inputs["all"];
    assert!(all.list);
    let digests: Vec<Digest> = all.entries.iter().map(read).collect();
    assert_eq!(digests, [artifact("5/a").digest, artifact("5/b").digest]);
}

#[test]
fn what_is_walked_is_bounded() {
    let list = "1, ".repeat(50_000);
    let main = format!("steps:\n  many:\n    uses: ./steps.yaml\n    foreach: {{ x: [{list}] }}\n");
    let step = |i: usize| format!("  s{i}: {{ run: ls }}\n");
    let steps = format!("steps:\n{}", (0..50).map(step).collect::<String>());
    let found = mistakes_in(&[("main.yaml", &main), ("steps.yaml", &steps)]);
    assert_eq!(
        found.len(),
        1,
        "{:?}",
        found.iter().map(String::len).collect::<Vec<_>>()
    );
    assert!(found[0].contains("values are walked by the steps inside"));
}

#[test]
fn what_a_use_says_is_filled_in_once() {
    let one = "steps:\n  a:\n    run: echo $A\n";
    let main = "steps:\n  x:\n    uses: ./one.yaml\n    env: { A: \"$${{ x }}\" }\n";
    let env = |one: &str| {
        let pipeline = load(&[("main.yaml", main), ("one.yaml", one)]);
        step(&pipeline, "x/a").env["A"].clone()
    };
    assert_eq!(env(one), "${{ x }}");
    // Read once more, per item.
    let walked = one.replace("    run", "    foreach: { i: [1] }\n    run");
    assert_eq!(env(&walked), "$${{ x }}");
}

#[test]
fn gates_go_to_the_step_that_has_the_metrics() {
    let plain = MAIN
        .replace(
            "    foreach:\n      size: ${{ params.sizes }}\n      max_parallel: 2\n",
            "",
        )
        .replace("${{ item.size }}", "3");
    let pipeline = load(&[("main.yaml", &plain), ("score.yaml", SCORE)]);
    assert_eq!(step(&pipeline, "clean/count").expect, ["lines >= 1"]);
    // All outputs of one step: its metrics are meant.
    let score = SCORE.replace("  metrics: count.metrics\n", "");
    let main = plain.replace("    publish: { metrics: \"results/3.json\" }\n", "");
    let pipeline = load(&[("main.yaml", &main), ("score.yaml", &score)]);
    assert_eq!(step(&pipeline, "clean/filter").expect, ["lines >= 1"]);
    assert!(step(&pipeline, "clean/count").expect.is_empty());
    // Beside the gates of its own.
    let score = SCORE.replace(
        "    out: { metrics",
        "    expect: [rows > 0]\n    out: { metrics",
    );
    let pipeline = load(&[("main.yaml", &plain), ("score.yaml", &score)]);
    assert_eq!(
        step(&pipeline, "clean/count").expect,
        ["rows > 0", "lines >= 1"]
    );
}

#[test]
fn each_mistake_of_a_walk_is_found() {
    let cases: &[(&str, &str, &str, &str)] = &[
        (
            "main.yaml",
            "      size: ${{ params.sizes }}",
            "      size: nowhere.list",
            "there is no step `nowhere`",
        ),
        (
            "main.yaml",
            "      n: ${{ item.size }}",
            "      n: ${{ item.sice }}",
            "`foreach` has no variable `sice`",
        ),
        (
            "main.yaml",
            "    in: { parts: clean.rows }",
            "    in: { parts: clean.row }",
            "no output `row`",
        ),
        (
            "main.yaml",
            "in: { rows: load.train }",
            "in: { rows: \"${{ item.size }}\" }",
            "is a plain value, not an artifact",
        ),
        (
            "score.yaml",
            "    in: { rows: filter.train }",
            "    in: { rows: filter.train }\n    foreach: { size: [1] }",
            "`size` is a variable of the `foreach` around already",
        ),
        (
            "score.yaml",
            "    in: { rows: filter.train }",
            "    in: { rows: filter.train }\n    timeout: ${{ params.n }}s",
            "`params.n` depends on the item",
        ),
        (
            "score.yaml",
            "${{ params.note }}",
            "${{ item.size }}",
            "`item` is known only in",
        ),
        (
            "score.yaml",
            "  metrics: count.metrics",
            "  size: count.metrics",
            "does not say whose metrics",
        ),
    ];
    for (file, from, to, words) in cases {
        let changed = |name: &str, text: &str| {
            if name != *file {
                return text.to_owned();
            }
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1)
        };
        let (main, score) = (changed("main.yaml", MAIN), changed("score.yaml", SCORE));
        let found = mistakes_in(&[("main.yaml", &main), ("score.yaml", &score)]);
        assert!(
            found.iter().any(|m| m.contains(words)),
            "{to}: {words}\n{found:#?}"
        );
        let told = found.iter().filter(|m| m.contains(words));
        assert_eq!(told.count(), 1, "once: {found:#?}");
    }
    let single = MAIN.replace(
        "    run: cat \"$parts\"/* > \"$out\"\n    in: { parts: clean.rows }\n    out: { out: out.txt }\n",
        "    uses: filter-top-n\n    in: { train: clean.rows }\n    with: { n: 1 }\n",
    );
    let found = mistakes_in(&[("main.yaml", &single), ("score.yaml", SCORE)]);
    assert!(
        found.iter().any(|m| m.contains("`clean.rows` is a list")),
        "{found:#?}"
    );
}
