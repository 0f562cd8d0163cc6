//! The layers, and what the documents promise.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Who may import whom among our packages.
const ALLOWED: &[(&str, &[&str])] = &[
    ("flowrun-cache", &[]),
    ("flowrun-engine", &["flowrun-cache"]),
    ("flowrun-lm", &["flowrun-cache"]),
    ("flowrun-model", &[]),
    (
        "flowrun-steps",
        &[
            "flowrun-cache",
            "flowrun-engine",
            "flowrun-lm",
            "flowrun-model",
        ],
    ),
    (
        "flowrun",
        &[
            "flowrun-cache",
            "flowrun-engine",
            "flowrun-lm",
            "flowrun-steps",
        ],
    ),
];

#[test]
fn the_layers_hold() {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = ALLOWED.iter().find(|(n, _)| *n == name).unwrap();
        let used: BTreeSet<&str> = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|d| d["name"].as_str())
            .filter(|n| n.starts_with("flowrun"))
            .collect();
        for other in used {
            assert!(allowed.contains(&other), "{name} must not import {other}");
        }
    }
}

#[test]
fn the_tests_that_the_faults_of_serving_name_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let page = read("docs/design/serving.md");
    let (_, section) = page.split_once("\n## Faults\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let named = section.split('`').filter_map(|word| word.split_once("::"));
    let mut count = 0;
    for (file, test) in named {
        let source = read(&format!("tests/end_to_end/{file}.rs"));
        assert!(
            source.contains(&format!("#[test]\nfn {test}() {{")),
            "{file}::{test}"
        );
        count += 1;
    }
    assert!(count > 15, "{count}");
}

#[test]
fn the_generated_schemas_are_current() {
    let project = crate::project::Project::new();
    for (args, name) in [
        (&["schema"][..], "pipeline"),
        (&["schema", "--definition"], "step-definition"),
    ] {
        let schema = project.run(args).ok().stdout;
        let file = format!("schemas/{name}.schema.json");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&file);
        let kept = std::fs::read_to_string(path).unwrap();
        let differs = kept.lines().zip(schema.lines()).position(|(a, b)| a != b);
        // The whole texts would be thousands of lines.
        assert!(
            kept == schema,
            "line {:?} differs; run `cargo run -- {} > {file}`",
            differs.map(|line| line + 1),
            args.join(" "),
        );
    }
}

/// The blocks of a page that begin with the name of a file, by section.
fn files_of(page: &str) -> Vec<Vec<(String, String)>> {
    let sections = page.split("\n## ");
    let blocks = |section: &str| {
        let blocks = section.split("```yaml\n# ").skip(1);
        let block = |text: &str| {
            let (name, rest) = text.split_once('\n').unwrap();
            let (text, _) = rest.split_once("```").unwrap();
            (name.to_owned(), text.to_owned())
        };
        blocks.map(block).collect::<Vec<_>>()
    };
    sections.map(blocks).filter(|b| !b.is_empty()).collect()
}

#[test]
fn the_examples_of_the_language_page_run() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pipeline-language.md");
    let page = std::fs::read_to_string(path).unwrap();
    let sections = files_of(&page);
    assert_eq!(sections.len(), 5);
    for files in sections {
        let project = crate::project::Project::new();
        for (name, text) in &files {
            project.write(name, text);
        }
        project.run(&["pipeline.yaml"]).ok();
    }
}

#[test]
fn the_steps_of_another_round_fit_the_main_job() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let page = read("docs/connected.md");
    let (_, section) = page.split_once("\n## Another round\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```yaml\n").skip(1);
    let blocks: Vec<&str> = blocks.map(|b| b.split("```").next().unwrap()).collect();
    let [chosen, walked] = blocks[..] else {
        panic!("{} blocks", blocks.len());
    };
    let main = read("pipelines/banking77.yaml");
    let (before, rest) = chosen.split_once("  relabel:\n").unwrap();
    let (_, after) = rest.split_once("  convert-2:\n").unwrap();
    let by_all = format!("{before}{walked}  convert-2:\n{after}");
    for steps in [chosen, by_all.as_str()] {
        let project = crate::project::Project::new();
        project.write("pipeline.yaml", &format!("{main}{steps}"));
        project.run(&["check", "pipeline.yaml"]).ok();
    }
}

#[test]
fn the_language_page_names_every_field() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/pipeline-language.md")).unwrap();
    let schema = std::fs::read_to_string(root.join("schemas/pipeline.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let step = &schema["$defs"]["StepSpec"]["properties"];
    for fields in [&schema["properties"], step] {
        for field in fields.as_object().unwrap().keys() {
            assert!(page.contains(&format!("`{field}`")), "{field}");
        }
    }
}
