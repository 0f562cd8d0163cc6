//! [`ActionManifest`]: everything that goes into a step's result. Its hash is
//! the action key, and the difference of two manifests is the explanation: one
//! structure hashes and explains, so they cannot disagree.
//!
//! | value | tracked in |
//! |---|---|
//! | kind, its version, the command text | `kind`, `kind_version`, `command` |
//! | resolved params, models, programs | `params` (less URLs and keys) |
//! | inputs | `inputs`: content digests, list labels |
//! | files and sources that params name | `observed` |
//! | declared environment | `env` |
//! | step name, paths, times, host, retry, resources, secrets | nowhere |

use std::collections::BTreeMap;

use flowrun_cache::{ActionKey, Digest};
use serde::Serialize;
use serde_json::Value;

/// Version of the manifest's shape; raising it makes every result a miss.
pub const MANIFEST_VERSION: u32 = 1;

/// Everything that goes into a step's result.
#[derive(Debug, Clone, Serialize)]
pub struct ActionManifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Step kind; `run` for shell steps.
    pub kind: String,
    /// The kind's version.
    pub kind_version: u32,
    /// Resolved params.
    pub params: Value,
    /// Input port to its artifacts in order.
    pub inputs: BTreeMap<String, Vec<InputKey>>,
    /// Facts about the outside world.
    pub observed: BTreeMap<String, Value>,
    /// Declared environment.
    pub env: BTreeMap<String, String>,
    /// Shell command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Output port to path, for shell steps.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub out_paths: BTreeMap<String, String>,
}

/// One input artifact in a manifest.
#[derive(Debug, Clone, Serialize)]
pub struct InputKey {
    /// Content digest.
    pub digest: Digest,
    /// Label within a list: the step can see it, so it counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

impl ActionManifest {
    /// The action key.
    #[must_use]
    pub fn key(&self) -> ActionKey {
        Digest::of_record("action", self)
    }

    /// The manifest as it is stored.
    #[must_use]
    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }
}

/// What differs between two stored manifests, one line each, in the order of their fields.
#[must_use]
pub fn diff(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    walk("", old, new, &mut lines);
    lines
}

fn walk(path: &str, old: &Value, new: &Value, lines: &mut Vec<String>) {
    if old == new {
        return;
    }
    if let (Value::Object(a), Value::Object(b)) = (old, new) {
        let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for key in keys {
            let path = if path.is_empty() {
                key.clone()
            } else {
                format!("{path}.{key}")
            };
            let none = &Value::Null;
            walk(
                &path,
                a.get(key).unwrap_or(none),
                b.get(key).unwrap_or(none),
                lines,
            );
        }
        return;
    }
    lines.push(match path.split_once('.') {
        Some(("params", name)) => format!("param `{name}`: {} → {}", short(old), short(new)),
        Some(("inputs", port)) => format!("input `{port}` changed"),
        Some(("env", name)) => format!("env `{name}` changed"),
        Some(("observed", name)) => format!("{name}: {} → {}", short(old), short(new)),
        _ if path == "command" => "the command changed".to_owned(),
        _ if path == "kind_version" => {
            format!("step kind version {} → {}", short(old), short(new))
        }
        _ => format!("{path}: {} → {}", short(old), short(new)),
    });
}

fn short(value: &Value) -> String {
    let text = match value {
        Value::Null => "unset".to_owned(),
        other => other.to_string(),
    };
    if text.chars().count() <= 48 {
        return text;
    }
    text.chars().take(47).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn manifest(lr: f64, digest: &str) -> ActionManifest {
        let input = InputKey {
            digest: Digest::of_bytes(digest.as_bytes()),
            label: None,
        };
        ActionManifest {
            version: MANIFEST_VERSION,
            kind: "finetune".into(),
            kind_version: 1,
            params: json!({ "lr": lr, "lora": { "rank": 16 } }),
            inputs: BTreeMap::from([("messages".to_owned(), vec![input])]),
            observed: BTreeMap::new(),
            env: BTreeMap::new(),
            command: None,
            out_paths: BTreeMap::new(),
        }
    }

    #[test]
    fn a_key_changes_exactly_when_the_diff_is_not_empty() {
        let base = manifest(0.001, "a");
        for other in [
            manifest(0.001, "a"),
            manifest(0.002, "a"),
            manifest(0.001, "b"),
        ] {
            let lines = diff(&base.to_value(), &other.to_value());
            assert_eq!(base.key() == other.key(), lines.is_empty(), "{lines:?}");
        }
    }

    #[test]
    fn a_diff_names_the_param_and_both_values() {
        let lines = diff(
            &manifest(0.001, "a").to_value(),
            &manifest(0.002, "b").to_value(),
        );
        assert_eq!(
            lines,
            ["input `messages` changed", "param `lr`: 0.001 → 0.002"]
        );
    }
}
