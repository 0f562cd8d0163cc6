//! The file for programs.

use serde_json::{Value, json};

use super::sample;
use crate::report::Report;

/// The names and kinds of a value, without its figures; a list is told by its first entry.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), shape(v))).collect(),
        Value::Array(list) => list.iter().take(1).map(shape).collect(),
        Value::String(_) => json!("text"),
        Value::Number(n) if n.is_f64() => json!("share"),
        Value::Number(_) => json!("count"),
        Value::Bool(_) => json!("bool"),
        Value::Null => json!("none"),
    }
}

#[test]
fn the_shape_of_report_json_is_kept() {
    let score = |role: bool| {
        let mut score = json!({
            "model": "text", "program": "text", "n": "count", "correct": "count",
            "accuracy": "share", "parse_failures": "count", "low": "share", "high": "share",
            "leakage": "none",
        });
        if role {
            score["role"] = json!("text");
            score["leakage"] = json!({
                "known": "bool", "trained": "count", "selected": "count", "taught": "count", "same_text": "count",
                "clean_rows": "count", "clean_correct": "count",
            });
        }
        json!([score])
    };
    let expected = json!({
        "version": "count", "title": "text", "about": "text", "pipeline": "text",
        "generated_at": "text", "dataset": "text", "stand_in": "bool",
        "data": {
            "train_rows": "count", "test_rows": "count", "labels": ["text"],
            "labelled_rows": "count", "unlabelled_rows": "count", "source": "text",
        },
        "oracle": {
            "model": "text", "labelled": "count", "kept": "count",
            "dropped": { "label outside the set": "count" },
            "audited": "count", "audit_accuracy": "share", "kept_accuracy": "share",
        },
        "training": [{ "step": "count", "epoch": "count", "loss": "share" }],
        "dev": score(false),
        "test": score(true),
        "comparisons": [{
            "a": "text", "a_program": "text", "b": "text", "b_program": "text", "b_only": "count", "a_only": "count", "p_value": "share",
        }],
        "confusion": { "labels": ["text"], "matrix": [["count"]] },
        "per_label": [{
            "label": "text", "n": "count", "precision": "share", "recall": "share", "f1": "share",
        }],
        "calibration": "none",
        "errors": [{
            "id": "text", "text": "text", "gold": "text", "predicted": "text",
            "confidence": "share", "raw": "none",
        }],
        "steps": [{
            "step": "text", "kind": "text", "took_ms": "count", "tokens": "count",
            "cost_usd": "none", "status": "text",
        }],
        "cost": [{
            "model": "text", "program": "text", "queries": "count", "tokens_per_query": "share",
            "ms_per_query": "share", "usd_per_1000": "share",
        }],
        "notes": ["text"],
    });
    assert_eq!(
        shape(&serde_json::to_value(sample(true)).unwrap()),
        expected
    );
}

#[test]
fn report_json_uses_the_words_that_readers_rely_on_and_comes_back_equal() {
    let report = sample(true);
    let text = serde_json::to_string(&report).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["dataset"], "stand-in");
    assert_eq!(value["dev"][0]["program"], "plain");
    assert_eq!(value["dev"][1]["program"], "optimised");
    let roles: Vec<_> = value["test"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["role"])
        .collect();
    assert_eq!(roles, ["best", "base", "oracle", "baseline"]);
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
}
