//! [`Memory`]: gathers, while a run goes on, what it rests on; and writes it down when
//! the run ended whole.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flowrun_cache::{Artifact, Cache, Digest, FileStamp};

use super::changed::Changed;
use super::check::PLACEHOLDER;
use super::known::{self, Ended};
use super::{
    FilePremise, Held, ObjectPremise, Observed, Premises, RunName, VERSION, environment, write,
};
use crate::event::RunEvent;
use crate::pipeline::{CachePolicy, Pipeline, StepNode};
use crate::record::RunPlan;
use crate::run::{Outputs, RunSummary};
use crate::step::World;

/// What a run rests on, so far.
#[derive(Default)]
pub(crate) struct Memory(Mutex<State>);

#[derive(Default)]
struct State {
    steps: BTreeMap<String, OfStep>,
    files: BTreeMap<PathBuf, OfFile>,
    absent: BTreeSet<String>,
    observed: BTreeMap<Digest, Observed>,
    report: Option<Artifact>,
    /// Something happened that is not to be repeated.
    spoilt: bool,
    /// The text of the last event; kept for its memory.
    line: Vec<u8>,
}

/// What a step did.
#[derive(Default)]
struct OfStep {
    events: Vec<u8>,
    keys: Vec<u8>,
    took: Vec<u8>,
    /// The same may be there several times.
    artifacts: Vec<Artifact>,
    ended: Option<Ended>,
}

/// What a file held, and which steps saw it.
struct OfFile {
    held: Held,
    steps: BTreeSet<String>,
}

impl Memory {
    /// A step took a file or folder of the project.
    pub(crate) fn file(&self, step: &str, path: &Path, artifact: &Artifact) {
        let artifact = artifact.clone();
        self.held(step, path, Held::exactly(artifact));
    }

    /// A step put a file or folder there, or names a file whose bytes alone it sees: then the
    /// artifact is no program.
    pub(crate) fn bytes(&self, step: &str, path: &Path, artifact: &Artifact) {
        let artifact = artifact.clone();
        self.held(step, path, Held::at_least(artifact));
    }

    fn held(&self, step: &str, path: &Path, held: Held) {
        let mut state = self.lock();
        let changed = match state.files.get_mut(path) {
            Some(known) => {
                if !known.steps.contains(step) {
                    known.steps.insert(step.to_owned());
                }
                // Else it changed while the run went on.
                !known.held.takes(&held)
            }
            None => {
                let steps = BTreeSet::from([step.to_owned()]);
                state.files.insert(path.to_owned(), OfFile { held, steps });
                false
            }
        };
        state.spoilt |= changed;
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

    /// An event of a step that the next run tells too.
    pub(crate) fn event(&self, step: &str, event: &RunEvent) {
        let mut state = self.lock();
        let State {
            steps,
            line,
            spoilt,
            ..
        } = &mut *state;
        line.clear();
        *spoilt |= serde_json::to_writer(&mut *line, event).is_err();
        line.push(b'\n');
        // Most steps have one event: no more is taken than it needs.
        let step = steps.entry(step.to_owned()).or_default();
        step.events.extend_from_slice(line);
    }

    /// An action of a step ended with these outputs; its work took so long.
    pub(crate) fn outputs(&self, step: &str, key: &Digest, outputs: &Outputs, took_ms: u64) {
        let mut state = self.lock();
        let step = state.of(step);
        step.keys.extend_from_slice(key.as_bytes());
        step.took.extend_from_slice(&took_ms.to_le_bytes());
        let artifacts = outputs.values().flat_map(|o| o.value.artifacts());
        step.artifacts.extend(artifacts.cloned());
    }

    /// A step ended with these outputs, or was skipped.
    pub(crate) fn ended(&self, step: &str, outputs: Option<&Arc<Outputs>>) {
        self.lock().of(step).ended = Some(Ended {
            name: step.to_owned(),
            outputs: outputs.cloned(),
        });
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
        let always = |s: &Arc<StepNode>| s.cache == CachePolicy::Never;
        let whole = summary.ok
            && plan.steps.len() == pipeline.steps.len()
            && !pipeline.steps.iter().any(always);
        let mut state = self.lock();
        if !whole || state.spoilt {
            return;
        }
        let of_hooks = pipeline.hooks.values().flat_map(|hook| &hook.secrets);
        let of_steps = pipeline.steps.iter().flat_map(|s| &s.secrets);
        let secrets: BTreeSet<&String> = of_steps.chain(of_hooks).collect();
        let head = Premises {
            version: VERSION,
            pipeline: pipeline.name.clone(),
            steps: pipeline.steps.len(),
            cached: summary.ran + summary.cached,
            skipped: summary.skipped,
            root: pipeline.root.clone(),
            sources: pipeline.sources.clone(),
            environment: Digest::of_bytes(&[]),
            secrets: secrets.into_iter().cloned().collect(),
            hooks: pipeline.hooks.clone(),
            tracking: pipeline.tracking.clone(),
            files: Vec::new(),
            absent: Vec::new(),
            observed: Vec::new(),
            report: None,
            graph: Digest::of_bytes(&[]),
            keys: 0,
            objects: 0,
            plan: 0,
            events: 0,
        };
        let plan = RunPlan {
            run: PLACEHOLDER.to_owned(),
            ..plan.clone()
        };
        let numbers: BTreeMap<&str, usize> = pipeline
            .steps
            .iter()
            .enumerate()
            .map(|(at, step)| (step.name.as_str(), at))
            .collect();
        // What cannot be written leads to an ordinary run.
        let _ = (|| {
            let mut plan = serde_json::to_vec(&plan).ok()?;
            plan.push(b'\n');
            let mut sections = Sections::default();
            for step in &pipeline.steps {
                sections.add(cache, state.steps.get(&step.name)?)?;
            }
            let ends = state.steps.iter_mut();
            let ends = ends.filter_map(|(name, step)| Some((name.clone(), step.ended.take()?)));
            let steps = known::text(pipeline, &ends.collect())?;
            let files = state.files.iter().map(|(path, file)| {
                let steps = file.steps.iter();
                FilePremise {
                    path: path.clone(),
                    held: file.held.clone(),
                    stamp: None,
                    steps: steps
                        .filter_map(|s| numbers.get(s.as_str()).copied())
                        .collect(),
                }
            });
            let head = Premises {
                environment: environment(world, &head.secrets),
                files: files.collect(),
                absent: std::mem::take(&mut state.absent).into_iter().collect(),
                observed: std::mem::take(&mut state.observed).into_values().collect(),
                report: state.report.take(),
                graph: Digest::of_bytes(&steps),
                ..head
            };
            cache.write_file(&name.steps_path(), &steps).ok()?;
            sections.write(cache, name, head, &plan, &[]);
            super::forget(cache);
            Some(())
        })();
    }

    /// The same after a run in which only some files had changed.
    pub(crate) fn keep_changed(&self, cache: &Cache, changed: &Changed, summary: &RunSummary) {
        let mut state = self.lock();
        if !summary.ok || state.spoilt {
            return;
        }
        // What cannot be written leads to an ordinary run.
        let _ = state.keep_changed(cache, changed, summary);
    }
}

impl State {
    fn of(&mut self, step: &str) -> &mut OfStep {
        self.steps.entry(step.to_owned()).or_default()
    }

    fn keep_changed(
        &mut self,
        cache: &Cache,
        changed: &Changed,
        summary: &RunSummary,
    ) -> Option<()> {
        let old = &changed.remembered;
        let reached = changed.reached().clone();
        let names: BTreeMap<usize, &String> = reached.iter().map(|(n, i)| (*i, n)).collect();
        let mut sections = Sections::default();
        for step in 0..old.head.steps {
            match names.get(&step) {
                Some(name) => sections.add(cache, self.steps.get(*name)?)?,
                None => sections.copy(changed, step),
            }
        }
        let mut ends = BTreeMap::new();
        for (step, name) in &names {
            ends.insert(*step, self.steps.get_mut(*name)?.ended.take()?);
        }
        let steps = changed.ends(&ends);
        let graph = steps.as_ref().map(|steps| Digest::of_bytes(steps));
        let (observed, absent) = changed.outside();
        self.absent.extend(absent.iter().cloned());
        for one in observed {
            let key = Digest::of_record("observed", &(&one.kind, &one.params));
            self.observed.entry(key).or_insert_with(|| one.clone());
        }
        let head = Premises {
            cached: summary.ran + summary.cached,
            skipped: summary.skipped,
            files: self.files(&old.head.files, &reached)?,
            absent: std::mem::take(&mut self.absent).into_iter().collect(),
            observed: std::mem::take(&mut self.observed).into_values().collect(),
            report: self.report.take().or_else(|| old.head.report.clone()),
            graph: graph.unwrap_or(old.head.graph),
            ..old.head.clone()
        };
        if let Some(steps) = steps {
            cache.write_file(&old.name.steps_path(), &steps).ok()?;
        }
        sections.write(cache, old.name, head, old.plan(), old.events());
        Some(())
    }

    /// The files of the steps that were not reached as they were, and those of the others anew.
    fn files(
        &mut self,
        old: &[FilePremise],
        reached: &BTreeMap<String, usize>,
    ) -> Option<Vec<FilePremise>> {
        let again: BTreeSet<usize> = reached.values().copied().collect();
        let mut files = Vec::with_capacity(old.len());
        for file in old {
            let mut file = file.clone();
            file.steps.retain(|step| !again.contains(step));
            if let Some(new) = self.files.remove(&file.path) {
                if new.held != file.held {
                    // Only if a step that was not reached saw the same.
                    if file.steps.is_empty() {
                        file.held = new.held;
                    } else if !file.held.takes(&new.held) {
                        return None;
                    }
                    file.stamp = None;
                }
                file.steps
                    .extend(new.steps.iter().filter_map(|s| reached.get(s)));
            }
            if !file.steps.is_empty() {
                files.push(file);
            }
        }
        for (path, new) in std::mem::take(&mut self.files) {
            files.push(FilePremise {
                path,
                held: new.held,
                stamp: None,
                steps: new
                    .steps
                    .iter()
                    .filter_map(|s| reached.get(s).copied())
                    .collect(),
            });
        }
        Some(files)
    }
}

/// The sections of the file, as they are put together.
#[derive(Default)]
struct Sections {
    table: Vec<u8>,
    keys: Vec<u8>,
    took: Vec<u8>,
    objects: Vec<u8>,
    events: Vec<Events>,
}

/// Events of some steps, one after the other. They are most of the file: what stays is not copied.
enum Events {
    New(Vec<u8>),
    /// Where they lie among those of the run before.
    Kept(Range<usize>),
}

impl Sections {
    /// None of its objects is trusted yet: the next run hashes each once.
    fn add(&mut self, cache: &Cache, step: &OfStep) -> Option<()> {
        let ended = step.ended.as_ref()?;
        let start = self.objects.len();
        objects(cache, &step.artifacts, &mut self.objects)?;
        self.keys.extend_from_slice(&step.keys);
        self.took.extend_from_slice(&step.took);
        match self.events.last_mut() {
            Some(Events::New(events)) => events.extend_from_slice(&step.events),
            _ => self.events.push(Events::New(step.events.clone())),
        }
        self.enter([
            step.keys.len() / super::KEY,
            self.objects.len() - start,
            step.events.len(),
            usize::from(ended.outputs.is_none()),
        ]);
        Some(())
    }

    /// As it was.
    fn copy(&mut self, changed: &Changed, step: usize) {
        let (old, parts) = (&changed.remembered, changed.parts(step));
        self.keys.extend_from_slice(&old.keys()[parts.keys.clone()]);
        self.took.extend_from_slice(&old.took()[parts.took.clone()]);
        let objects = &changed.objects[parts.objects.clone()];
        self.objects.extend_from_slice(objects);
        let events = parts.events.clone();
        match self.events.last_mut() {
            Some(Events::Kept(kept)) if kept.end == events.start => kept.end = events.end,
            _ => self.events.push(Events::Kept(events.clone())),
        }
        self.enter([
            changed.results(step),
            objects.len(),
            events.len(),
            usize::from(parts.skipped),
        ]);
    }

    fn enter(&mut self, numbers: [usize; 4]) {
        for number in numbers {
            // A section of 4 GiB does not come of a file of some MiB.
            self.table.extend_from_slice(&(number as u32).to_le_bytes());
        }
    }

    /// `old`: the events of the run before.
    fn write(&self, cache: &Cache, name: RunName, head: Premises, plan: &[u8], old: &[u8]) {
        let events = self.events.iter().map(|events| match events {
            Events::New(events) => events.as_slice(),
            Events::Kept(place) => &old[place.clone()],
        });
        let head = Premises {
            keys: self.keys.len(),
            objects: self.objects.len(),
            plan: plan.len(),
            events: events.clone().map(<[u8]>::len).sum(),
            ..head
        };
        let start: [&[u8]; 5] = [&self.table, &self.keys, &self.took, &self.objects, plan];
        let sections: Vec<&[u8]> = start.into_iter().chain(events).collect();
        write(cache, name, &head, &sections);
    }
}

fn objects(cache: &Cache, artifacts: &[Artifact], table: &mut Vec<u8>) -> Option<()> {
    let artifacts: BTreeMap<&Digest, &Artifact> =
        artifacts.iter().map(|a| (&a.digest, a)).collect();
    let mut digests = BTreeSet::new();
    for artifact in artifacts.into_values() {
        digests.extend(cache.store().parts(artifact).ok()?);
    }
    for digest in digests {
        let meta = std::fs::metadata(cache.store().object_path(&digest)).ok()?;
        let object = ObjectPremise {
            digest,
            stamp: FileStamp::of(&meta),
            trusted: false,
        };
        object.write(table);
    }
    Some(())
}
