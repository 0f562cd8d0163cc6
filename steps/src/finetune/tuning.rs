//! Training for a server that others send their chats to: the step's own training, told in
//! OpenAI's terms.

use std::path::{Path, PathBuf};

use flowrun_engine::step::StepError;
use flowrun_lm::messages::ChatRow;
use serde::{Deserialize, Serialize};

use crate::models::{EmbeddedSpec, Host};
use crate::rows::read_jsonl;

/// Epochs where nothing is said.
const EPOCHS: usize = 3;

/// How to train. OpenAI's three, and what only this trainer knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hyperparameters {
    /// Passes over all chats.
    pub n_epochs: usize,
    /// Chats per optimizer step.
    pub batch_size: usize,
    /// A factor on `learning_rate`.
    pub learning_rate_multiplier: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Rank of the adapter.
    pub lora_rank: usize,
    /// The adapter's delta is scaled by `lora_alpha / lora_rank`.
    pub lora_alpha: f64,
    /// Dropout on the adapter's input.
    pub lora_dropout: f64,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        let lora = super::LoraSpec::default();
        Self {
            n_epochs: EPOCHS,
            batch_size: super::batch_size(),
            learning_rate_multiplier: 1.0,
            learning_rate: super::learning_rate(),
            lora_rank: lora.rank,
            lora_alpha: lora.alpha,
            lora_dropout: lora.dropout,
        }
    }
}

/// One step of a training.
#[derive(Debug, Clone, Copy)]
pub struct TuneStep {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub total: usize,
    /// Mean loss in nats per token of the answers.
    pub loss: f64,
}

/// A checkpoint that came of a training.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// `epochs-E-total-trained-steps-S`.
    pub name: String,
    /// Its folder, within that of the training.
    pub folder: PathBuf,
    /// Steps trained.
    pub step: usize,
    /// Loss of that step.
    pub loss: f64,
}

/// What came of a training.
#[derive(Debug, Clone)]
pub struct TuningOutcome {
    /// By epoch; never empty.
    pub checkpoints: Vec<Tuned>,
    /// Tokens that it went over, every epoch counted.
    pub tokens: usize,
}

/// Reads chats to train on.
///
/// # Errors
/// Invalid, with the line, when there is none, or one does not end with the assistant's message.
pub fn read_chats(path: &Path) -> Result<Vec<ChatRow>, StepError> {
    let chats: Vec<ChatRow> = read_jsonl(path)?;
    if chats.is_empty() {
        return Err(StepError::invalid("the file has no chats"));
    }
    super::check(&chats)?;
    Ok(chats)
}

/// Copies a checkpoint so that a server which looks into its folder sees all of it or nothing.
///
/// # Errors
/// When something cannot be read or written.
pub fn publish(from: &Path, to: &Path) -> Result<(), StepError> {
    crate::folder::copy_whole(from, to)
}

/// Trains on chats. What lies in `work` of an attempt that was cut off is gone on with.
///
/// # Errors
/// Invalid when the settings do not fit; cancelled; failed.
#[cfg(feature = "model")]
pub fn tune(
    spec: &EmbeddedSpec,
    chats: Vec<ChatRow>,
    how: &Hyperparameters,
    seed: u64,
    work: &Path,
    on_step: &dyn Fn(TuneStep),
    host: &Host<'_>,
) -> Result<TuningOutcome, StepError> {
    let params = super::Params {
        model: crate::models::ModelSpec::Embedded(spec.clone()),
        backend: super::Backend::Embedded,
        lora: super::LoraSpec {
            rank: how.lora_rank,
            alpha: how.lora_alpha,
            dropout: how.lora_dropout,
            ..super::LoraSpec::default()
        },
        epochs: how.n_epochs,
        batch_size: how.batch_size,
        learning_rate: how.learning_rate * how.learning_rate_multiplier,
        warmup: super::warmup(),
        schedule: super::ScheduleSpec::default(),
        weight_decay: 0.0,
        max_grad_norm: super::max_grad_norm(),
        max_tokens: None,
        seed,
        save_steps: None,
        patience: None,
    };
    let training = super::embedded::Training {
        params: &params,
        spec,
        chats,
        validation: Vec::new(),
        resume: work,
        on_step: &|stats| {
            on_step(TuneStep {
                step: stats.step,
                total: stats.steps,
                loss: stats.loss,
            });
        },
        log: &|text| tracing::info!(text),
        warn: &|text| tracing::warn!(text),
    };
    let trained = training.run(host)?;
    let losses = &trained.losses;
    let tuned = |reached: super::embedded::Reached| {
        let loss = losses.get(reached.step.saturating_sub(1));
        Tuned {
            name: reached.name,
            folder: reached.folder,
            step: reached.step,
            loss: loss.map_or(f64::NAN, |point| point.loss),
        }
    };
    Ok(TuningOutcome {
        checkpoints: trained.checkpoints.into_iter().map(tuned).collect(),
        tokens: trained.tokens,
    })
}

/// Always an error: the embedded model was left out.
///
/// # Errors
/// That it was.
#[cfg(not(feature = "model"))]
pub fn tune(
    _: &EmbeddedSpec,
    _: Vec<ChatRow>,
    _: &Hyperparameters,
    _: u64,
    _: &Path,
    _: &dyn Fn(TuneStep),
    _: &Host<'_>,
) -> Result<TuningOutcome, StepError> {
    Err(crate::models::local::left_out())
}
