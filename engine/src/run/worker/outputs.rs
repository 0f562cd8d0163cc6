//! What a step made: into the store.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use flowrun_cache::{Artifact, ArtifactStore, CacheError, ListItem, OutputRecord, OutputValue};
use serde_json::Value;

use super::{Worker, cache_error};
use crate::event::OutputInfo;
use crate::expansion::ActionRequest;
use crate::pipeline::METRICS;
use crate::places::inside;
use crate::run::Outputs;
use crate::step::{Port, StepError, StepOutcome};

impl Worker {
    pub(super) fn store_outputs(
        &self,
        request: &ActionRequest,
        out_dir: &Path,
        outcome: &StepOutcome,
    ) -> Result<Outputs, StepError> {
        let mut outputs = BTreeMap::new();
        let shared = are_shared(request, out_dir)?;
        for port in &request.node.outputs {
            let path = request.node.out_paths.get(&port.name).unwrap_or(&port.name);
            let place = inside(out_dir, path)?;
            let value = if port.many {
                self.store_list(&request.id, port, &place, outcome, shared)?
            } else {
                match self.store(&place, shared) {
                    Ok(artifact) => OutputValue::One(artifact),
                    Err(error) if !is_absent(&error, &place) => return Err(cache_error(error)),
                    Err(_) if port.optional => continue,
                    Err(_) => return Err(missing(&request.id, &port.name, path)),
                }
            };
            let ty = port.ty.clone();
            outputs.insert(port.name.clone(), OutputRecord { ty, value });
        }
        Ok(outputs)
    }

    fn store_list(
        &self,
        id: &str,
        port: &Port,
        place: &Path,
        outcome: &StepOutcome,
        shared: bool,
    ) -> Result<OutputValue, StepError> {
        let Some(labels) = outcome.lists.get(&port.name) else {
            let text = format!(
                "`{id}` did not say what its list output `{}` holds",
                port.name
            );
            return Err(StepError::failed(text));
        };
        let mut items = Vec::with_capacity(labels.len());
        for label in labels {
            let path = inside(place, label)?;
            if !path.exists() {
                return Err(missing(id, &port.name, &format!("{}/{label}", port.name)));
            }
            let artifact = self.store(&path, shared).map_err(cache_error)?;
            let label = label.clone();
            items.push(ListItem { label, artifact });
        }
        Ok(OutputValue::List(items))
    }

    /// `shared`: another output lies in this one, or a link may lead there, so its files stay.
    fn store(&self, path: &Path, shared: bool) -> Result<Artifact, CacheError> {
        let store = self.cache.store();
        if shared {
            store.put_path(path)
        } else {
            store.take_path(path)
        }
    }

    /// Outputs as events show them.
    pub(in crate::run) fn infos(&self, outputs: &Outputs) -> BTreeMap<String, OutputInfo> {
        let info = |output: &OutputRecord| OutputInfo {
            ty: output.ty.clone(),
            digest: output.value.digest().to_hex(),
            path: match &output.value {
                OutputValue::One(artifact) => {
                    let path = self.cache.store().object_path(&artifact.digest);
                    path.display().to_string()
                }
                OutputValue::List(_) => String::new(),
            },
        };
        let outputs = outputs.iter();
        outputs.map(|(port, o)| (port.clone(), info(o))).collect()
    }
}

/// The metrics of a command: the top level of its output `metrics`, a JSON file, if it has one.
pub(super) fn command_metrics(
    request: &ActionRequest,
    out_dir: &Path,
) -> Result<BTreeMap<String, Value>, StepError> {
    let Some(path) = request.node.out_paths.get(METRICS) else {
        return Ok(BTreeMap::new());
    };
    // One that was not written is told with the other outputs.
    let Ok(text) = std::fs::read(inside(out_dir, path)?) else {
        return Ok(BTreeMap::new());
    };
    serde_json::from_slice(&text).map_err(|e| {
        let id = &request.id;
        StepError::failed(format!(
            "the output `{METRICS}` of `{id}` holds no metrics: {e}"
        ))
        .help("write a JSON object: `{\"accuracy\": 0.9}`")
    })
}

/// An output may lie in another one, or a link lead there, or out of the folder. An output that
/// lies alone in the folder is looked through when it is stored.
fn are_shared(request: &ActionRequest, out_dir: &Path) -> Result<bool, StepError> {
    let paths = &request.node.out_paths;
    let alone = match request.node.outputs.as_slice() {
        [port] => !port.many && paths.values().all(|path| !path.contains('/')),
        _ => false,
    };
    let linked = if alone {
        out_dir.is_symlink()
    } else {
        ArtifactStore::has_link(out_dir).map_err(cache_error)?
    };
    Ok(linked || overlap(paths))
}

/// One output lies in the folder of another.
fn overlap(paths: &BTreeMap<String, String>) -> bool {
    let within = |a: &String, b: &String| a != b && Path::new(a).starts_with(b);
    let paths = || paths.values();
    paths().any(|a| paths().any(|b| within(a, b)))
}

/// Nothing lies at `place`, or a link that leads nowhere. It is not looked at again: what changed
/// while it was stored is gone from there as well.
fn is_absent(error: &CacheError, place: &Path) -> bool {
    let CacheError::Io { path, source } = error else {
        return false;
    };
    let kind = source.kind();
    path == place && matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn missing(id: &str, port: &str, path: &str) -> StepError {
    StepError::failed(format!("`{id}` did not write its output `{port}` ({path})"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_cache::{Cache, OpenOptions};

    use super::*;

    #[test]
    fn only_what_is_not_there_counts_as_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let options = OpenOptions::no_wait("test");
        let cache = Cache::open(&dir.path().join("cache"), &options).unwrap();
        let place = |name: &str| dir.path().join(name);
        std::fs::write(place("file"), "x").unwrap();
        std::fs::create_dir(place("folder")).unwrap();
        std::os::unix::fs::symlink(place("nothing"), place("link")).unwrap();
        std::os::unix::fs::symlink(place("nothing"), place("folder/link")).unwrap();
        let take = |path: &Path| cache.store().take_path(path).unwrap_err();
        let put = |path: &Path| cache.store().put_path(path).unwrap_err();
        for name in ["nothing", "link", "file/in"] {
            let place = place(name);
            assert!(is_absent(&take(&place), &place), "{name}");
            assert!(is_absent(&put(&place), &place), "{name}");
        }
        // Something was written, and cannot be stored.
        let folder = place("folder");
        assert!(!is_absent(&take(&folder), &folder));
        let changed = CacheError::Unstorable {
            path: place("gone"),
            reason: "the file changed while it was stored",
        };
        assert!(!is_absent(&changed, &place("gone")));
    }

    #[test]
    fn outputs_within_outputs_are_told() {
        let paths = |list: &[&str]| -> BTreeMap<String, String> {
            let paths = list.iter().enumerate();
            paths
                .map(|(i, p)| (i.to_string(), (*p).to_owned()))
                .collect()
        };
        assert!(overlap(&paths(&["a", "b", "a/c"])));
        assert!(!overlap(&paths(&["a", "ab", "b/c", "b/d"])));
    }
}
