//! Whole files, right and wrong.
#![allow(clippy::unwrap_used)]

mod conditions;
mod definitions;
mod files;
mod hooks;
mod nested;
mod profiles;
mod runners;
mod together;
mod tracking;
mod walked;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::pipeline::{ForeachList, Source};
use crate::step::{Port, Step, StepContext, StepError, StepOutcome};

/// A kind that only has a shape.
struct Shape {
    kind: &'static str,
    schema: Value,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl Step for Shape {
    fn kind(&self) -> &'static str {
        self.kind
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "A shape."
    }
    fn params_schema(&self) -> Value {
        self.schema.clone()
    }
    fn inputs(&self) -> Vec<Port> {
        self.inputs.clone()
    }
    fn outputs(&self) -> Vec<Port> {
        self.outputs.clone()
    }
    fn run(&self, _: &StepContext) -> Result<StepOutcome, StepError> {
        Ok(StepOutcome::default())
    }
}

fn object(properties: &Value, required: &[&str]) -> Value {
    json!({
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": false,
    })
}

fn vocabulary() -> Vocabulary {
    let examples = |name| Port::new(name, "examples", "");
    let shapes = [
        Shape {
            kind: "load",
            schema: object(&json!({"path": {"type": "string"}}), &["path"]),
            inputs: vec![],
            outputs: vec![examples("train"), examples("test")],
        },
        Shape {
            kind: "filter-top-n",
            schema: object(
                &json!({"n": {"type": "integer", "minimum": 1}, "normalise": {"type": "boolean", "default": true}}),
                &["n"],
            ),
            inputs: vec![examples("train")],
            outputs: vec![examples("train")],
        },
        Shape {
            kind: "finetune",
            schema: object(
                &json!({"lr": {"type": "number", "default": 0.002}, "model": {"type": "string", "x-flowrun-ref": "models"}}),
                &["model"],
            ),
            inputs: vec![examples("rows")],
            outputs: vec![
                Port::new("base", "adapter", ""),
                Port::new("checkpoints", "adapter", "").many(),
            ],
        },
        Shape {
            kind: "evaluate",
            schema: object(&json!({"label": {"type": "string"}}), &[]),
            inputs: vec![examples("devset"), Port::new("adapter", "adapter", "")],
            outputs: vec![Port::new("scores", "scores", "")],
        },
        Shape {
            kind: "select",
            schema: object(&json!({}), &[]),
            inputs: vec![Port::new("scores", "scores", "").many()],
            outputs: vec![Port::new("choice", "json", "")],
        },
    ];
    Vocabulary {
        steps: shapes
            .into_iter()
            .map(|s| (s.kind.to_owned(), Arc::new(s) as Arc<dyn Step>))
            .collect(),
        model_schema: object(
            &json!({"provider": {"type": "string"}, "base_url": {"type": "string"}}),
            &["provider"],
        ),
        program_schema: json!({"type": "object"}),
        unkeyed_model_fields: vec!["base_url".into()],
        runners: runners::kinds(),
        checks: vec![together::check],
    }
}

const GOOD: &str = "\
name: tiny
params:
  labels: 25
  lr: 0.002
models:
  student: { provider: embedded, base_url: http://127.0.0.1:1/v1 }
profiles:
  fast:
    params: { labels: 5 }
    steps:
      finetune: { with: { lr: 0.1 } }
steps:
  load:
    uses: load
    with: { path: rows.csv }
  filter-top-25:
    uses: filter-top-n
    in: { train: load.train }
    with:
      n: ${{ params.labels }}
  finetune:
    uses: finetune
    in: { rows: filter-top-25.train }
    with:
      lr: ${{ params.lr }}
      model: student
  evaluate:
    uses: evaluate
    foreach: { checkpoint: [finetune.base, finetune.checkpoints] }
    in:
      devset: load.test
      adapter: ${{ item.checkpoint }}
    with:
      label: at ${{ item.checkpoint }}
  select:
    uses: select
    in: { scores: evaluate.scores }
  notify:
    run: cat \"$choice\" > \"$receipt\"
    in: { choice: select.choice }
    out: { receipt: receipt.json }
    publish: { receipt: results/receipt.json }
";

fn load_text(text: &str, options: &LoadOptions) -> Result<Pipeline, Diagnostics> {
    load_bytes(text.as_bytes(), options)
}

fn load_bytes(bytes: &[u8], options: &LoadOptions) -> Result<Pipeline, Diagnostics> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.yaml");
    std::fs::write(&file, bytes).unwrap();
    load_pipeline(&file, &vocabulary(), options)
}

/// A folder with these files.
fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

/// Options with a secret that is set.
fn load_options(root: &Path) -> LoadOptions {
    LoadOptions {
        env: [("TOKEN".to_owned(), "secret".to_owned())].into(),
        root: Some(root.to_owned()),
        ..LoadOptions::default()
    }
}

/// The mistakes of `main.yaml` as they are shown, paths relative to its folder.
fn mistakes_in(files: &[(&str, &str)]) -> Vec<String> {
    let dir = project(files);
    let options = load_options(dir.path());
    let loaded = load_pipeline(&dir.path().join("main.yaml"), &vocabulary(), &options);
    let folder = format!("{}/", dir.path().display());
    let shown = |d: &Diagnostic| d.render_plain().replace(&folder, "");
    loaded
        .err()
        .map(|found| found.errors.iter().map(shown).collect())
        .unwrap_or_default()
}

/// The mistakes as text, with the temporary folder taken out.
fn mistakes(text: &str) -> Vec<String> {
    let Err(found) = load_text(text, &LoadOptions::default()) else {
        return vec![];
    };
    found
        .errors
        .iter()
        .map(|d| format!("{}:{}: {}", d.line, d.column, d.message))
        .collect()
}

#[test]
fn a_good_file_is_resolved() {
    let pipeline = load_text(GOOD, &LoadOptions::default()).unwrap();
    let step = |name: &str| pipeline.steps.iter().find(|s| s.name == name).unwrap();
    assert_eq!(
        step("filter-top-25").params,
        json!({"n": 25, "normalise": true})
    );
    assert_eq!(
        step("finetune").params["model"]["base_url"],
        "http://127.0.0.1:1/v1"
    );
    assert_eq!(
        step("finetune").key_params["model"],
        json!({"provider": "embedded"})
    );
    let evaluate = step("evaluate");
    assert_eq!(
        evaluate.inputs["adapter"],
        [Source::Item("checkpoint".into())]
    );
    let walked = &evaluate.foreach.as_ref().unwrap().levels[0].vars["checkpoint"];
    assert!(matches!(walked, ForeachList::Artifacts(sources) if sources.len() == 2));
    assert_eq!(step("notify").publish["receipt"], "results/receipt.json");
}

#[test]
fn profiles_and_sets_lie_over_the_file() {
    let options = LoadOptions {
        profiles: vec!["fast".into()],
        sets: vec![("lr".into(), "0.5".into())],
        ..LoadOptions::default()
    };
    let pipeline = load_text(GOOD, &options).unwrap();
    assert_eq!(pipeline.params["labels"], 5);
    assert_eq!(pipeline.params["lr"], 0.5);
    let finetune = pipeline.steps.iter().find(|s| s.name == "finetune");
    assert_eq!(finetune.unwrap().params["lr"], 0.1);
    for (name, value) in [("label", "3"), ("labels", "many")] {
        let sets = vec![(name.into(), value.into())];
        let options = LoadOptions {
            sets,
            ..LoadOptions::default()
        };
        assert!(load_text(GOOD, &options).is_err(), "--set {name}={value}");
    }
}

#[test]
fn five_mistakes_are_all_told_with_their_places() {
    let text = GOOD
        .replace("uses: filter-top-n", "uses: filter-top")
        .replace("model: student", "model: studnt")
        .replace("devset: load.test", "devset: load.tset")
        .replace(
            "in: { scores: evaluate.scores }",
            "in: { score: evaluate.scores }",
        )
        .replace("path: rows.csv", "path: 3");
    let found = mistakes(&text);
    for (line, words) in [
        (15, "text"),
        (17, "`filter-top`"),
        (26, "`studnt`"),
        (31, "`tset`"),
        (37, "`score`"),
    ] {
        assert!(
            found
                .iter()
                .any(|m| m.starts_with(&format!("{line}:")) && m.contains(words)),
            "line {line}, {words}: {found:#?}"
        );
    }
}

#[test]
fn a_mistake_is_shown_with_its_line_a_caret_and_help() {
    let text = GOOD.replace("uses: filter-top-n", "uses: filter-top");
    let found = load_text(&text, &LoadOptions::default()).err().unwrap();
    let shown = found.errors[0].render_plain();
    for part in [
        "tiny.yaml:17:11",
        "    uses: filter-top",
        "^^^^^^^^^^",
        "did you mean `filter-top-n`?",
    ] {
        assert!(shown.contains(part), "{part} in:\n{shown}");
    }
}

#[test]
fn each_kind_of_mistake_is_found() {
    let with = |from: &str, to: &str| {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replacen(from, to, 1)
    };
    let cases = [
        (
            "cycle",
            with(
                "in: { choice: select.choice }",
                "in: { choice: select.choice }\n    needs: [notify]",
            ),
            "notify",
        ),
        (
            "uses and run",
            with("uses: select", "uses: select\n    run: ls"),
            "run",
        ),
        (
            "type",
            with(
                "in: { rows: filter-top-25.train }",
                "in: { rows: select.choice }",
            ),
            "examples",
        ),
        (
            "list into one",
            with(
                "adapter: ${{ item.checkpoint }}",
                "adapter: finetune.checkpoints",
            ),
            "is a list",
        ),
        (
            "missing input",
            with("    in: { train: load.train }\n", ""),
            "train",
        ),
        ("missing param", with("      model: student\n", ""), "model"),
        ("range", with("n: ${{ params.labels }}", "n: 0"), "n"),
        (
            "unknown variable",
            with("params.labels }}", "params.lables }}"),
            "lables",
        ),
        (
            "secret",
            with("run: cat", "secrets: [FLOWRUN_NO_SUCH]\n    run: cat"),
            "FLOWRUN_NO_SUCH",
        ),
        (
            "file",
            with(
                "{ choice: select.choice }",
                "{ choice: { file: nowhere.txt } }",
            ),
            "nowhere.txt",
        ),
        (
            "publish outside",
            with("results/receipt.json", "../receipt.json"),
            "..",
        ),
        (
            "unknown key",
            with("name: tiny", "name: tiny\nnmae: x"),
            "nmae",
        ),
        (
            "duplicate key",
            with("  labels: 25", "  labels: 25\n  labels: 26"),
            "labels",
        ),
        (
            "runner",
            with("uses: select", "uses: select\n    runner: ray"),
            "ray",
        ),
        (
            "model entry",
            with("provider: embedded,", "providr: embedded,"),
            "providr",
        ),
        ("syntax", with("params:", "params: ["), ""),
    ];
    for (name, text, word) in cases {
        let found = mistakes(&text);
        assert!(!found.is_empty(), "{name}: accepted");
        assert!(found.iter().any(|m| m.contains(word)), "{name}: {found:#?}");
    }
}

#[test]
fn bombs_and_odd_bytes_are_mistakes() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let before = format!("*a{}", i - 1);
        bomb.push_str(&format!("a{i}: &a{i} [{}]\n", vec![before; 10].join(", ")));
    }
    assert!(!mistakes(&bomb).is_empty());
    assert!(!mistakes(&"[".repeat(100_000)).is_empty());
    assert!(!mistakes("name: \u{0}x\nsteps: {}\n").is_empty());
    assert!(load_bytes(b"name: \xff\xfe\n", &LoadOptions::default()).is_err());
    assert!(!mistakes("").is_empty());
}

#[test]
fn columns_count_characters_and_lines_survive_carriage_returns() {
    let text = GOOD.replace(
        "in: { scores: evaluate.scores }",
        "about: größe\n    in: { scores: evaluate.scorés }",
    );
    let unix = mistakes(&text);
    assert_eq!(unix.len(), 1, "{unix:#?}");
    assert!(unix[0].starts_with("38:19:"), "{unix:#?}");
    assert_eq!(mistakes(&text.replace('\n', "\r\n")), unix);
}

#[test]
fn the_root_is_around_pipelines() {
    assert_eq!(
        project_root(Path::new("a/pipelines/x.yaml")),
        PathBuf::from("a")
    );
    assert_eq!(project_root(Path::new("a/x.yaml")), PathBuf::from("a"));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = load_bytes(&bytes, &LoadOptions::default());
    }

    #[test]
    fn no_edit_of_a_good_file_makes_it_panic(at in 0..GOOD.len(), cut in 0usize..40, put in "[ -~\n]{0,12}") {
        let mut text = GOOD.to_owned();
        text.replace_range(at..(at + cut).min(GOOD.len()), &put);
        let _ = load_text(&text, &LoadOptions::default());
    }
}
