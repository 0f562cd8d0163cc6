//! The files that a server is given, and the version of a registered model that one of them
//! becomes. What is sent was verified when it was taken out of the store.

use std::path::{Path, PathBuf};

use flowrun_cache::{Artifact, CacheReader, Digest, OutputValue};
use flowrun_engine::tracking::TrackedOutput;
use serde_json::json;
use tempfile::TempDir;

use super::api::{ApiError, RunInfo};
use super::{Mlflow, STALL};
use crate::tracking::points::{parts, valid};

/// Name of what was taken out of the store.
const TAKEN: &str = "artifact";

impl Mlflow {
    pub(super) fn send_report(&mut self, run_dir: &Path) {
        let page = run_dir.join("report.html");
        let figures = self.report.take();
        let files = [(Some(page), "report.html"), (figures, "report.json")];
        for (file, name) in files {
            if let Some(file) = file.filter(|file| file.is_file()) {
                self.put(name, &file);
            }
        }
    }

    fn put(&mut self, path: &str, file: &Path) -> Option<()> {
        let run = self.takes_files()?;
        let put = self.api.put(&run, path, file);
        self.check("artifacts", put)
    }

    /// The run, while the server takes files.
    fn takes_files(&self) -> Option<RunInfo> {
        let run = self.run.clone();
        run.filter(|_| !self.gave_up && !self.stalled)
    }

    /// Sends an output of a step, or of all its items.
    pub(super) fn send_outputs(&mut self, wanted: &TrackedOutput) {
        let of_step = self
            .keys
            .iter()
            .filter(|(id, _)| parts(id).0 == wanted.step);
        let results: Vec<(String, String)> =
            of_step.map(|(id, key)| (valid(id), key.clone())).collect();
        for (step, key) in results {
            for (label, artifact) in self.artifacts(&key, &wanted.output) {
                let label = label.map(|label| format!("/{label}")).unwrap_or_default();
                self.send(&format!("{step}/{}{label}", wanted.output), &artifact);
            }
        }
    }

    /// The artifacts of a result's output: of a list each with its label.
    fn artifacts(&mut self, key: &str, output: &str) -> Vec<(Option<String>, Artifact)> {
        let reader = CacheReader::open(&self.settings.cache_dir);
        let key = Digest::parse(key);
        let result = key.and_then(|key| reader.actions().get(&key));
        let found = result.and_then(|mut result| result.outputs.remove(output));
        match found.map(|record| record.value) {
            Some(OutputValue::One(artifact)) => vec![(None, artifact)],
            Some(OutputValue::List(items)) => {
                let items = items.into_iter();
                items
                    .map(|item| (Some(item.label), item.artifact))
                    .collect()
            }
            None => {
                self.warn(format!("the output `{output}` is no longer in the cache"));
                Vec::new()
            }
        }
    }

    /// Sends a file or folder of the store, verified.
    fn send(&mut self, path: &str, artifact: &Artifact) -> Option<()> {
        self.takes_files()?;
        let (cache_dir, taken) = (self.settings.cache_dir.clone(), artifact.clone());
        let taken = self.beat.during(STALL, move |_| take(&cache_dir, &taken));
        let late = || {
            let minutes = STALL.as_secs() / 60;
            Err(format!(
                "`{path}` was not out of the cache after {minutes} minutes"
            ))
        };
        let folder = match taken.unwrap_or_else(late) {
            Ok(folder) => folder,
            Err(why) => {
                self.warn(format!("artifacts: {why}"));
                return None;
            }
        };
        for (below, file) in files(&folder.path().join(TAKEN)) {
            let whole = match below.is_empty() {
                true => path.to_owned(),
                false => format!("{path}/{below}"),
            };
            self.put(&whole, &file)?;
        }
        Some(())
    }

    /// Makes the output that the pipeline names a version of a registered model.
    pub(super) fn register(&mut self) -> Option<()> {
        let register = self.settings.tracking.register.clone()?;
        let key = self.keys.get(&register.output.step)?.clone();
        let found = self.artifacts(&key, &register.output.output);
        let (_, artifact) = found.into_iter().next()?;
        let path = format!(
            "{}/{}",
            valid(&register.output.step),
            register.output.output
        );
        self.send(&path, &artifact)?;
        let run = self.run.clone()?;
        let what = format!("the model `{}`", register.name);
        let name = json!({ "name": register.name });
        match self.api.post("registered-models/create", &name) {
            Err(ApiError::Refused { code, .. }) if code == "RESOURCE_ALREADY_EXISTS" => {}
            other => {
                self.check(&what, other)?;
            }
        }
        let version = json!({
            "name": register.name,
            "source": format!("{}/{path}", run.artifact_uri),
            "run_id": run.id,
        });
        let made = self.api.post("model-versions/create", &version);
        self.check(&what, made).map(|_| ())
    }
}

/// Takes a file or folder out of the store, verified: [`TAKEN`] in the folder that comes back.
fn take(cache_dir: &Path, artifact: &Artifact) -> Result<TempDir, String> {
    let folder = tempfile::tempdir().map_err(|e| format!("no folder can be made: {e}"))?;
    let reader = CacheReader::open(cache_dir);
    let place = folder.path().join(TAKEN);
    let done = reader.store().materialize(artifact, &place);
    done.map_err(|e| e.to_string())?;
    Ok(folder)
}

/// The files of a folder, or the file itself, with their paths below it.
fn files(place: &Path) -> Vec<(String, PathBuf)> {
    if place.is_file() {
        return vec![(String::new(), place.to_owned())];
    }
    let mut all = Vec::new();
    let mut folders = vec![(String::new(), place.to_owned())];
    while let Some((below, folder)) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let below = match below.is_empty() {
                true => name,
                false => format!("{below}/{name}"),
            };
            match entry.path() {
                path if path.is_dir() => folders.push((below, path)),
                path => all.push((below, path)),
            }
        }
    }
    all.sort();
    all
}
