//! What a batch is made of: entries of the lengths that MLflow takes.

use serde_json::{Value, json};

/// Characters of a name.
const NAME: usize = 250;

pub(super) fn metric(name: &str, value: f64, at: u64, step: u64) -> Value {
    json!({ "key": cut(name, NAME), "value": value, "timestamp": at, "step": step })
}

pub(super) fn pair(name: &str, value: &str, longest: usize) -> Value {
    json!({ "key": cut(name, NAME), "value": cut(value, longest) })
}

/// The first characters.
fn cut(text: &str, longest: usize) -> String {
    text.chars().take(longest).collect()
}

/// A value as people write it.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
