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
fn the_generated_schemas_are_current() {
    let project = crate::project::Project::new();
    let schema = project.run(&["schema"]).ok().stdout;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/pipeline.schema.json");
    let kept = std::fs::read_to_string(path).unwrap();
    let differs = kept.lines().zip(schema.lines()).position(|(a, b)| a != b);
    // The whole texts would be thousands of lines.
    assert!(
        kept == schema,
        "line {:?} differs; run `cargo run -- schema > schemas/pipeline.schema.json`",
        differs.map(|line| line + 1)
    );
}
