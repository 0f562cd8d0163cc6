//! What a training tells its caller, and what the caller may tell it.

use std::path::{Path, PathBuf};

use crate::error::ModelError;
use crate::lora::LoraAdapter;

/// One finished step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// The step, counted from 1 over all epochs.
    pub step: usize,
    /// Steps of the whole training.
    pub steps: usize,
    /// The epoch, counted from 1.
    pub epoch: usize,
    /// Mean cross entropy per target token of the batch, in nats, before the update.
    pub loss: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Norm of all gradients, before clipping.
    pub gradient_norm: f64,
    /// Tokens that went through the model; a shared prefix counts once.
    pub tokens: usize,
    /// Target tokens.
    pub targets: usize,
}

/// Mean over rows that are not trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvalStats {
    /// Mean cross entropy per target token, in nats.
    pub loss: f64,
    /// Share of target tokens whose most likely prediction, given the right ones before it, was
    /// right.
    pub token_accuracy: f64,
}

/// One finished epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpochStats {
    /// The epoch, counted from 1.
    pub epoch: usize,
    /// Steps so far.
    pub step: usize,
    /// Mean loss of its steps.
    pub loss: f64,
    /// Validation, where rows for it were given.
    pub validation: Option<EvalStats>,
}

type OnStep<'a> = dyn FnMut(&StepStats) + 'a;
type OnCheckpoint<'a> = dyn FnMut(&StepStats, &LoraAdapter) -> Result<(), ModelError> + 'a;
type OnEpoch<'a> = dyn FnMut(&EpochStats, &LoraAdapter) -> Result<(), ModelError> + 'a;

/// Callbacks of a training; all optional.
#[derive(Default)]
pub struct Hooks<'a> {
    pub(super) step: Option<Box<OnStep<'a>>>,
    pub(super) checkpoint: Option<(usize, Box<OnCheckpoint<'a>>)>,
    pub(super) epoch: Option<Box<OnEpoch<'a>>>,
    pub(super) cancelled: Option<Box<dyn Fn() -> bool + 'a>>,
    pub(super) state: Option<(PathBuf, usize)>,
}

impl<'a> Hooks<'a> {
    /// Called after every step.
    #[must_use]
    pub fn on_step(mut self, call: impl FnMut(&StepStats) + 'a) -> Self {
        self.step = Some(Box::new(call));
        self
    }

    /// Called after every `every` steps (0: never) with a checkpoint, before the state of that step
    /// is saved: whoever finds a state finds the checkpoints up to its step. An error ends the
    /// training. A resumed training may call it again for the same step with the same adapter.
    #[must_use]
    pub fn on_steps(
        mut self,
        every: usize,
        call: impl FnMut(&StepStats, &LoraAdapter) -> Result<(), ModelError> + 'a,
    ) -> Self {
        self.checkpoint = Some((every, Box::new(call)));
        self
    }

    /// Called after every epoch with a checkpoint. An error ends the training. When the process
    /// dies right after the call, a resumed training calls it again for the same epoch with the
    /// same adapter, so it should replace what it wrote.
    #[must_use]
    pub fn on_epoch(
        mut self,
        call: impl FnMut(&EpochStats, &LoraAdapter) -> Result<(), ModelError> + 'a,
    ) -> Self {
        self.epoch = Some(Box::new(call));
        self
    }

    /// Asked before every step; `true` ends the training with [`ModelError::Cancelled`], after
    /// its state was saved.
    #[must_use]
    pub fn cancelled_by(mut self, ask: impl Fn() -> bool + 'a) -> Self {
        self.cancelled = Some(Box::new(ask));
        self
    }

    /// Saves the state to `path` every `every` steps (0: never), after every epoch, and when
    /// cancelled. The file is replaced as a whole.
    #[must_use]
    pub fn save_state(mut self, path: &Path, every: usize) -> Self {
        self.state = Some((path.to_owned(), every));
        self
    }
}
