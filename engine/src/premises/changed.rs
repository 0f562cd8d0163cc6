//! [`Changed`]: a run in which all holds that the last one rested on, but for some files.
//! Only the steps that those reach are looked at, one after the other, for as long as what
//! they give differs; the rest stays as it was, and is not even read.
//!
//! Knows no order of steps. Invariant: a step that was not reached ended as the remembered
//! run says, with results and objects that are still there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flowrun_cache::{Artifact, Cache};

use super::known::{Ended, Known};
use super::{KEY, Observed, Remembered, STEP, TOOK};
use crate::event::{RunEvent, StepStatus};
use crate::pipeline::Pipeline;
use crate::step::StepSummary;
use crate::vocabulary::Vocabulary;

/// A run in which some files changed.
pub struct Changed {
    pub(super) remembered: Remembered,
    /// The table of objects, with the stamps of today.
    pub(super) objects: Vec<u8>,
    pub(super) known: Known,
    /// Steps that read a file that changed, or publish one.
    affected: BTreeSet<usize>,
    parts: Vec<Parts>,
    reached: Mutex<BTreeMap<String, usize>>,
}

/// What belongs to a step in the sections of the premises.
pub(super) struct Parts {
    pub(super) keys: Range<usize>,
    pub(super) took: Range<usize>,
    pub(super) objects: Range<usize>,
    pub(super) events: Range<usize>,
    pub(super) skipped: bool,
}

impl Changed {
    /// `None` when the steps cannot be read, or one of them was skipped: whether those that read
    /// it are to be skipped too is the ordinary run's to say.
    pub(super) fn read(
        cache: &Cache,
        remembered: Remembered,
        objects: Vec<u8>,
        affected: BTreeSet<usize>,
        vocabulary: &Vocabulary,
    ) -> Option<Self> {
        let head = &remembered.head;
        let bytes = std::fs::read(cache.dir().join(remembered.name.steps_path())).ok()?;
        let known = Known::read(bytes, head.graph, vocabulary)?;
        let parts = parts(&remembered)?;
        let whole = known.len() == parts.len()
            && affected.iter().all(|step| *step < known.len())
            && !parts.iter().any(|part| part.skipped);
        whole.then(|| Self {
            remembered,
            objects,
            known,
            affected,
            parts,
            reached: Mutex::default(),
        })
    }

    /// The report of the last run; a step that is reached gives another.
    pub(crate) fn report(&self) -> Option<&Artifact> {
        self.remembered.head.report.as_ref()
    }

    /// The pipeline, without its steps.
    #[must_use]
    pub fn pipeline(&self) -> Pipeline {
        Pipeline {
            hooks: self.remembered.head.hooks.clone(),
            tracking: self.remembered.head.tracking.clone(),
            ..self.known.pipeline()
        }
    }

    pub(crate) fn known(&self) -> &Known {
        &self.known
    }

    /// Steps that read a file that changed, or publish one.
    pub(crate) fn affected(&self) -> &BTreeSet<usize> {
        &self.affected
    }

    /// The steps after each step.
    pub(crate) fn after(&self) -> Vec<Vec<usize>> {
        let known = self.known();
        let mut after = vec![Vec::new(); known.len()];
        for i in 0..known.len() {
            for before in known.before(i).filter(|before| *before < known.len()) {
                after[before].push(i);
            }
        }
        after
    }

    /// Whether the changed files may reach each step, given the steps after each.
    pub(crate) fn may_reach(&self, after: &[Vec<usize>]) -> Vec<bool> {
        let mut reached = vec![false; after.len()];
        let mut next: Vec<usize> = self.affected.iter().copied().collect();
        while let Some(i) = next.pop() {
            if !std::mem::replace(&mut reached[i], true) {
                next.extend(&after[i]);
            }
        }
        reached
    }

    /// The names of the steps that the changed files may reach.
    #[must_use]
    pub fn within_reach(&self) -> BTreeSet<String> {
        let reached = self.may_reach(&self.after()).into_iter().enumerate();
        reached
            .filter(|(_, reached)| *reached)
            .filter_map(|(i, _)| Some(self.known.ended(i)?.name))
            .collect()
    }

    /// Names of secrets.
    pub(crate) fn secrets(&self) -> &[String] {
        &self.remembered.head.secrets
    }

    /// The plan's text in pieces, for a run of this id.
    pub(crate) fn plan<'a>(&'a self, run_id: &'a str) -> [&'a [u8]; 3] {
        self.remembered.plan_of(run_id)
    }

    /// A step was looked at in this run.
    pub(crate) fn reach(&self, name: &str, step: usize) {
        self.reached().insert(name.to_owned(), step);
    }

    pub(super) fn reached(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn parts(&self, step: usize) -> &Parts {
        &self.parts[step]
    }

    /// The step was skipped.
    pub(crate) fn was_skipped(&self, step: usize) -> bool {
        self.parts[step].skipped
    }

    /// How many results the step had.
    pub(crate) fn results(&self, step: usize) -> usize {
        self.parts[step].keys.len() / KEY
    }

    /// The events of a step, one JSON object a line.
    fn events(&self, step: usize) -> &[u8] {
        &self.remembered.events()[self.parts[step].events.clone()]
    }

    /// The events of these steps, which are in order.
    pub(crate) fn events_of(&self, steps: impl Iterator<Item = usize>) -> Vec<u8> {
        let events = self.remembered.events();
        let mut lines = Vec::with_capacity(events.len());
        for run in joined(steps.map(|step| self.parts[step].events.clone())) {
            lines.extend_from_slice(&events[run]);
        }
        lines
    }

    /// What a step of this run is told of one that was not reached.
    pub(crate) fn summaries(&self, step: usize) -> Vec<StepSummary> {
        let took = &self.remembered.took()[self.parts[step].took.clone()];
        let mut took = took.chunks_exact(TOOK).map(|eight| {
            let eight: [u8; TOOK] = eight.try_into().unwrap_or_default();
            u64::from_le_bytes(eight)
        });
        let lines = self.events(step).split(|b| *b == b'\n');
        let events = lines.filter_map(|line| serde_json::from_slice(line).ok());
        events
            .filter_map(|event| match event {
                RunEvent::StepFinished {
                    step,
                    kind,
                    status: StepStatus::Cached,
                    metrics,
                    ..
                } => Some(StepSummary {
                    step,
                    kind,
                    status: "cached".to_owned(),
                    took_ms: took.next().unwrap_or_default(),
                    metrics,
                }),
                _ => None,
            })
            .collect()
    }

    /// What is observed of the world, and what names no file.
    pub(super) fn outside(&self) -> (&[Observed], &[String]) {
        let head = &self.remembered.head;
        (&head.observed, &head.absent)
    }

    /// The steps' ends, where they are others than before.
    pub(super) fn ends(&self, ends: &BTreeMap<usize, Ended>) -> Option<Vec<u8>> {
        self.known.with(ends)
    }
}

/// Ranges that follow each other without a gap, as one.
fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => runs.push(range),
        }
    }
    runs
}

/// Where the parts of each step lie.
fn parts(remembered: &Remembered) -> Option<Vec<Parts>> {
    let (mut keys, mut objects, mut events) = (0, 0, 0);
    let mut all = Vec::with_capacity(remembered.head.steps);
    for entry in remembered.table().chunks_exact(STEP) {
        let number = |at: usize| -> Option<usize> {
            let four: [u8; 4] = entry.get(4 * at..4 * at + 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(four) as usize)
        };
        let next = |at: &mut usize, more: usize| {
            *at += more;
            *at - more..*at
        };
        let results = number(0)?;
        let keys = next(&mut keys, results * KEY);
        all.push(Parts {
            took: keys.start / KEY * TOOK..keys.end / KEY * TOOK,
            keys,
            objects: next(&mut objects, number(1)?),
            events: next(&mut events, number(2)?),
            skipped: number(3)? > 0,
        });
    }
    let fits = keys == remembered.keys().len()
        && objects == remembered.objects().len()
        && events == remembered.events().len();
    fits.then_some(all)
}
