//! How a step opens once nothing before it is missing, and closes after its last item. Knows
//! neither threads nor room. Invariant: a step closes once, unless what it made must be made again.

use std::sync::Arc;

use super::Scheduler;
use crate::event::RunEvent;
use crate::expansion::{ActionRequest, expand, gather};
use crate::run::state::{ItemState, Phase, State};
use crate::step::StepError;

impl Scheduler {
    /// Tells the steps after those that closed.
    pub(super) fn ripple(&mut self) {
        while let Some(before) = self.settled.pop_front() {
            let name = self.steps[before].node.name.clone();
            let differs = self.differs(before);
            for i in self.steps[before].after.clone() {
                if differs {
                    self.awaken(i);
                }
                match self.steps[before].state {
                    State::Waiting | State::Open => {}
                    State::Failed => {
                        self.give_up(i, &format!("needs `{name}`, which did not finish"), true);
                    }
                    State::Unwanted if self.steps[i].required.contains(&before) => {
                        self.give_up(i, &format!("needs `{name}`, which was skipped"), false);
                    }
                    State::Done | State::Unwanted => self.arrived(i, before),
                }
            }
        }
    }

    fn arrived(&mut self, i: usize, before: usize) {
        let step = &mut self.steps[i];
        if !step.missing.remove(&before) || !step.missing.is_empty() {
            return;
        }
        if step.state == State::Waiting {
            self.open(i);
        } else {
            self.rebind(i);
        }
    }

    /// A step that can never begin, or go on.
    fn give_up(&mut self, i: usize, why: &str, failed: bool) {
        match self.steps[i].state {
            State::Waiting => {
                self.skipped(i, why);
                let state = if failed {
                    State::Failed
                } else {
                    State::Unwanted
                };
                self.set(i, state);
            }
            State::Open if self.steps[i].stalled => {
                self.steps[i].stalled = false;
                self.skip_items(i, why);
                self.close_if_over(i);
            }
            _ => {}
        }
    }

    /// Expands a step into its items and has them looked up.
    pub(super) fn open(&mut self, i: usize) {
        if let Some(changed) = self.changed.as_ref().filter(|_| self.steps[i].kept) {
            let skipped = changed.was_skipped(i);
            self.set(
                i,
                if skipped {
                    State::Unwanted
                } else {
                    State::Done
                },
            );
            return;
        }
        match self.expand(i) {
            Ok(None) => {
                self.skipped(i, "its `when` is false");
                self.set(i, State::Unwanted);
            }
            Ok(Some(requests)) => {
                let items = requests.into_iter().map(|request| ItemState {
                    request: Arc::new(request),
                    phase: Phase::Look,
                    looked_after: 0,
                    counted: None,
                    stalls: 0,
                });
                self.steps[i].items = items.collect();
                self.steps[i].left = self.steps[i].items.len();
                self.set(i, State::Open);
                self.expanded(i);
                self.looks
                    .extend((0..self.steps[i].items.len()).map(|item| (i, item)));
                self.close_if_over(i);
            }
            Err(error) => self.fail_step(i, error),
        }
    }

    pub(super) fn expand(&self, i: usize) -> Result<Option<Vec<ActionRequest>>, StepError> {
        let output = |step: &str, port: &str| {
            let step = &self.steps[*self.index.get(step)?];
            step.outputs.get(port).cloned()
        };
        let node = &self.steps[i].node;
        expand(&self.pipeline, node, &self.options.expressions, output)
    }

    pub(super) fn expanded(&self, i: usize) {
        let step = &self.steps[i];
        if step.node.foreach.is_some() {
            let labels = step.items.iter().filter_map(|i| i.request.label.clone());
            let event = RunEvent::StepExpanded {
                step: step.node.name.clone(),
                items: labels.collect(),
            };
            if let Some(memory) = self.worker.memory() {
                memory.event(&step.node.name, &event);
            }
            self.worker.send(event);
        }
    }

    /// When all items ended: outputs, and the state that follows.
    pub(super) fn close_if_over(&mut self, i: usize) {
        let step = &mut self.steps[i];
        if step.state != State::Open || step.busy > 0 || step.left > 0 {
            return;
        }
        let mut ends = Vec::with_capacity(step.items.len());
        for item in &step.items {
            if let Phase::Ended(outputs) = &item.phase {
                ends.push((item.request.label.as_deref(), outputs.as_ref()));
            }
        }
        if ends.len() < step.items.len() {
            self.set(i, State::Failed);
            return;
        }
        step.outputs = match (&step.node.foreach, step.items.first()) {
            (Some(_), _) => Arc::new(gather(&step.node, &ends)),
            (None, Some(item)) => item.outputs(),
            (None, None) => Arc::default(),
        };
        self.set(i, State::Done);
    }
}
