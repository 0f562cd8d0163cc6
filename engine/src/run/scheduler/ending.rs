//! How items, steps and the run end: what is told, counted and summed up.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use flowrun_cache::{ActionKey, ActionResult};

use super::{Phase, Place, Scheduler, State};
use crate::event::{ResultFrom, RunEvent, StepStatus};
use crate::expansion::kind_of;
use crate::run::RunSummary;
use crate::run::worker::{How, Trouble, UNCHANGED};
use crate::step::{StepError, StepErrorKind, StepSummary};

impl Scheduler {
    pub(super) fn succeed(
        &mut self,
        place: Place,
        key: Option<ActionKey>,
        how: How,
        took_ms: u64,
        why: String,
        result: ActionResult,
    ) {
        let (status, word, from) = match how {
            How::Ran => (StepStatus::Ran, "ran", None),
            How::Cached => (StepStatus::Cached, "cached", None),
            How::Fetched => (StepStatus::Cached, "cached", Some(ResultFrom::Remote)),
        };
        let request = Arc::clone(&self.item(place).request);
        let summary = StepSummary {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            status: word.to_owned(),
            took_ms: result.took_ms,
            metrics: result.metrics.clone(),
        };
        let again = self.item(place).counted.is_some() || self.recalled;
        match again {
            true => self.finished.put(summary),
            false => self.finished.push(summary),
        }
        self.count(place, status);
        // What the next run tells, if nothing changes.
        let mut event = RunEvent::StepFinished {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            status: StepStatus::Cached,
            key: key.map(|k| k.to_hex()).unwrap_or_default(),
            took_ms: 0,
            why: UNCHANGED.to_owned(),
            outputs: self.worker.infos(&result.outputs),
            metrics: result.metrics,
            help: None,
            from: None,
        };
        if let Some((memory, key)) = self.worker.memory().zip(key) {
            let name = &request.node.name;
            memory.event(name, &event);
            memory.outputs(name, &key, &result.outputs, result.took_ms);
        }
        let RunEvent::StepFinished {
            status: told_status,
            took_ms: told_took_ms,
            why: told_why,
            from: told_from,
            ..
        } = &mut event
        else {
            unreachable!("it was just made");
        };
        (*told_status, *told_took_ms) = (status, took_ms);
        (*told_why, *told_from) = (why, from);
        self.worker.send(event);
        self.set_phase(place, Phase::Ended(Arc::new(result.outputs)));
    }

    pub(super) fn fail(
        &mut self,
        place: Place,
        key: Option<ActionKey>,
        took_ms: u64,
        trouble: Trouble,
    ) {
        let request = Arc::clone(&self.item(place).request);
        let error = trouble.error;
        let interrupted = error.kind == StepErrorKind::Cancelled;
        let status = if interrupted {
            StepStatus::Skipped
        } else {
            StepStatus::Failed
        };
        let (outputs, metrics) = trouble
            .made
            .map(|made| (self.worker.infos(&made.outputs), made.metrics))
            .unwrap_or_default();
        self.count(place, status);
        self.worker.send(RunEvent::StepFinished {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            status,
            key: key.map(|k| k.to_hex()).unwrap_or_default(),
            took_ms,
            why: error.message.clone(),
            outputs,
            metrics,
            help: error.help.clone(),
            from: None,
        });
        self.set_phase(place, Phase::Failed);
        self.note(&request.id, error);
    }

    /// Remembers a failure, and stops the run unless it is to go on.
    pub(super) fn note(&mut self, id: &str, error: StepError) {
        if error.kind == StepErrorKind::Cancelled {
            let why = || "the run was interrupted".to_owned();
            self.stopping.get_or_insert_with(why);
            return;
        }
        self.gate_failed |= error.kind == StepErrorKind::Gate;
        if !self.options.keep_going {
            let why = || format!("the run stopped after `{id}` failed");
            self.stopping.get_or_insert_with(why);
        }
        // A step that failed weighs more than a gate that was not met.
        let outweighs = |(_, first): &(String, StepError)| {
            first.kind == StepErrorKind::Gate && error.kind != StepErrorKind::Gate
        };
        if self.first_error.as_ref().is_none_or(outweighs) {
            self.first_error = Some((id.to_owned(), error));
        }
    }

    pub(super) fn fail_step(&mut self, i: usize, error: StepError) {
        let step = &self.steps[i];
        let name = step.node.name.clone();
        self.bump("failed");
        self.worker.send(RunEvent::StepFinished {
            step: name.clone(),
            kind: kind_of(&self.steps[i].node).to_owned(),
            status: StepStatus::Failed,
            key: String::new(),
            took_ms: 0,
            why: error.message.clone(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            help: error.help.clone(),
            from: None,
        });
        self.note(&name, error);
        self.set(i, State::Failed);
    }

    pub(super) fn skip_the_rest(&mut self) {
        let why = self
            .stopping
            .clone()
            .unwrap_or_else(|| "the run ended".to_owned());
        for i in 0..self.steps.len() {
            match self.steps[i].state {
                State::Waiting => {
                    self.awaken(i);
                    self.skipped(i, &why);
                    self.set(i, State::Failed);
                }
                State::Open => {
                    self.skip_items(i, &why);
                    self.set(i, State::Failed);
                }
                State::Done | State::Unwanted | State::Failed => {}
            }
        }
    }

    /// Skips the items of a step that neither ended nor are under way.
    pub(super) fn skip_items(&mut self, i: usize, why: &str) {
        for item in 0..self.steps[i].items.len() {
            let state = self.item((i, item));
            if state.phase.is_over() || matches!(state.phase, Phase::Busy) {
                continue;
            }
            let id = state.request.id.clone();
            self.set_phase((i, item), Phase::Failed);
            self.count((i, item), StepStatus::Skipped);
            self.skip_event(i, id, why);
        }
    }

    pub(super) fn skipped(&mut self, i: usize, why: &str) {
        self.bump("skipped");
        self.skip_event(i, self.steps[i].node.name.clone(), why);
    }

    pub(super) fn skip_event(&self, i: usize, id: String, why: &str) {
        let event = RunEvent::StepFinished {
            step: id,
            kind: kind_of(&self.steps[i].node).to_owned(),
            status: StepStatus::Skipped,
            key: String::new(),
            took_ms: 0,
            why: why.to_owned(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            help: None,
            from: None,
        };
        if let Some(memory) = self.worker.memory() {
            memory.event(&self.steps[i].node.name, &event);
        }
        self.worker.send(event);
    }

    /// Counts an item's end; one that ended before counts as it ended last.
    pub(super) fn count(&mut self, place: Place, status: StepStatus) {
        let name = |status| match status {
            StepStatus::Ran => "ran",
            StepStatus::Cached => "cached",
            StepStatus::Failed => "failed",
            StepStatus::Skipped => "skipped",
        };
        if let Some(earlier) = self.item_mut(place).counted.replace(status)
            && let Some(count) = self.counts.get_mut(name(earlier))
        {
            *count -= 1;
        }
        self.bump(name(status));
    }

    pub(super) fn bump(&mut self, name: &'static str) {
        *self.counts.entry(name).or_default() += 1;
    }

    pub(in crate::run) fn summary(&self, run_id: String, run_dir: PathBuf) -> RunSummary {
        let count = |name| self.counts.get(name).copied().unwrap_or_default();
        let ok = self
            .steps
            .iter()
            .all(|s| matches!(s.state, State::Done | State::Unwanted));
        RunSummary {
            run_id,
            run_dir,
            ok,
            ran: count("ran"),
            cached: count("cached"),
            failed: count("failed"),
            skipped: count("skipped"),
            interrupted: !ok && self.worker.cancel.is_cancelled(),
            gate_failed: self.gate_failed,
            first_error: self.first_error.clone(),
            steps: self.finished.to_vec(),
        }
    }
}
