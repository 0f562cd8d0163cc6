//! [`RunDiff`]: what differs between two runs: params, and for each step its key
//! (with the params, inputs, env or version behind it), metrics and outputs.
//!
//! Reads records and results; runs nothing. Times are told, never counted as a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use flowrun_cache::{CacheReader, Digest};
use serde::Serialize;
use serde_json::Value;

use crate::event::StepStatus;
use crate::manifest;
use crate::record::{RunPlan, RunRecord, StepRecord};

/// What differs between two runs.
#[derive(Debug, Clone, Serialize)]
pub struct RunDiff {
    /// The run that is compared with.
    pub old: String,
    /// The run that is compared.
    pub new: String,
    /// Name of the pipeline, where it is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<Change<String>>,
    /// Profiles, where they are others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profiles: Option<Change<Vec<String>>>,
    /// Params that differ, by name.
    pub params: BTreeMap<String, Change<Value>>,
    /// Steps that differ, in the order of the new run, then those that only the old one has.
    pub steps: Vec<StepDiff>,
    /// Steps that are the same in both.
    pub same: usize,
}

/// A value that differs; `None` where there is none.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change<T> {
    /// In the old run.
    pub old: Option<T>,
    /// In the new run.
    pub new: Option<T>,
}

/// One step that differs.
#[derive(Debug, Clone, Serialize)]
pub struct StepDiff {
    /// Step id.
    pub step: String,
    /// How it ended.
    pub status: Change<StepStatus>,
    /// Milliseconds in each run.
    pub took_ms: Change<u64>,
    /// Its action keys, where they are others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Change<String>>,
    /// Why its key differs, one line for each cause.
    pub changes: Vec<String>,
    /// Metrics that differ, by name.
    pub metrics: BTreeMap<String, Change<Value>>,
    /// Digests of outputs that differ, by port.
    pub outputs: BTreeMap<String, Change<String>>,
}

impl RunDiff {
    /// Compares two runs by their folders.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub fn of(old: &Path, new: &Path, cache: &CacheReader) -> std::io::Result<Self> {
        let (a, b) = (RunRecord::load(old)?, RunRecord::load(new)?);
        let plan = |dir| RunRecord::load_plan(dir).unwrap_or_default();
        Ok(Self::between((&a, &plan(old)), (&b, &plan(new)), cache))
    }

    fn between(
        (a, plan_a): (&RunRecord, &RunPlan),
        (b, plan_b): (&RunRecord, &RunPlan),
        cache: &CacheReader,
    ) -> Self {
        let steps_a = by_id(a);
        let ids_b: BTreeSet<&str> = b.steps.iter().map(|s| s.step.as_str()).collect();
        let gone = a.steps.iter().filter(|s| !ids_b.contains(s.step.as_str()));
        let pairs = b
            .steps
            .iter()
            .map(|new| (steps_a.get(new.step.as_str()).copied(), Some(new)))
            .chain(gone.map(|old| (Some(old), None)));
        let (mut steps, mut same) = (Vec::new(), 0);
        for (old, new) in pairs {
            match StepDiff::between(old, new, cache) {
                Some(step) => steps.push(step),
                None => same += 1,
            }
        }
        Self {
            old: a.run.clone(),
            new: b.run.clone(),
            pipeline: changed(Some(a.pipeline.clone()), Some(b.pipeline.clone())),
            profiles: changed(Some(plan_a.profiles.clone()), Some(plan_b.profiles.clone())),
            params: changes(&plan_a.params, &plan_b.params),
            steps,
            same,
        }
    }

    /// Nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pipeline.is_none()
            && self.profiles.is_none()
            && self.params.is_empty()
            && self.steps.is_empty()
    }
}

impl StepDiff {
    fn between(
        old: Option<&StepRecord>,
        new: Option<&StepRecord>,
        cache: &CacheReader,
    ) -> Option<Self> {
        let digests = |step: Option<&StepRecord>| -> BTreeMap<String, String> {
            let outputs = step.iter().flat_map(|s| &s.outputs);
            outputs
                .map(|(port, o)| (port.clone(), o.digest.clone()))
                .collect()
        };
        let metrics = |step: Option<&StepRecord>| step.map(|s| s.metrics.clone());
        let diff = Self {
            step: new.or(old)?.step.clone(),
            status: Change {
                old: old.map(|s| s.status),
                new: new.map(|s| s.status),
            },
            took_ms: Change {
                old: old.map(|s| s.took_ms),
                new: new.map(|s| s.took_ms),
            },
            key: changed(key(old), key(new)),
            changes: causes(old, new, cache),
            metrics: changes(
                &metrics(old).unwrap_or_default(),
                &metrics(new).unwrap_or_default(),
            ),
            outputs: changes(&digests(old), &digests(new)),
        };
        let same = diff.key.is_none()
            && diff.metrics.is_empty()
            && diff.outputs.is_empty()
            && ends_alike(old, new);
        (!same).then_some(diff)
    }
}

/// The action key, where there is one.
fn key(step: Option<&StepRecord>) -> Option<String> {
    step.map(|s| s.key.clone()).filter(|key| !key.is_empty())
}

/// Whether it ran or came from the cache is not a difference of what it is.
fn ends_alike(old: Option<&StepRecord>, new: Option<&StepRecord>) -> bool {
    let good = |status| matches!(status, StepStatus::Ran | StepStatus::Cached);
    match (old, new) {
        (Some(a), Some(b)) => a.status == b.status || (good(a.status) && good(b.status)),
        _ => false,
    }
}

fn causes(old: Option<&StepRecord>, new: Option<&StepRecord>, cache: &CacheReader) -> Vec<String> {
    let (Some(old), Some(new)) = (old, new) else {
        return Vec::new();
    };
    if old.key == new.key || old.key.is_empty() || new.key.is_empty() {
        return Vec::new();
    }
    let manifest = |step: &StepRecord| {
        let result = cache.actions().get(&Digest::parse(&step.key)?)?;
        Some(result.manifest)
    };
    match (manifest(old), manifest(new)) {
        (Some(a), Some(b)) => manifest::diff(&a, &b),
        _ => vec!["its key differs; why is not known: a result is not in the cache".to_owned()],
    }
}

fn by_id(record: &RunRecord) -> BTreeMap<&str, &StepRecord> {
    let steps = record.steps.iter();
    steps.map(|step| (step.step.as_str(), step)).collect()
}

fn changed<T: PartialEq>(old: Option<T>, new: Option<T>) -> Option<Change<T>> {
    (old != new).then_some(Change { old, new })
}

fn changes<T: PartialEq + Clone>(
    old: &BTreeMap<String, T>,
    new: &BTreeMap<String, T>,
) -> BTreeMap<String, Change<T>> {
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let change = changed(old.get(name).cloned(), new.get(name).cloned())?;
            Some((name.clone(), change))
        })
        .collect()
}
