//! A run in which only some files changed: steps stay as the last run left them until
//! something that they read differs; only then are they read, and join the others.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Scheduler, State, StepState};
use crate::dag::{data_predecessors, required_predecessors};
use crate::event::RunEvent;
use crate::pipeline::{Pipeline, StepNode};
use crate::premises::Changed;
use crate::run::RunOptions;
use crate::run::together::Together;
use crate::run::worker::Worker;
use crate::step::StepError;

impl Scheduler {
    /// For a run in which only some files changed: the steps that those may reach wait, and
    /// are read when they are reached.
    pub(in crate::run) fn changed(
        pipeline: Arc<Pipeline>,
        options: RunOptions,
        changed: Arc<Changed>,
        worker: &Arc<Worker>,
    ) -> Self {
        let known = changed.known();
        let after = changed.after();
        let waits = changed.may_reach(&after);
        let blank = Arc::new(StepNode::default());
        let step = |(i, after): (usize, Vec<usize>)| StepState {
            node: Arc::clone(&blank),
            state: match (waits[i], changed.was_skipped(i)) {
                (true, _) => State::Waiting,
                (false, true) => State::Unwanted,
                (false, false) => State::Done,
            },
            missing: known.before(i).filter(|b| waits[i] && waits[*b]).collect(),
            data: BTreeSet::new(),
            required: BTreeSet::new(),
            after,
            items: Vec::new(),
            left: 0,
            busy: 0,
            together: Together::default(),
            stalled: false,
            kept: true,
            outputs: Arc::default(),
        };
        let steps = after.into_iter().enumerate().map(step).collect();
        Self {
            steps,
            changed: Some(changed),
            ..Self::empty(pipeline, options, worker)
        }
    }

    /// Reads a step that was as the last run left it, with what the steps before it gave.
    pub(super) fn awaken(&mut self, i: usize) {
        let Some(changed) = self.changed.clone().filter(|_| self.steps[i].kept) else {
            return;
        };
        self.steps[i].kept = false;
        let known = changed.known();
        for before in known.before(i) {
            self.recall_outputs(before);
        }
        let Some(node) = known.node(i) else {
            let name = known.ended(i).map(|ended| ended.name).unwrap_or_default();
            self.steps[i].node = Arc::new(StepNode {
                name,
                ..StepNode::default()
            });
            let text = "what is remembered of the last run cannot be read";
            let help = "remove the folder `premises` of the cache";
            self.fail_step(i, StepError::failed(text).help(help));
            return;
        };
        let places = |names: BTreeSet<String>| -> BTreeSet<usize> {
            let names = names.iter();
            names.filter_map(|n| self.index.get(n).copied()).collect()
        };
        let (data, required) = (
            places(data_predecessors(&node)),
            places(required_predecessors(&node)),
        );
        self.index.insert(node.name.clone(), i);
        changed.reach(&node.name, i);
        let step = &mut self.steps[i];
        (step.data, step.required) = (data, required);
        step.node = Arc::new(node);
    }

    /// What a step gave in the last run, until it gives something else.
    pub(super) fn recall_outputs(&mut self, i: usize) {
        let ended = self.changed.as_ref().filter(|_| self.steps[i].kept);
        if let Some(ended) = ended.and_then(|changed| changed.known().ended(i)) {
            self.index.insert(ended.name, i);
            self.steps[i].outputs = ended.outputs.unwrap_or_default();
        }
    }

    /// The step ended otherwise than in the last run.
    pub(super) fn differs(&self, i: usize) -> bool {
        let Some(changed) = self.changed.as_ref().filter(|_| !self.steps[i].kept) else {
            return false;
        };
        let step = &self.steps[i];
        let outputs = match step.state {
            State::Done => Some(&step.outputs),
            State::Unwanted => None,
            State::Waiting | State::Open | State::Failed => return true,
        };
        let ended = changed.known().ended(i);
        ended.is_none_or(|ended| ended.outputs.as_ref() != outputs)
    }

    /// Tells of the steps that stayed as they were.
    pub(super) fn tell_kept(&mut self) {
        let Some(changed) = &self.changed else {
            return;
        };
        let kept = || self.steps.iter().enumerate().filter(|(_, s)| s.kept);
        let cached: usize = kept().map(|(i, _)| changed.results(i)).sum();
        let skipped = kept().filter(|(i, _)| changed.was_skipped(*i)).count();
        let lines = changed.events_of(kept().map(|(i, _)| i));
        *self.counts.entry("cached").or_default() += cached;
        *self.counts.entry("skipped").or_default() += skipped;
        self.worker.send(RunEvent::Recorded { lines });
    }

    /// Steps of this process are told of all that finished.
    pub(super) fn recall_finished(&mut self) {
        let Some(changed) = &self.changed else {
            return;
        };
        if self.recalled {
            return;
        }
        self.recalled = true;
        for (i, _) in self.steps.iter().enumerate().filter(|(_, s)| s.kept) {
            for summary in changed.summaries(i) {
                self.finished.push(summary);
            }
        }
    }
}
