//! What a step made: into the store, and from there into the project tree.
//!
//! Invariant: no path that a step or a pipeline names leaves the folder it is relative to.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::PoisonError;

use flowrun_cache::{
    ActionKey, ActionResult, Artifact, ArtifactStore, CacheReader, Digest, ListItem, OutputRecord,
    OutputValue, Staged, Staging,
};
use serde_json::Value;

use super::{Trouble, Worker, broken_or_failed, cache_error};
use crate::event::{OutputInfo, RunEvent};
use crate::expansion::ActionRequest;
use crate::pipeline::METRICS;
use crate::record::REPLACED;
use crate::run::Outputs;
use crate::step::{Port, StepError, StepOutcome, StepReporter};

/// Runs whose records are asked who made what lies where an output goes.
const RUNS: usize = 10;

impl Worker {
    pub(super) fn store_outputs(
        &self,
        request: &ActionRequest,
        out_dir: &Path,
        outcome: &StepOutcome,
    ) -> Result<Outputs, StepError> {
        let mut outputs = BTreeMap::new();
        let linked = ArtifactStore::has_link(out_dir).map_err(cache_error)?;
        let shared = linked || overlap(&request.node.out_paths);
        for port in &request.node.outputs {
            let path = request.node.out_paths.get(&port.name).unwrap_or(&port.name);
            let place = inside(out_dir, path)?;
            let value = if port.many {
                self.store_list(&request.id, port, &place, outcome, shared)?
            } else if place.exists() {
                OutputValue::One(self.store(&place, shared)?)
            } else if port.optional {
                continue;
            } else {
                return Err(missing(&request.id, &port.name, path));
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
            let artifact = self.store(&path, shared)?;
            let label = label.clone();
            items.push(ListItem { label, artifact });
        }
        Ok(OutputValue::List(items))
    }

    /// `shared`: another output lies in this one, or a link may lead there, so its files stay.
    fn store(&self, path: &Path, shared: bool) -> Result<Artifact, StepError> {
        let store = self.cache.store();
        let stored = if shared {
            store.put_path(path)
        } else {
            store.take_path(path)
        };
        stored.map_err(cache_error)
    }

    /// Puts outputs into the project tree where they are missing or different: all of them, or
    /// none when the run is asked to stop meanwhile. Until the last is copied, the copies lie
    /// beside what they replace.
    pub(super) fn publish(
        &self,
        request: &ActionRequest,
        result: &ActionResult,
    ) -> Result<(), Trouble> {
        let mut staging = Staging::new(self.cache.store());
        let mut staged = Vec::new();
        for (port, path) in &request.publish {
            let dest = inside(&self.lookup.root, path)?;
            match result.outputs.get(port).map(|o| &o.value) {
                Some(OutputValue::One(artifact)) => {
                    staged.extend(self.stage(&mut staging, request, artifact, &dest)?);
                }
                Some(OutputValue::List(items)) => {
                    for item in items {
                        let dest = inside(&dest, &item.label)?;
                        staged.extend(self.stage(&mut staging, request, &item.artifact, &dest)?);
                    }
                }
                None => {}
            }
        }
        for one in staged {
            self.put_aside(request, one.dest())?;
            one.put().map_err(cache_error)?;
        }
        let report = result.outputs.values().find(|o| o.ty == "report");
        if let Some(OutputValue::One(artifact)) = report.map(|o| &o.value) {
            self.place(artifact, &self.run_dir.join("report.html"))?;
            if let Some(memory) = self.memory() {
                memory.report(artifact);
            }
        }
        Ok(())
    }

    /// An artifact beside its place in the project; nothing where it is there already.
    fn stage(
        &self,
        staging: &mut Staging<'_>,
        request: &ActionRequest,
        artifact: &Artifact,
        dest: &Path,
    ) -> Result<Option<Staged>, Trouble> {
        if self.cancel.is_cancelled() {
            return Err(StepError::cancelled().into());
        }
        self.claim(request, dest)?;
        if let Some(memory) = self.memory() {
            let inner = dest.strip_prefix(&self.lookup.root).unwrap_or(dest);
            memory.file(&request.node.name, inner, artifact);
        }
        // What is there is looked at each time: no record of an earlier run is trusted.
        if self.lookup.is_at(artifact, dest) {
            return Ok(None);
        }
        let staged = staging.add(artifact, dest, &|| self.cancel.is_cancelled());
        match staged.map_err(|e| broken_or_failed(e, artifact))? {
            Some(staged) => Ok(Some(staged)),
            None => Err(StepError::cancelled().into()),
        }
    }

    fn place(&self, artifact: &Artifact, dest: &Path) -> Result<(), Trouble> {
        let placed = self.cache.store().materialize(artifact, dest);
        placed.map_err(|e| broken_or_failed(e, artifact))
    }

    /// Keeps what lies at `dest` with the run's record, unless a step made it: the user may have
    /// nothing else of it.
    fn put_aside(&self, request: &ActionRequest, dest: &Path) -> Result<(), StepError> {
        let at = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (place, cache) = (at(dest), at(self.cache.dir()));
        if cache.starts_with(&place) || place.starts_with(&cache) {
            let text = format!(
                "`{}` is not published: the cache lies there",
                dest.display()
            );
            return Err(StepError::invalid(text).help("publish to another path"));
        }
        if !dest.exists() {
            return Ok(());
        }
        let store = self.cache.store();
        let lies = |e| {
            let text = format!("what lies at `{}` cannot be kept: {e}", dest.display());
            StepError::failed(text).help("move it away; nothing was put in its place")
        };
        let there = ArtifactStore::address_of(dest).map_err(lies)?;
        if self.is_output(&there.digest) {
            return Ok(());
        }
        let inner = dest.strip_prefix(&self.lookup.root).unwrap_or(dest);
        let aside = self.run_dir.join(REPLACED).join(inner);
        let folder = aside.parent().unwrap_or(&self.run_dir);
        std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
        // Links, modes and empty folders stay, unless the cache is on another file system.
        if std::fs::rename(dest, &aside).is_err() {
            let kept = store.put_path(dest).map_err(lies)?;
            store.materialize(&kept, &aside).map_err(lies)?;
        }
        let reporter = self.reporter(&request.id);
        reporter.warning(&format!(
            "`{}` held what no step made; it was replaced, and is kept as `{}`",
            inner.display(),
            aside.display()
        ));
        Ok(())
    }

    /// A result that is in the cache, or was until this run, has an output of these bytes, or the
    /// record of a recent run tells of one.
    fn is_output(&self, digest: &Digest) -> bool {
        let outputs = || {
            let all = self.cache.actions().all();
            all.flat_map(|result| digests(&result)).collect()
        };
        let overwritten = || {
            let overwritten = self.overwritten.lock();
            let overwritten = overwritten.unwrap_or_else(PoisonError::into_inner);
            overwritten.contains(digest)
        };
        self.known_outputs.get_or_init(outputs).contains(digest)
            || overwritten()
            || is_recorded(self.cache.dir(), digest)
    }

    /// A result of this key is about to be overwritten: what it made may lie in the project.
    pub(super) fn remember_outputs(&self, key: &ActionKey) {
        let Some(result) = self.cache.actions().get(key) else {
            return;
        };
        let overwritten = self.overwritten.lock();
        let mut overwritten = overwritten.unwrap_or_else(PoisonError::into_inner);
        overwritten.extend(digests(&result));
    }

    /// Takes a place of the project for an action: a path that names an item is known only now.
    fn claim(&self, request: &ActionRequest, dest: &Path) -> Result<(), StepError> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let above = dest.ancestors().find_map(|p| places.get_key_value(p));
        let next = places.range(dest.to_owned()..).next();
        let below = next.filter(|(path, _)| path.starts_with(dest));
        let taken = above.or(below).filter(|(_, by)| **by != request.id);
        if let Some((path, by)) = taken {
            let text = format!(
                "`{}` cannot take the output of `{}`: `{by}` published to `{}` in this run",
                dest.display(),
                request.id,
                path.display()
            );
            return Err(StepError::invalid(text)
                .help("name the item in the path, for example `results/${{ item.x }}.json`"));
        }
        places.insert(dest.to_owned(), request.id.clone());
        Ok(())
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

fn digests(result: &ActionResult) -> Vec<Digest> {
    let artifacts = result.outputs.values().flat_map(|o| o.value.artifacts());
    artifacts.map(|artifact| artifact.digest).collect()
}

/// A step of a recent run ended with an output of these bytes, by the run's record.
fn is_recorded(cache: &Path, digest: &Digest) -> bool {
    let hex = digest.to_hex();
    let told = |run: PathBuf| {
        let events = std::fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
        let mut lines = events.lines().filter(|line| line.contains(&hex));
        lines.any(|line| match serde_json::from_str(line) {
            Ok(RunEvent::StepFinished { outputs, .. }) => outputs.values().any(|o| o.digest == hex),
            _ => false,
        })
    };
    let runs = CacheReader::open(cache).runs();
    runs.into_iter().take(RUNS).any(told)
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

/// One output lies in the folder of another.
fn overlap(paths: &BTreeMap<String, String>) -> bool {
    let within = |a: &String, b: &String| a != b && Path::new(a).starts_with(b);
    let paths = || paths.values();
    paths().any(|a| paths().any(|b| within(a, b)))
}

/// `path` below `folder`; an error if it would leave it.
pub(super) fn inside(folder: &Path, path: &str) -> Result<PathBuf, StepError> {
    let parts = Path::new(path).components();
    let mut parts = parts.filter(|c| !matches!(c, Component::CurDir)).peekable();
    let is_there = parts.peek().is_some();
    let tidy: Option<PathBuf> = parts
        .map(|c| matches!(c, Component::Normal(_)).then_some(c.as_os_str()))
        .collect();
    if let Some(tidy) = tidy.filter(|_| is_there) {
        return Ok(folder.join(tidy));
    }
    let text = format!("`{path}` must be a relative path without `..`");
    Err(StepError::invalid(text))
}

fn missing(id: &str, port: &str, path: &str) -> StepError {
    StepError::failed(format!("`{id}` did not write its output `{port}` ({path})"))
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_path_never_leaves_its_folder() {
        let root = Path::new("/p");
        for bad in ["", ".", "..", "/etc/x", "a/../../b", "a/.."] {
            assert!(inside(root, bad).is_err(), "{bad}");
        }
        for good in ["a/b", "./a/b", "a/./b/"] {
            assert_eq!(inside(root, good).ok(), Some(PathBuf::from("/p/a/b")));
        }
    }
}
