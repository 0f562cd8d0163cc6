//! [`ActionManifest`]: everything that goes into a step's result. Its hash is
//! the action key, and the difference of two manifests is the explanation: one
//! structure hashes and explains, so they cannot disagree.
//!
//! | value | tracked in |
//! |---|---|
//! | kind, its version, the command text | `kind`, `kind_version`, `command` |
//! | project files that the command text names | `files` |
//! | resolved params, models, programs | `params` (less URLs and keys) |
//! | inputs | `inputs`: content digests, labels the step can see, whether it is a folder or a program |
//! | facts about the outside world that a kind depends on | `observed` |
//! | declared environment | `env` |
//! | step name, paths, times, host, retry, resources, runner, secrets | nowhere |

mod difference;

pub use difference::diff;

use std::collections::{BTreeMap, BTreeSet};

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
    /// Project files named in the command, with their digests.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, Digest>,
    /// Output port to path, for shell steps.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub out_paths: BTreeMap<String, String>,
}

/// One input artifact in a manifest.
#[derive(Debug, Clone, Serialize)]
pub struct InputKey {
    /// Content digest.
    pub digest: Digest,
    /// The artifact's label, where the step can see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// It is a folder: a file may hold the same bytes as the list of a folder's files.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub folder: bool,
    /// It is a file that may be run.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
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

/// The words of a shell command that may name a project file: relative, no
/// variables, nothing that leaves the folder.
pub(crate) fn file_words(command: &str) -> BTreeSet<&str> {
    command
        .split(|c: char| c.is_whitespace() || "\"'`;|&<>()=".contains(c))
        .filter(|word| !word.is_empty() && !word.contains(['$', '*', '?', '\\']))
        .filter(|word| !word.starts_with(['/', '-']) && !word.split('/').any(|p| p == ".."))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command_that_may_be_files() {
        let words =
            file_words("sh \"$script\" lib/a.sh <data.csv >$out; python -c 'x' ../b /etc/c");
        assert_eq!(
            Vec::from_iter(words),
            ["data.csv", "lib/a.sh", "python", "sh", "x"]
        );
    }
}
