//! The training loop.
//!
//! | file | what |
//! |---|---|
//! | `trainer` | how far it is, and its steps |
//! | `passes` | the loss and the gradient of rows |
//! | `digest` | what decides the result |
//!
//! Knows no text, no clock and no folder but the state's. Invariant: everything that decides the
//! result is in the digest that the state carries.

mod digest;
mod passes;

use super::activated;
use super::adamw::AdamW;
use super::config::TrainConfig;
use super::frozen::Frozen;
use super::hooks::{EpochStats, EvalStats, Hooks, StepStats};
use super::order::shuffled;
use super::params::Layout;
use super::row::{self, TrainRow};
use super::schedule::learning_rate;
use super::state::TrainerState;
use crate::base_model::BaseModel;
use crate::device::Device;
use crate::error::ModelError;
use crate::kernels::vector;
use crate::lora::{LoraAdapter, LoraConfig};
use crate::profile::{self, Operation, in_pool};
use crate::weights::LlamaWeights;
use digest::{digest, hash_rows};
use passes::Workspace;
#[cfg(test)]
pub(crate) use passes::gradients;

/// A training of one adapter: rows, settings, and how far it is.
pub struct Trainer<'a> {
    weights: &'a LlamaWeights,
    lora: LoraConfig,
    config: TrainConfig,
    rows: &'a [TrainRow],
    validation: &'a [TrainRow],
    layout: Layout,
    state: TrainerState,
    /// The base model on the GPU that computes, where one does.
    #[cfg(feature = "cuda")]
    on_gpu: Option<std::sync::Arc<crate::gpu::GpuModel>>,
}

/// What a training ends with.
#[derive(Debug, Clone)]
pub struct TrainOutcome {
    /// The adapter after the last step.
    pub adapter: LoraAdapter,
    /// Loss of every step, those before a resumption included.
    pub losses: Vec<f32>,
    /// Mean loss on the rows to validate on after every epoch, where there are any.
    pub validations: Vec<f32>,
    /// Whether the validation loss ended it before its last step.
    pub stopped_early: bool,
}

impl<'a> Trainer<'a> {
    /// A training that has not begun. The adapter starts as [`LoraAdapter::init`] makes it.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a setting out of range, [`ModelError::Row`] for a row that
    /// does not fit the model, naming it.
    pub fn new(
        weights: &'a LlamaWeights,
        lora: LoraConfig,
        config: TrainConfig,
        rows: &'a [TrainRow],
    ) -> Result<Self, ModelError> {
        config.check()?;
        if rows.is_empty() {
            let reason = "there is no row to train on".to_owned();
            return Err(ModelError::Config {
                name: "rows",
                reason,
            });
        }
        row::check(rows, &weights.config)?;
        let layout = Layout::new(&lora, &weights.config)?;
        if let Some(invocation) = &lora.invocation_tokens {
            activated::check(rows, invocation)?;
        }
        let start = LoraAdapter::init(&lora, &weights.config, config.seed)?;
        let params = layout.flatten(&start)?;
        let state = TrainerState {
            digest: digest(weights, &lora, &config, rows)?,
            step: 0,
            first: vec![0.0; params.len()],
            second: vec![0.0; params.len()],
            params,
            losses: Vec::new(),
            validations: Vec::new(),
        };
        Ok(Self {
            weights,
            lora,
            config,
            rows,
            validation: &[],
            layout,
            state,
            #[cfg(feature = "cuda")]
            on_gpu: None,
        })
    }

    /// Computes on `device`; `base` is the model whose weights are trained on. A state may be
    /// resumed on another device than it was saved on.
    ///
    /// # Errors
    /// [`ModelError::NoDevice`] when the device cannot be used, with what is missing;
    /// [`ModelError::Config`] when `base` is another model.
    #[cfg_attr(
        not(feature = "cuda"),
        allow(unused_mut, unused_variables, clippy::needless_pass_by_value)
    )]
    pub fn compute_on(mut self, base: &BaseModel, device: Device) -> Result<Self, ModelError> {
        if !std::ptr::eq(&raw const base.weights, self.weights) {
            let reason = "is not the model whose weights are trained on".to_owned();
            return Err(ModelError::Config {
                name: "base",
                reason,
            });
        }
        #[cfg(feature = "cuda")]
        if let Some(gpu) = device.open()? {
            self.on_gpu = Some(base.on_gpu(&gpu)?);
            return Ok(self);
        }
        device.gpu_name()?;
        Ok(self)
    }

    /// Computes on a GPU that is open.
    #[cfg(all(test, feature = "cuda"))]
    pub(crate) fn moved_to(self, gpu: &crate::gpu::Gpu) -> Result<Self, ModelError> {
        let model = crate::gpu::GpuModel::new(gpu, self.weights)?;
        Ok(Self {
            on_gpu: Some(std::sync::Arc::new(model)),
            ..self
        })
    }

    /// Computes the loss on these rows after every epoch. Call it before [`Trainer::resume`].
    ///
    /// # Errors
    /// [`ModelError::Row`] for a row that does not fit the model.
    pub fn validate_on(mut self, rows: &'a [TrainRow]) -> Result<Self, ModelError> {
        self.check_rows(rows)?;
        self.validation = rows;
        // They decide when a training that has `patience` ends.
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.state.digest.as_bytes());
        hash_rows(&mut hasher, rows);
        self.state.digest = hasher.finalize().to_hex().to_string();
        Ok(self)
    }

    /// Continues where `state` stopped.
    ///
    /// # Errors
    /// [`ModelError::Config`] when another training wrote it: other rows, settings or weights.
    pub fn resume(mut self, state: TrainerState) -> Result<Self, ModelError> {
        let sizes = state.params.len() == self.layout.len;
        if state.digest != self.state.digest || !sizes || state.step > self.steps() {
            let reason = "was saved by a training with other rows, settings or base weights; \
                          delete it to train from the start";
            return Err(ModelError::Config {
                name: "state",
                reason: reason.to_owned(),
            });
        }
        self.state = state;
        Ok(self)
    }

    /// Steps of the whole training.
    pub fn steps(&self) -> usize {
        self.steps_per_epoch() * self.config.epochs
    }

    /// Steps of one epoch; the last one may have fewer rows.
    pub fn steps_per_epoch(&self) -> usize {
        self.rows.len().div_ceil(self.config.batch_size)
    }

    /// Steps that are done.
    pub fn finished_steps(&self) -> usize {
        self.state.step
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`] when a hook asked to stop; [`ModelError::Training`] when the
    /// loss or a gradient is no longer a number; an error of a hook; [`ModelError::Io`] when the
    /// state cannot be saved.
    pub fn run(&mut self, mut hooks: Hooks<'_>) -> Result<TrainOutcome, ModelError> {
        if self.config.patience.is_some() && self.validation.is_empty() {
            let reason = "needs rows to validate on".to_owned();
            return Err(ModelError::Config {
                name: "patience",
                reason,
            });
        }
        let frozen = Frozen::new(self.weights)?;
        let rows = self.rows.iter().chain(self.validation);
        let mut work = self.workspace(&frozen, rows, self.layout.len)?;
        let per_epoch = self.steps_per_epoch();
        while self.state.step < self.steps() && !self.out_of_patience() {
            let epoch = self.state.step / per_epoch;
            let order = shuffled(self.rows.len(), self.config.seed, epoch);
            let batches = order.chunks(self.config.batch_size);
            for batch in batches.skip(self.state.step % per_epoch) {
                self.check_cancelled(&hooks)?;
                let rows: Vec<&TrainRow> = batch.iter().map(|index| &self.rows[*index]).collect();
                let stats = self.step(&mut work, &rows)?;
                if let Some(call) = &mut hooks.step {
                    call(&stats);
                }
                if let Some((every, call)) = &mut hooks.checkpoint
                    && self.state.step.checked_rem(*every) == Some(0)
                {
                    let adapter = self.layout.adapter(&self.state.params, &self.lora)?;
                    call(&stats, &adapter)?;
                }
                let within = !self.state.step.is_multiple_of(per_epoch);
                if let Some((path, every)) = hooks.state.as_ref().filter(|_| within)
                    && self.state.step.checked_rem(*every) == Some(0)
                {
                    self.state.save(path)?;
                }
            }
            self.end_epoch(&mut work, epoch, &mut hooks)?;
        }
        Ok(TrainOutcome {
            adapter: self.layout.adapter(&self.state.params, &self.lora)?,
            losses: self.state.losses.clone(),
            validations: self.state.validations.clone(),
            stopped_early: self.state.step < self.steps(),
        })
    }

    /// Whether the last epochs brought nothing better.
    fn out_of_patience(&self) -> bool {
        let (Some(patience), losses) = (self.config.patience, &self.state.validations) else {
            return false;
        };
        let best = (0..losses.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b]));
        let best = best.filter(|_| self.state.step.is_multiple_of(self.steps_per_epoch()));
        best.is_some_and(|best| losses.len() - 1 - best >= patience)
    }

    fn check_rows(&self, rows: &[TrainRow]) -> Result<(), ModelError> {
        row::check(rows, &self.weights.config)?;
        match &self.lora.invocation_tokens {
            Some(invocation) => activated::check(rows, invocation),
            None => Ok(()),
        }
    }

    /// Mean loss and token accuracy of the adapter so far.
    ///
    /// # Errors
    /// [`ModelError::Row`] for a row that does not fit the model; [`ModelError::Tensor`]
    /// when the weights are not in main memory.
    pub fn evaluate(&self, rows: &[TrainRow]) -> Result<EvalStats, ModelError> {
        self.check_rows(rows)?;
        let frozen = Frozen::new(self.weights)?;
        let mut work = self.workspace(&frozen, rows.iter(), 0)?;
        in_pool(|| self.measure(&mut work, rows))
    }

    fn check_cancelled(&self, hooks: &Hooks<'_>) -> Result<(), ModelError> {
        if !hooks.cancelled.as_ref().is_some_and(|ask| ask()) {
            return Ok(());
        }
        if let Some((path, _)) = &hooks.state {
            self.state.save(path)?;
        }
        Err(ModelError::Cancelled)
    }

    fn end_epoch(
        &mut self,
        work: &mut Workspace<'_>,
        epoch: usize,
        hooks: &mut Hooks<'_>,
    ) -> Result<(), ModelError> {
        let validate = !self.validation.is_empty();
        let validation = validate.then(|| in_pool(|| self.measure(work, self.validation)));
        let validation = validation.transpose()?;
        // A state saved right after this epoch's last step meets its end twice.
        if let Some(stats) = validation.filter(|_| self.state.validations.len() <= epoch) {
            self.state.validations.push(stats.loss as f32);
        }
        if let Some(call) = &mut hooks.epoch {
            let losses = &self.state.losses[epoch * self.steps_per_epoch()..];
            let sum: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
            let stats = EpochStats {
                epoch: epoch + 1,
                step: self.state.step,
                loss: sum / losses.len() as f64,
                validation,
            };
            call(
                &stats,
                &self.layout.adapter(&self.state.params, &self.lora)?,
            )?;
        }
        match &hooks.state {
            Some((path, _)) => self.state.save(path),
            None => Ok(()),
        }
    }

    /// One update from one batch.
    fn step(
        &mut self,
        work: &mut Workspace<'_>,
        rows: &[&TrainRow],
    ) -> Result<StepStats, ModelError> {
        let step = self.state.step + 1;
        let (sum, tokens) = in_pool(|| self.gradients(work, rows))?;
        let loss = sum.loss / sum.tokens as f64;
        let _counted = profile::scope(Operation::Optimizer);
        let norm = vector::sum_of_squares(&work.grads).sqrt();
        if !loss.is_finite() || !norm.is_finite() {
            let reason =
                format!("the loss is {loss} and the gradient norm {norm}; lower the learning rate");
            return Err(ModelError::Training { step, reason });
        }
        let steps = self.steps();
        let rate = learning_rate(&self.config, step - 1, steps);
        let clip = self.config.clip;
        let shrink = if clip > 0.0 && norm > clip {
            clip / norm
        } else {
            1.0
        };
        let state = &mut self.state;
        AdamW::new(&self.config, step, rate, shrink).update(
            &mut state.params,
            &mut state.first,
            &mut state.second,
            &work.grads,
        );
        state.losses.push(loss as f32);
        state.step = step;
        Ok(StepStats {
            step,
            steps,
            epoch: (step - 1) / self.steps_per_epoch() + 1,
            loss,
            learning_rate: rate,
            gradient_norm: norm,
            tokens,
            targets: sum.tokens,
        })
    }
}
