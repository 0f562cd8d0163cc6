//! `uses: ./file.yaml`.

use std::sync::Arc;

use serde_json::json;

use super::walked::{EXPRESSIONS, record, step};
use super::{load_options, mistakes_in, project, vocabulary};
use crate::expansion::expand;
use crate::language::load_pipeline;
use crate::pipeline::{Pipeline, Source};

/// Filters rows down to the most frequent labels, then notes how many there were.
const CLEAN: &str = "\
about: Keep the frequent labels.
params:
  n:
  normalise: true
in:
  rows: examples
  note: { type: any, optional: true }
out:
  rows: filter.train
  size: count.size
steps:
  filter:
    uses: filter-top-n
    in: { train: in.rows }
    with:
      n: ${{ params.n }}
      normalise: ${{ params.normalise }}
  count:
    run: wc -l < \"$rows\" > \"$size\"; cat \"${note:-/dev/null}\"
    in: { rows: filter.train, note: in.note }
    out: { size: size.txt }
";

const MAIN: &str = "\
params: { labels: 25 }
steps:
  load:
    uses: load
    with: { path: rows.csv }
  clean:
    uses: ./clean.yaml
    in: { rows: load.train }
    with:
      n: ${{ params.labels }}
  show:
    run: cat \"$rows\" \"$size\" > \"$all\"
    in: { rows: clean.rows, size: clean.size }
    out: { all: all.txt }
    needs: [clean]
";

fn load(files: &[(&str, &str)]) -> Pipeline {
    let dir = project(files);
    let options = load_options(dir.path());
    load_pipeline(&dir.path().join("main.yaml"), &vocabulary(), &options).unwrap()
}

fn names(pipeline: &Pipeline) -> Vec<&str> {
    pipeline.steps.iter().map(|s| s.name.as_str()).collect()
}

fn output(step: &str, output: &str) -> Source {
    Source::Output {
        step: step.into(),
        output: output.into(),
    }
}

#[test]
fn the_steps_of_a_definition_stand_in_its_place() {
    let pipeline = load(&[("main.yaml", MAIN), ("clean.yaml", CLEAN)]);
    assert_eq!(
        names(&pipeline),
        ["load", "clean/filter", "clean/count", "show"]
    );
    let [load, filter, count, show] = &pipeline.steps[..] else {
        unreachable!("four steps")
    };
    assert_eq!(load.name, "load");
    assert_eq!(filter.params, json!({"n": 25, "normalise": true}));
    assert_eq!(filter.inputs["train"], [output("load", "train")]);
    assert_eq!(count.inputs["rows"], [output("clean/filter", "train")]);
    assert!(!count.inputs.contains_key("note"), "left out by the use");
    assert_eq!(show.inputs["rows"], [output("clean/filter", "train")]);
    assert_eq!(show.inputs["size"], [output("clean/count", "size")]);
    assert_eq!(show.needs, ["clean/filter", "clean/count"]);
    let used = &pipeline.uses["clean"];
    assert_eq!(used.about.as_deref(), Some("Keep the frequent labels."));
    assert!(used.file.ends_with("clean.yaml"));
    assert_eq!(pipeline.named("clean").len(), 2);
}

#[test]
fn an_input_that_takes_a_list_is_one_for_a_command_whatever_is_given() {
    let join = "\
in:
  parts: { type: file, many: true }
  one: file
out: { all: join.all }
steps:
  join:
    run: cat \"$parts\"/* \"$one\" > \"$all\"
    in: { parts: in.parts, one: in.one }
    out: { all: all.txt }
";
    for (parts, count) in [("a.o", 1), ("[a.o]", 1), ("[a.o, b.o]", 2)] {
        let main = format!(
            "steps:\n  a: {{ run: 'echo > $o', out: {{ o: o }} }}\n  b: {{ run: 'echo > $o', out: {{ o: o }} }}\n  \
             j:\n    uses: ./join.yaml\n    in: {{ parts: {parts}, one: a.o }}\n"
        );
        let pipeline = load(&[("main.yaml", &main), ("join.yaml", join)]);
        let node = Arc::new(step(&pipeline, "j/join").clone());
        let one = |_: &str, _: &str| Some(record(None));
        let requests = expand(&pipeline, &node, &EXPRESSIONS, one).unwrap();
        let requests = requests.unwrap_or_default();
        let inputs = &requests[0].inputs;
        assert!(inputs["parts"].list && !inputs["one"].list, "{parts}");
        assert_eq!(inputs["parts"].entries.len(), count, "{parts}");
    }
    let main = "steps:\n  a: { run: 'echo > $o', out: { o: o } }\n  b: { run: 'cat $x $y/*', in: { x: a.o, y: [a.o] } }\n";
    let pipeline = load(&[("main.yaml", main)]);
    assert_eq!(Vec::from_iter(&step(&pipeline, "b").lists), ["y"]);
}

#[test]
fn definitions_nest_and_paths_are_relative_to_their_file() {
    let outer = "\
params: { n: 3 }
in: { rows: examples }
out: { rows: inner.rows }
steps:
  inner:
    uses: ../shared/clean.yaml
    in: { rows: in.rows }
    with:
      n: ${{ params.n * 2 }}
";
    let main = MAIN
        .replace("./clean.yaml", "steps/outer.yaml")
        .replace(", size: clean.size", "")
        .replace(" \"$size\"", "");
    let pipeline = load(&[
        ("main.yaml", &main),
        ("steps/outer.yaml", outer),
        ("shared/clean.yaml", CLEAN),
    ]);
    assert_eq!(
        names(&pipeline),
        ["load", "clean/inner/filter", "clean/inner/count", "show"]
    );
    assert_eq!(pipeline.steps[1].params["n"], 50);
    assert_eq!(
        pipeline.steps[3].inputs["rows"],
        [output("clean/inner/filter", "train")]
    );
    assert_eq!(pipeline.steps[3].needs.len(), 2);
}

#[test]
fn what_the_use_says_holds_for_the_steps_inside() {
    let main = MAIN.replace(
        "    in: { rows: load.train }\n",
        "    in: { rows: load.train }
    needs: [wait]
    when: ${{ params.labels > 5 }}
    env: { MODE: fast }
    secrets: [TOKEN]
    retry: { times: 7 }
    timeout: 3m
    runner: process
    publish: { size: results/size.txt }
",
    ) + "  wait: { run: sleep 0 }\n";
    let pipeline = load(&[("main.yaml", &main), ("clean.yaml", CLEAN)]);
    let step = |name: &str| pipeline.steps.iter().find(|s| s.name == name).unwrap();
    for name in ["clean/filter", "clean/count"] {
        let step = step(name);
        assert_eq!(step.needs, ["wait"], "{name}");
        assert_eq!(step.when.as_deref(), Some("true"), "{name}");
        assert_eq!(step.env["MODE"], "fast");
        assert_eq!(step.secrets, ["TOKEN"]);
        assert_eq!(step.retry.times, 7);
        assert_eq!(step.timeout.unwrap().as_secs(), 180);
    }
    assert_eq!(step("clean/count").publish["size"], "results/size.txt");
    assert!(step("clean/filter").publish.is_empty());
}

#[test]
fn conditions_see_their_own_params() {
    let clean = CLEAN.replace("    run: wc", "    when: ${{ params.n > 9 }}\n    run: wc");
    let when = |labels: u32, outer: &str| {
        let main = MAIN
            .replace("labels: 25", &format!("labels: {labels}"))
            .replace(
                "    uses: ./clean.yaml\n",
                &format!("    uses: ./clean.yaml\n{outer}"),
            );
        let pipeline = load(&[("main.yaml", &main), ("clean.yaml", &clean)]);
        let when = |i: usize| pipeline.steps[i].when.clone();
        (when(1), when(2))
    };
    let text = |t: &str| Some(t.to_owned());
    assert_eq!(when(25, ""), (None, text("true")));
    assert_eq!(when(5, ""), (None, text("false")));
    let never = "    when: params.labels > 99\n";
    assert_eq!(when(25, never), (text("false"), text("false")));
}

#[test]
fn a_mistake_inside_is_shown_there_and_at_each_use() {
    let clean = CLEAN.replace("uses: filter-top-n", "uses: filter-top");
    let twice = MAIN.replace(
        "  show:",
        "  again:
    uses: ./clean.yaml
    in: { rows: load.train }
    with: { n: 1 }
  show:",
    );
    let found = mistakes_in(&[("main.yaml", &twice), ("clean.yaml", &clean)]);
    assert_eq!(found.len(), 1, "{found:#?}");
    for part in [
        "clean.yaml:13:11: error: there is no step kind `filter-top`",
        "uses: filter-top",
        "note: used by the step `clean` at main.yaml:7:11",
        "note: used by the step `again` at main.yaml:12:11",
        "did you mean `filter-top-n`?",
    ] {
        assert!(found[0].contains(part), "{part} in:\n{}", found[0]);
    }
}

#[test]
fn a_param_that_does_not_fit_inside_names_both_places() {
    let main = MAIN.replace("labels: 25", "labels: 0");
    let found = mistakes_in(&[("main.yaml", &main), ("clean.yaml", CLEAN)]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(
        found[0].starts_with("clean.yaml:16:10: error:"),
        "{}",
        found[0]
    );
    assert!(
        found[0].contains("used by the step `clean` at main.yaml:7:11"),
        "{}",
        found[0]
    );
}

#[test]
fn each_mistake_of_a_use_is_found() {
    let cases: &[(&str, &str, &str, &str)] = &[
        (
            "n: ${{ params.labels }}",
            "m: 3",
            "main.yaml:10:7",
            "no param `m`",
        ),
        (
            "n: ${{ params.labels }}",
            "normalise: false",
            "main.yaml:9:5",
            "needs the param `n`",
        ),
        (
            "n: ${{ params.labels }}",
            "n: 3\n      normalise: 4",
            "main.yaml:11:18",
            "true or false",
        ),
        (
            "rows: load.train",
            "row: load.train",
            "main.yaml:8:11",
            "no input `row`",
        ),
        (
            "rows: load.train",
            "note: load.train",
            "main.yaml:8:5",
            "needs the input `rows`",
        ),
        (
            "rows: load.train",
            "rows: load.trian",
            "main.yaml:8:17",
            "no output `trian`",
        ),
        (
            "rows: load.train",
            "rows: [load.train, load.test]",
            "main.yaml:8:11",
            "takes one artifact",
        ),
        (
            "rows: clean.rows",
            "rows: clean.row",
            "main.yaml:13:17",
            "no output `row`",
        ),
        (
            "rows: clean.rows",
            "rows: clean",
            "main.yaml:13:17",
            "which output of `clean`?",
        ),
        (
            "rows: clean.rows",
            "rows: clean/filter.train",
            "main.yaml:13:17",
            "inside the definition",
        ),
        (
            "needs: [clean]",
            "needs: [clena]",
            "main.yaml:15:13",
            "no step `clena`",
        ),
        (
            "./clean.yaml",
            "./claen.yaml",
            "main.yaml:7:11",
            "cannot read",
        ),
        (
            "    uses: ./clean.yaml",
            "    uses: ./clean.yaml\n    out: { x: x.txt }",
            "main.yaml:8:5",
            "`out` cannot stand",
        ),
        (
            "    uses: ./clean.yaml",
            "    uses: ./clean.yaml\n    expect: [n > 1]",
            "main.yaml:8:5",
            "does not say whose metrics",
        ),
        (
            "    uses: ./clean.yaml",
            "    uses: ./clean.yaml\n    publish: { rwos: x }",
            "main.yaml:8:16",
            "no output `rwos`",
        ),
        (
            "    uses: ./clean.yaml",
            "    uses: ./clean.yaml\n    whne: x",
            "main.yaml:8:5",
            "whne",
        ),
    ];
    for (from, to, place, words) in cases {
        assert!(MAIN.contains(from), "{from}");
        let main = MAIN.replacen(from, to, 1);
        let found = mistakes_in(&[("main.yaml", &main), ("clean.yaml", CLEAN)]);
        assert!(
            found
                .iter()
                .any(|m| m.starts_with(place) && m.contains(words)),
            "{to}: {place} {words}\n{found:#?}"
        );
    }
}

#[test]
fn each_mistake_of_a_definition_is_found() {
    let cases: &[(&str, &str, &str, &str)] = &[
        (
            "train: in.rows",
            "train: in.row",
            "clean.yaml:14:18",
            "no input `row`",
        ),
        (
            "train: in.rows",
            "train: load.train",
            "clean.yaml:14:18",
            "no step `load`",
        ),
        (
            "rows: examples",
            "rows: adapter",
            "clean.yaml:14:18",
            "takes `examples`",
        ),
        (
            "rows: examples",
            "rows: adapter",
            "main.yaml:8:17",
            "takes `adapter`",
        ),
        (
            "rows: examples",
            "rows: { tpye: examples }",
            "clean.yaml:6:",
            "tpye",
        ),
        (
            "rows: examples",
            "rows: { type: examples, many: true }",
            "clean.yaml:14:18",
            "is a list",
        ),
        (
            "rows: filter.train",
            "rows: filter.rows",
            "clean.yaml:9:9",
            "no output `rows`",
        ),
        (
            "rows: filter.train",
            "rows: in.rows",
            "clean.yaml:9:9",
            "is an input",
        ),
        (
            "rows: filter.train",
            "rows: fitler.train",
            "clean.yaml:9:9",
            "no step `fitler`",
        ),
        (
            "  filter:\n",
            "  in:\n",
            "clean.yaml:12:3",
            "stands for the inputs",
        ),
        ("about: Keep", "abuot: Keep", "clean.yaml:1:1", "abuot"),
        (
            "normalise: true",
            "normalise: ${{ params.n }}",
            "clean.yaml:4:14",
            "plain value",
        ),
        (
            "note: in.note",
            "note: in.note\n    with: {}",
            "clean.yaml:",
            "",
        ),
    ];
    for (from, to, place, words) in cases {
        assert!(CLEAN.contains(from), "{from}");
        let clean = CLEAN.replacen(from, to, 1);
        let found = mistakes_in(&[("main.yaml", MAIN), ("clean.yaml", &clean)]);
        assert!(
            found
                .iter()
                .any(|m| m.starts_with(place) && m.contains(words)),
            "{to}: {place} {words}\n{found:#?}"
        );
    }
    let no_map = mistakes_in(&[("main.yaml", MAIN), ("clean.yaml", "[1]")]);
    assert!(no_map[0].contains("is a map, not a list"), "{no_map:#?}");
    let no_steps = mistakes_in(&[("main.yaml", MAIN), ("clean.yaml", "about: x\n")]);
    assert!(
        no_steps.iter().any(|m| m.contains("has no steps")),
        "{no_steps:#?}"
    );
}

#[test]
fn definitions_that_use_each_other_are_an_error_with_their_path() {
    let using = |name: &str| format!("steps:\n  next: {{ uses: ./{name}.yaml }}\n");
    let found = mistakes_in(&[
        ("main.yaml", &using("a")),
        ("a.yaml", &using("b")),
        ("b.yaml", &using("a")),
    ]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(
        found[0].contains("use each other: `a.yaml -> b.yaml -> a.yaml`"),
        "{}",
        found[0]
    );
    assert!(found[0].starts_with("b.yaml:2:17"), "{}", found[0]);
    let doubling = |i: u32| {
        format!(
            "steps:\n  l: {{ uses: ./d{0}.yaml }}\n  r: {{ uses: ./d{0}.yaml }}\n",
            i + 1
        )
    };
    let mut files: Vec<(String, String)> = (0..20)
        .map(|i| (format!("d{i}.yaml"), doubling(i)))
        .collect();
    files.push(("d20.yaml".into(), "steps:\n  x: { run: ls }\n".into()));
    files.push(("main.yaml".into(), using("d0")));
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    let found = mistakes_in(&files);
    assert!(
        found.iter().any(|m| m.contains("inside each other")),
        "bounded"
    );
}

#[test]
fn a_name_with_a_slash_cannot_be_written() {
    let found = mistakes_in(&[("main.yaml", "steps:\n  a/b: { run: ls }\n")]);
    assert!(found[0].contains("`a/b` is not a step name"), "{found:#?}");
}
