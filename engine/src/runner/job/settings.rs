//! [`JobSettings`]: what an entry of `runners:` says whatever the job system is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Settings that every job system has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JobSettings {
    /// Jobs at once, waiting ones included. They take none of the places of `-j`.
    #[schemars(range(min = 1, max = 4096))]
    pub jobs: usize,
    /// Path of this program on the workers. The same as here when left out.
    pub program: Option<String>,
    /// Folder here to the same folder as the workers see it, where the paths differ. The cache
    /// folder must be shared, unless `through: remote`; what else a step reads by its path
    /// (weights, files of the project) must be in any case.
    pub shared: BTreeMap<PathBuf, PathBuf>,
    /// How the files of a job reach the workers.
    pub through: Through,
    /// How often a job is ordered in all, when what it runs on dies.
    #[schemars(range(min = 1, max = 100))]
    pub attempts: u32,
    /// Environment variables that are handed to the steps, beside their own `env` and `secrets`.
    pub env: Vec<String>,
    /// How long the job system may not answer before its jobs count as lost, in seconds.
    #[schemars(range(min = 1))]
    pub patience: u64,
}

/// How the files of a job reach the workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Through {
    /// In the cache folder, which the workers see.
    #[default]
    Folder,
    /// By way of the remote cache (`--remote`): the workers see nothing of this machine. They have
    /// the credentials of the store, and the values of `secrets` and `env`, in their own environment.
    Remote,
}

impl Default for JobSettings {
    fn default() -> Self {
        Self {
            jobs: 16,
            program: None,
            shared: BTreeMap::new(),
            through: Through::Folder,
            attempts: 3,
            env: Vec::new(),
            patience: 60,
        }
    }
}

impl JobSettings {
    /// A path as the workers see it; `path` is absolute, `root` is what relative ones in the
    /// settings are relative to. The longest folder that fits counts.
    pub(super) fn there(&self, path: &Path, root: &Path) -> PathBuf {
        let fits = self.shared.iter().filter_map(|(here, there)| {
            let here = root.join(here);
            let rest = path.strip_prefix(&here).ok()?;
            let whole = rest.as_os_str().is_empty();
            let mapped = if whole {
                there.clone()
            } else {
                there.join(rest)
            };
            Some((here.components().count(), mapped))
        });
        fits.max_by_key(|(length, _)| *length)
            .map_or_else(|| path.to_owned(), |(_, mapped)| mapped)
    }
}

/// The schema of an entry: a job system's own settings and those of all.
pub(crate) fn schema(own: Value) -> Value {
    let mut all = schemars::schema_for!(JobSettings).to_value();
    let Value::Object(own) = own else {
        return all;
    };
    for part in ["properties", "$defs"] {
        let Some(Value::Object(more)) = own.get(part) else {
            continue;
        };
        if let Some(all) = all.as_object_mut()
            && let Value::Object(target) = all.entry(part).or_insert_with(|| Map::new().into())
        {
            target.extend(more.clone());
        }
    }
    if let Some(required) = own.get("required") {
        all["required"] = required.clone();
    }
    if let Some(about) = own.get("description") {
        all["description"] = about.clone();
    }
    all
}

/// The settings that all have, and those of the job system.
pub(super) fn split(entry: &Value) -> Result<(JobSettings, Value), String> {
    let names = schemars::schema_for!(JobSettings).to_value();
    let is_ours = |name: &String| names["properties"].get(name).is_some();
    let entries = entry.as_object().cloned().unwrap_or_default();
    let (ours, own): (Map<String, Value>, Map<String, Value>) =
        entries.into_iter().partition(|(name, _)| is_ours(name));
    let ours = serde_json::from_value(Value::Object(ours)).map_err(|e| e.to_string())?;
    Ok((ours, Value::Object(own)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_longest_folder_that_fits_is_the_one_meant() {
        let entry = json!({"address": "a", "jobs": 2, "shared": {
            "/p": "/mnt/p", "/p/cache": "/c", "rel": "/r",
        }});
        let (settings, own) = split(&entry).unwrap();
        assert_eq!((settings.jobs, own), (2, json!({"address": "a"})));
        let there = |path: &str| {
            let there = settings.there(Path::new(path), Path::new("/root"));
            there.display().to_string()
        };
        assert_eq!(there("/p/x/y"), "/mnt/p/x/y");
        assert_eq!(there("/p/cache"), "/c");
        assert_eq!(there("/p/cachex"), "/mnt/p/cachex");
        assert_eq!(there("/root/rel/z"), "/r/z");
        assert_eq!(there("/elsewhere"), "/elsewhere");
    }

    #[test]
    fn a_schema_takes_both_sorts_of_settings_and_no_other() {
        let own = json!({"type": "object", "properties": {"address": {"type": "string"}},
            "required": ["address"], "additionalProperties": false});
        let validator = jsonschema::validator_for(&schema(own)).unwrap();
        assert!(validator.is_valid(&json!({"address": "a", "jobs": 3})));
        for bad in [
            json!({"jobs": 3}),
            json!({"address": "a", "x": 1}),
            json!({"address": "a", "jobs": 0}),
        ] {
            assert!(!validator.is_valid(&bad), "{bad}");
        }
    }
}
