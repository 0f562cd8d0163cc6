//! `check` says before a run what a server cannot serve of what is trained.

use serde_json::Value;

use crate::project::Project;

const PIPELINE: &str = "\
models:
  student:
    provider: openai
    base_url: http://127.0.0.1:9/v1
    model: org/base
    adapters: { folder: adapters, load: true }
profiles:
  vllm:
    models: { student: { adapters: { server: vllm, max_rank: 16 } } }
steps:
  train:
    uses: finetune
    in: { messages: { file: rows } }
    with:
      model: student
      lora: { rank: 32 }
      backend:
        command:
          trainer: trl
          config: { use_dora: true }
  score:
    uses: evaluate
    in: { rows: { file: rows }, program: { file: rows }, adapter: train.checkpoints }
    with: { model: student }
";

/// An evaluation of one checkpoint each.
fn each() -> String {
    PIPELINE.replace(
        "    in: { rows: { file: rows }, program: { file: rows }, adapter: train.checkpoints }",
        "    foreach: { one: train.checkpoints }\n    in: { rows: { file: rows }, program: { file: rows }, adapter: \"${{ item.one }}\" }",
    )
}

#[test]
fn what_a_server_may_not_load_is_a_warning_and_what_it_cannot_an_error() {
    let project = Project::new();
    project.write("rows", "");
    project.write("p.yaml", &each());
    let said = project.run(&["check", "p.yaml"]).ok();
    // Two are of the profile.
    assert!(
        said.stdout.contains("no errors, 3 warnings"),
        "{}",
        said.stdout
    );
    for place in [
        "p.yaml:20:31: warning: the server of `org/base` does not load DoRA",
        "p.yaml:16:21: warning: profile `vllm` alone: the server of `org/base` loads adapters of rank 16",
    ] {
        assert!(said.stderr.contains(place), "{}", said.stderr);
    }
    let json = project.run(&["--json", "check", "p.yaml"]).ok();
    let about: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(about["ok"], true);
    assert_eq!(about["warnings"][0]["line"], 20, "{about}");
    assert_eq!(about["warnings"][0]["code"], "not-served");
    assert_eq!(about["warnings"][0].get("profile"), None);
    assert_eq!(about["warnings"][1]["profile"], "vllm");

    let refused = project.run(&["check", "p.yaml", "--profile", "vllm"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    for place in [
        "p.yaml:16:21: error: the server of `org/base` loads adapters of rank 16 at most, not 32",
        "p.yaml:20:31: error: the server of `org/base`, which is vLLM, does not load DoRA",
    ] {
        assert!(
            refused.stderr.contains(place),
            "{place}: {}",
            refused.stderr
        );
    }
    assert!(refused.stderr.contains("2 errors; nothing was run"));
}

#[test]
fn an_entry_whose_adapters_lie_in_two_places_is_refused_where_it_says_so() {
    let project = Project::new();
    project.write("rows", "");
    let said = |adapters: &str| {
        let text = each().replace("{ folder: adapters, load: true }", adapters);
        project.write("p.yaml", &text);
        let refused = project.run(&["check", "p.yaml"]);
        assert_eq!(refused.code, Some(3), "{}", refused.stderr);
        refused.stderr
    };
    for (adapters, place) in [
        (
            "{ folder: adapters, url: 's3://bucket/adapters' }",
            "p.yaml:6:5: error: `folder`, `url` exclude each other: exactly one of",
        ),
        (
            "{ server: vllm }",
            "p.yaml:6:5: error: one of the fields `folder`, `url` is missing",
        ),
        (
            "{ url: bucket/adapters }",
            "p.yaml:6:22: error: the text `bucket/adapters` does not match",
        ),
        (
            "{ url: 's3://bucket/adapters', load: true }",
            "p.yaml:25:20: error: the entry of `org/base`: `adapters.load` goes with `folder`",
        ),
    ] {
        let said = said(adapters);
        assert!(said.contains(place), "{place}: {said}");
    }
}

/// The pipeline that we ship, under each of its profiles.
#[test]
fn the_shipped_pipelines_train_what_their_servers_load() {
    let pipelines = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let banking77 = pipelines.join("banking77.yaml");
    let project = Project::new();
    for profile in [None, Some("full"), Some("rationales"), Some("notebook")] {
        let mut args = vec!["check", banking77.to_str().unwrap()];
        args.extend(profile.iter().flat_map(|name| ["--profile", *name]));
        let said = project.run(&args).ok();
        assert_eq!(said.stderr, "", "{profile:?}");
    }
}
