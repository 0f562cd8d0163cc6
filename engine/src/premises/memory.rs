//! [`Memory`]: gathers, while a run goes on, what it rests on; and writes it down when
//! the run ended whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use flowrun_cache::{Artifact, Cache, Digest, FileStamp};

use super::check::PLACEHOLDER;
use super::{FilePremise, ObjectPremise, Observed, Premises, RunName, VERSION, environment, write};
use crate::event::RunEvent;
use crate::pipeline::{CachePolicy, Pipeline};
use crate::record::RunPlan;
use crate::run::{Outputs, RunSummary};
use crate::step::World;

/// What a run rests on, so far.
#[derive(Default)]
pub(crate) struct Memory(Mutex<State>);

#[derive(Default)]
struct State {
    files: BTreeMap<PathBuf, Artifact>,
    absent: BTreeSet<String>,
    observed: BTreeMap<Digest, Observed>,
    report: Option<Artifact>,
    events: Vec<u8>,
    keys: Vec<u8>,
    objects: BTreeMap<Digest, Artifact>,
    /// Something happened that is not to be repeated.
    spoilt: bool,
}

impl Memory {
    /// A file of the project was taken, or put there.
    pub(crate) fn file(&self, path: &Path, artifact: &Artifact) {
        let mut state = self.lock();
        let before = state.files.insert(path.to_owned(), artifact.clone());
        // It changed while the run went on.
        state.spoilt |= before.is_some_and(|before| before != *artifact);
    }

    /// A word of a command names no file.
    pub(crate) fn absent(&self, word: &str) {
        let mut state = self.lock();
        if !state.absent.contains(word) {
            state.absent.insert(word.to_owned());
        }
    }

    /// What a step kind said of the world.
    pub(crate) fn observed(&self, observed: Observed) {
        let key = Digest::of_record("observed", &(&observed.kind, &observed.params));
        let mut state = self.lock();
        let before = state.observed.get(&key);
        state.spoilt |= before.is_some_and(|before| *before != observed);
        state.observed.insert(key, observed);
    }

    /// The report of the run.
    pub(crate) fn report(&self, artifact: &Artifact) {
        self.lock().report = Some(artifact.clone());
    }

    /// The run cannot be remembered.
    pub(crate) fn spoil(&self) {
        self.lock().spoilt = true;
    }

    /// An event that the next run tells too.
    pub(crate) fn event(&self, event: &RunEvent) {
        let mut state = self.lock();
        if serde_json::to_writer(&mut state.events, event).is_err() {
            state.spoilt = true;
        }
        state.events.push(b'\n');
    }

    /// An action ended with these outputs.
    pub(crate) fn outputs(&self, key: &Digest, outputs: &Outputs) {
        let mut state = self.lock();
        state.keys.extend_from_slice(key.as_bytes());
        for artifact in outputs.values().flat_map(|o| o.value.artifacts()) {
            state.objects.insert(artifact.digest, artifact.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes everything down, if the run was whole and the next one may rest on it.
    pub(crate) fn keep(
        &self,
        cache: &Cache,
        name: RunName,
        pipeline: &Pipeline,
        plan: &RunPlan,
        summary: &RunSummary,
        world: &World,
    ) {
        let mut state = self.lock();
        let always = |s: &crate::pipeline::StepNode| s.cache == CachePolicy::Never;
        let whole = summary.ok
            && !state.spoilt
            && plan.steps.len() == pipeline.steps.len()
            && !pipeline.steps.iter().any(always);
        let Some(objects) = whole.then(|| objects(cache, &state.objects)).flatten() else {
            return;
        };
        let plan = RunPlan {
            run: PLACEHOLDER.to_owned(),
            ..plan.clone()
        };
        let Ok(mut plan) = serde_json::to_vec(&plan) else {
            return;
        };
        plan.push(b'\n');
        let secrets: BTreeSet<&String> = pipeline.steps.iter().flat_map(|s| &s.secrets).collect();
        let secrets: Vec<String> = secrets.into_iter().cloned().collect();
        let files = std::mem::take(&mut state.files).into_iter();
        let head = Premises {
            version: VERSION,
            pipeline: pipeline.name.clone(),
            steps: pipeline.steps.len(),
            cached: summary.ran + summary.cached,
            skipped: summary.skipped,
            root: pipeline.root.clone(),
            sources: pipeline.sources.clone(),
            environment: environment(world, &secrets),
            secrets,
            files: files
                .map(|(path, artifact)| FilePremise {
                    path,
                    artifact,
                    stamp: None,
                })
                .collect(),
            absent: std::mem::take(&mut state.absent).into_iter().collect(),
            observed: std::mem::take(&mut state.observed).into_values().collect(),
            report: state.report.take(),
            keys: state.keys.len(),
            objects: objects.len(),
            plan: plan.len(),
            events: state.events.len(),
        };
        write(
            cache,
            name,
            &head,
            &[&state.keys, &objects, &plan, &state.events],
        );
    }
}

/// The table of objects. None of them is trusted yet: the next run hashes each once.
fn objects(cache: &Cache, artifacts: &BTreeMap<Digest, Artifact>) -> Option<Vec<u8>> {
    let mut digests = BTreeSet::new();
    for artifact in artifacts.values() {
        digests.extend(cache.store().parts(artifact).ok()?);
    }
    let mut table = Vec::new();
    for digest in digests {
        let meta = std::fs::metadata(cache.store().object_path(&digest)).ok()?;
        let object = ObjectPremise {
            digest,
            stamp: FileStamp::of(&meta),
            trusted: false,
        };
        object.write(&mut table);
    }
    Some(table)
}
