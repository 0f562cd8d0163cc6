//! How far the steps of a run and their items are. Who changes it: the scheduler alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Outputs;
use super::together::Together;
use crate::event::StepStatus;
use crate::expansion::ActionRequest;
use crate::lookup::Keyed;
use crate::pipeline::StepNode;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Something before it is missing.
    Waiting,
    /// Its items are looked up or run.
    Open,
    /// Its outputs are there.
    Done,
    /// It was not wanted: `when`, its own or one before it.
    Unwanted,
    /// It failed, or something before it did, or the run stopped.
    Failed,
}

/// How far an item is.
pub(super) enum Phase {
    /// To be looked up.
    Look,
    /// A lookup or an attempt is under way.
    Busy,
    /// To be run, once there is room.
    Ready(Arc<Keyed>, String),
    /// The same action runs elsewhere: this one is looked up again after it.
    Parked,
    /// Its inputs must be made again first.
    Stalled,
    /// It ended well.
    Ended(Arc<Outputs>),
    /// It did not.
    Failed,
}

impl Phase {
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Ended(_) | Self::Failed)
    }
}

pub(super) struct ItemState {
    pub(super) request: Arc<ActionRequest>,
    pub(super) phase: Phase,
    /// Attempts that had ended when it was looked up last.
    pub(super) looked_after: u64,
    /// What it was counted as.
    pub(super) counted: Option<StepStatus>,
    pub(super) stalls: u32,
}

impl ItemState {
    /// What it gave, if it ended well.
    pub(super) fn outputs(&self) -> Arc<Outputs> {
        match &self.phase {
            Phase::Ended(outputs) => Arc::clone(outputs),
            _ => Arc::default(),
        }
    }
}

pub(super) struct StepState {
    pub(super) node: Arc<StepNode>,
    pub(super) state: State,
    /// Steps before it that are not done.
    pub(super) missing: BTreeSet<usize>,
    /// Steps before it that give it data.
    pub(super) data: BTreeSet<usize>,
    /// Those of them that it cannot do without.
    pub(super) required: BTreeSet<usize>,
    pub(super) after: Vec<usize>,
    pub(super) items: Vec<ItemState>,
    /// Items that are not over.
    pub(super) left: usize,
    /// Lookups and attempts under way.
    pub(super) busy: usize,
    /// Items of which an attempt is under way.
    pub(super) together: Together,
    /// Waits for inputs that are made again.
    pub(super) stalled: bool,
    /// It is as the last run left it, and its node was not read.
    pub(super) kept: bool,
    pub(super) outputs: Arc<Outputs>,
}
