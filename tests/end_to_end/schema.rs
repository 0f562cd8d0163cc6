//! The JSON Schemas, as an editor's language server uses them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::project::Project;

struct Schemas {
    pipeline: jsonschema::Validator,
    definition: jsonschema::Validator,
}

impl Schemas {
    fn new() -> Self {
        let of = |name: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("schemas")
                .join(name);
            let schema: Value =
                serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            jsonschema::meta::validate(&schema).unwrap();
            jsonschema::validator_for(&schema).unwrap()
        };
        Self {
            pipeline: of("pipeline.schema.json"),
            definition: of("step-definition.schema.json"),
        }
    }

    /// What an editor would underline.
    fn underlined(&self, value: &Value, text: &str) -> Vec<String> {
        let schema = if text.contains("step-definition.schema.json") {
            &self.definition
        } else {
            &self.pipeline
        };
        let errors = schema.iter_errors(value);
        errors
            .map(|e| format!("{}: {e}", e.instance_path()))
            .collect()
    }
}

fn yaml(text: &str) -> Value {
    serde_yaml::from_str(text).unwrap()
}

fn yaml_files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            yaml_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "yaml") {
            into.push(path);
        }
    }
}

#[test]
fn all_files_that_are_shipped_are_valid() {
    let schemas = Schemas::new();
    let mut files = Vec::new();
    for folder in ["pipelines", "examples"] {
        yaml_files(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut files,
        );
    }
    assert!(files.len() >= 5, "{files:?}");
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let underlined = schemas.underlined(&yaml(&text), &text);
        assert!(underlined.is_empty(), "{}: {underlined:#?}", file.display());
    }
}

/// Valid wherever a number, a choice or a map is asked for, and for all fields there are.
const EXPRESSIONS: &str = "\
name: all
about: Every field.
params: { n: 3, list: [1, 2], none: }
include: [other.yaml]
pools:
  gpu: ${{ params.n }}
  api: 4
models:
  m: { provider: openai, base_url: http://localhost:1/v1, model: x, concurrency: \"${{ params.n }}\" }
profiles:
  p: { about: x, params: { n: 4 }, pools: { api: 2 }, steps: { a: { with: { n: 4 } }, gone: }, hooks: { h: } }
hooks:
  h: { about: x, on: [failed], command: [ls, -l], secrets: [TOKEN], timeout: 5s }
  w: { webhook: { url: \"https://x/${TOKEN}\", headers: { a: b }, retries: \"${{ params.n }}\" } }
tracking:
  mlflow: { experiment: x, artifacts: [a.train], register: { name: m, output: a.train } }
  tensorboard: { folder: x }
steps:
  a:
    uses: filter-top-n
    in: { train: load.train, test: load.test }
    with:
      n: ${{ params.n }}
    needs: [b]
    when: ${{ params.n > 2 }}
    env: { A: 1, B: \"${{ params.n }}\", C: true }
    secrets: [TOKEN]
    retry: { times: \"${{ params.n }}\", backoff: 2s }
    timeout: 5m
    resources: { cpu: \"${{ params.n }}\", memory: 4GB, gpu: 0.5 }
    pool: api
    runner: process
    cache: never
    publish: { train: results/train }
    expect: [rows > 3]
  b:
    run: echo ${{ item.i }} > $out
    foreach:
      i: ${{ params.list }}
      max_parallel: ${{ params.n }}
    in: { x: { file: a.txt }, y: [a.train, a.test] }
    out: { out: out.txt }
  c:
    uses: ./steps/c.yaml
    in: { rows: a.train }
    with: { anything: 1 }
  d:
    foreach: { checkpoint: [finetune.base, finetune.checkpoints] }
    uses: evaluate
    in: { rows: a.test, adapter: \"${{ item.checkpoint }}\" }
    with: { model: m }
";

#[test]
fn expressions_may_stand_where_numbers_are_asked_for() {
    let underlined = Schemas::new().underlined(&yaml(EXPRESSIONS), EXPRESSIONS);
    assert!(underlined.is_empty(), "{underlined:#?}");
}

#[test]
fn what_is_wrong_is_underlined() {
    let schemas = Schemas::new();
    for (from, to) in [
        ("uses: filter-top-n", "uses: filter-top"),
        (
            "    with:\n      n: ${{ params.n }}",
            "    with:\n      n: many",
        ),
        (
            "    with:\n      n: ${{ params.n }}",
            "    with:\n      nn: 3",
        ),
        ("in: { train: load.train, ", "in: { tarin: load.train, "),
        ("runner: process", "runner: nomad"),
        ("cache: never", "cache: sometimes"),
        ("timeout: 5m", "timeout: [5]"),
        ("timeout: 5m", "timeuot: 5m"),
        ("  api: 4", "  api: 0"),
        ("  api: 4", "  api: lots"),
        (
            "      max_parallel: ${{ params.n }}",
            "      max_parallel: 0",
        ),
        ("retry: { times: \"${{ params.n }}\"", "retry: { times: -1"),
        ("provider: openai", "provider: opneai"),
        ("needs: [b]", "needs: b"),
        ("on: [failed]", "on: [fails]"),
        ("headers: { a: b }", "headers: { a: [b] }"),
        ("experiment: x", "experimant: x"),
        ("{ file: a.txt }", "{ path: a.txt }"),
    ] {
        assert!(EXPRESSIONS.contains(from), "{from}");
        let text = EXPRESSIONS.replacen(from, to, 1);
        assert!(!schemas.underlined(&yaml(&text), &text).is_empty(), "{to}");
    }
    let definition = "# step-definition.schema.json\n";
    for (text, good) in [
        (
            "in: { rows: examples, x: { type: any, optional: true } }\nout: { y: a.b }\nsteps: { a: { run: ls } }",
            true,
        ),
        ("in: { rows: { about: no type } }", false),
        ("in: { rows: 3 }", false),
        ("out: { y: [a.b] }", false),
        ("models: {}", false),
        ("steps: { a: { uses: filter-top } }", false),
    ] {
        let text = format!("{definition}{text}");
        assert_eq!(
            schemas.underlined(&yaml(&text), &text).is_empty(),
            good,
            "{text}"
        );
    }
}

#[test]
fn the_schema_of_each_step_kind_fits_what_pipelines_give_it() {
    let project = Project::new();
    let kinds = project.kinds();
    assert!(kinds.contains(&"finetune".to_owned()), "{kinds:?}");
    for kind in kinds {
        let schema: Value =
            serde_json::from_str(&project.run(&["schema", &kind]).ok().stdout).unwrap();
        jsonschema::meta::validate(&schema).unwrap();
        assert_eq!(schema["title"], json!(kind));
        let validator = jsonschema::validator_for(&schema).unwrap();
        assert!(!validator.is_valid(&json!({"no-such-param": 1})), "{kind}");
    }
}
