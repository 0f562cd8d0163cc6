//! [`Known`]: the steps of a remembered run, each read only when it is asked for. Written
//! beside the premises, for the run in which only files changed: what they do not reach
//! need not even be decoded.
//!
//! A digest over everything, the pipeline without its steps as one line of JSON, then for
//! each step its lengths and the numbers of the steps before it, then the texts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use flowrun_cache::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dag::predecessors;
use crate::language::Diagnostics;
use crate::pipeline::{Action, Pipeline, StepNode};
use crate::run::Outputs;
use crate::runner::JobRunner;
use crate::step::Step;
use crate::tracking::Tracking;
use crate::vocabulary::Vocabulary;

/// The pipeline without its steps.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    name: String,
    file: PathBuf,
    root: PathBuf,
    profiles: Vec<String>,
    params: BTreeMap<String, Value>,
    models: BTreeMap<String, Value>,
    pools: BTreeMap<String, usize>,
    runners: BTreeMap<String, Value>,
    steps: usize,
}

/// A step as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored<N> {
    node: N,
    /// The step kind; absent for a command.
    uses: Option<String>,
    run: Option<String>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ended {
    /// Its name.
    pub(crate) name: String,
    /// What it gave; nothing when it was skipped.
    pub(crate) outputs: Option<Arc<Outputs>>,
}

/// The steps of a remembered run.
pub(crate) struct Known {
    bytes: Vec<u8>,
    head: Head,
    places: Vec<Place>,
    kinds: BTreeMap<String, Arc<dyn Step>>,
    runners: BTreeMap<String, JobRunner>,
}

struct Place {
    node: std::ops::Range<usize>,
    ended: std::ops::Range<usize>,
    before: Vec<u32>,
}

impl Known {
    /// Reads what was written; `None` when it is not what `digest` says.
    pub(crate) fn read(bytes: Vec<u8>, digest: Digest, kinds: &Vocabulary) -> Option<Self> {
        if Digest::of_bytes(&bytes) != digest {
            return None;
        }
        let line = bytes.iter().position(|b| *b == b'\n')?;
        let head: Head = serde_json::from_slice(bytes.get(..line)?).ok()?;
        let mut numbers = bytes.get(line + 1..)?.chunks_exact(4).map(|four| {
            let four: [u8; 4] = four.try_into().unwrap_or_default();
            u32::from_le_bytes(four)
        });
        let mut lengths = Vec::with_capacity(head.steps);
        let mut words = 0;
        for _ in 0..head.steps {
            let (node, ended, count) = (numbers.next()?, numbers.next()?, numbers.next()?);
            let before: Vec<u32> = numbers.by_ref().take(count as usize).collect();
            words += 3 + before.len();
            lengths.push((node as usize, ended as usize, before));
        }
        let mut at = line + 1 + 4 * words;
        let mut next = |length: usize| {
            at += length;
            at - length..at
        };
        let places: Vec<Place> = lengths
            .into_iter()
            .map(|(node, ended, before)| Place {
                node: next(node),
                ended: next(ended),
                before,
            })
            .collect();
        drop(numbers);
        let runners = head.runners.iter().map(|(name, entry)| {
            let runner = JobRunner::new(kinds.runners.get(name)?, entry).ok()?;
            Some((name.clone(), runner))
        });
        let runners = runners.collect::<Option<_>>()?;
        let whole = at == bytes.len();
        whole.then(|| Self {
            runners,
            head,
            places,
            kinds: kinds.steps.clone(),
            bytes,
        })
    }

    /// The pipeline, without its steps.
    pub(crate) fn pipeline(&self) -> Pipeline {
        let head = &self.head;
        Pipeline {
            name: head.name.clone(),
            about: None,
            file: head.file.clone(),
            root: head.root.clone(),
            profiles: head.profiles.clone(),
            params: head.params.clone(),
            models: head.models.clone(),
            pools: head.pools.clone(),
            runners: self.runners.clone(),
            hooks: BTreeMap::new(),
            tracking: Tracking::default(),
            uses: BTreeMap::new(),
            steps: Vec::new(),
            sources: Vec::new(),
            warnings: Diagnostics::default(),
        }
    }

    /// How many steps there are.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// The steps before a step.
    pub(crate) fn before(&self, step: usize) -> impl Iterator<Item = usize> {
        self.places[step]
            .before
            .iter()
            .map(|&before| before as usize)
    }

    /// A step; `None` when its kind is not known here.
    pub(crate) fn node(&self, step: usize) -> Option<StepNode> {
        let text = &self.bytes[self.places[step].node.clone()];
        let stored: Stored<StepNode> = serde_json::from_slice(text).ok()?;
        let action = match (stored.uses, stored.run) {
            (Some(kind), None) => Action::Uses(Arc::clone(self.kinds.get(kind.as_str())?)),
            (None, Some(command)) => Action::Run(command),
            _ => return None,
        };
        Some(StepNode {
            action,
            ..stored.node
        })
    }

    /// How a step ended.
    pub(crate) fn ended(&self, step: usize) -> Option<Ended> {
        serde_json::from_slice(&self.bytes[self.places[step].ended.clone()]).ok()
    }

    /// The same, with other ends for some steps; `None` when none of them is another.
    pub(super) fn with(&self, ends: &BTreeMap<usize, Ended>) -> Option<Vec<u8>> {
        if ends
            .iter()
            .all(|(step, end)| self.ended(*step).as_ref() == Some(end))
        {
            return None;
        }
        let mut file = File::new(&self.head)?;
        for (step, place) in self.places.iter().enumerate() {
            let node = &self.bytes[place.node.clone()];
            match ends.get(&step) {
                Some(end) => file.add(node, &serde_json::to_vec(end).ok()?, &place.before),
                None => file.add(node, &self.bytes[place.ended.clone()], &place.before),
            }
        }
        Some(file.bytes())
    }
}

/// The bytes for a pipeline whose steps ended so.
pub(super) fn text(pipeline: &Pipeline, ends: &BTreeMap<String, Ended>) -> Option<Vec<u8>> {
    let numbers: BTreeMap<&str, u32> = pipeline
        .steps
        .iter()
        .zip(0..)
        .map(|(step, at)| (step.name.as_str(), at))
        .collect();
    let mut file = File::new(&Head {
        name: pipeline.name.clone(),
        file: pipeline.file.clone(),
        root: pipeline.root.clone(),
        profiles: pipeline.profiles.clone(),
        params: pipeline.params.clone(),
        models: pipeline.models.clone(),
        pools: pipeline.pools.clone(),
        runners: pipeline
            .runners
            .iter()
            .map(|(name, runner)| (name.clone(), runner.entry.clone()))
            .collect(),
        steps: pipeline.steps.len(),
    })?;
    for step in &pipeline.steps {
        let (uses, run) = match &step.action {
            Action::Uses(kind) => (Some(kind.kind().to_owned()), None),
            Action::Run(command) => (None, Some(command.clone())),
        };
        let node = serde_json::to_vec(&Stored {
            node: step,
            uses,
            run,
        });
        let ended = serde_json::to_vec(ends.get(&step.name)?);
        let before = predecessors(step);
        let before = before.iter().filter_map(|name| numbers.get(name.as_str()));
        let before: Vec<u32> = before.copied().collect();
        file.add(&node.ok()?, &ended.ok()?, &before);
    }
    Some(file.bytes())
}

/// The file as it is put together.
struct File {
    start: Vec<u8>,
    texts: Vec<u8>,
}

impl File {
    fn new(head: &Head) -> Option<Self> {
        let mut start = serde_json::to_vec(head).ok()?;
        start.push(b'\n');
        Some(Self {
            start,
            texts: Vec::new(),
        })
    }

    fn add(&mut self, node: &[u8], ended: &[u8], before: &[u32]) {
        // A text of 4 GiB does not come out of a file of a few MiB.
        let lengths = [node.len() as u32, ended.len() as u32, before.len() as u32];
        for number in lengths.iter().chain(before) {
            self.start.extend_from_slice(&number.to_le_bytes());
        }
        self.texts.extend_from_slice(node);
        self.texts.extend_from_slice(ended);
    }

    fn bytes(mut self) -> Vec<u8> {
        self.start.append(&mut self.texts);
        self.start
    }
}
