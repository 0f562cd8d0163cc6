//! Training in this process. Goes on where a killed attempt stopped: the trainer's state and the
//! checkpoints so far lie in the step's resume folder.

use std::path::{Path, PathBuf};

use flowrun_engine::step::{StepContext, StepError, StepOutcome};
use flowrun_lm::messages::ChatRow;
use flowrun_model::train::{
    EpochStats, Hooks, Schedule, StepStats, TrainConfig, TrainRow, Trainer, TrainerState,
};
use flowrun_model::{BaseModel, ChatMessage, LoraAdapter, LoraConfig, ModelError};

use super::{Params, ScheduleSpec};
use crate::checkpoint::Checkpoint;
use crate::folder;
use crate::models::local::{failed, open_base};
use crate::models::{EmbeddedSpec, Host};
use crate::report::LossPoint;
use crate::rows::{read_jsonl, write_json};

/// Steps between two saved states: a few seconds' work, at a cost of some 60 MB written.
const SAVE_EVERY: usize = 20;

pub(super) fn train(
    ctx: &StepContext,
    params: &Params,
    spec: &EmbeddedSpec,
) -> Result<StepOutcome, StepError> {
    let training = Training {
        params,
        spec,
        chats: read_jsonl(&ctx.input("messages")?.path)?,
        resume: ctx.resume_dir()?,
        on_step: &|stats| {
            let text = format!("epoch {}, loss {:.4}", stats.epoch, stats.loss);
            let (done, all) = (stats.step as u64, stats.steps as u64);
            ctx.reporter.progress(done, all, "steps", &text);
        },
        log: &|text| ctx.reporter.log(text),
        warn: &|text| ctx.reporter.warning(text),
    };
    let trained = training.run(&Host::from(ctx))?;
    Checkpoint::base().save(&ctx.output("base"))?;
    let mut labels = Vec::new();
    for (name, folder) in &trained.checkpoints {
        folder::copy(folder, &ctx.output_item("checkpoints", name)?)?;
        labels.push(name.clone());
    }
    write_json(&ctx.output("loss"), &trained.losses)?;
    let last = trained.losses.last().map_or(f64::NAN, |point| point.loss);
    Ok(StepOutcome::default()
        .list("checkpoints", labels)
        .metric("rows", trained.rows)
        .metric("steps", trained.losses.len())
        .metric("loss", last)
        .metric("tokens", trained.tokens))
}

/// A training, whoever asked for it.
pub(super) struct Training<'a> {
    pub(super) params: &'a Params,
    pub(super) spec: &'a EmbeddedSpec,
    pub(super) chats: Vec<ChatRow>,
    /// Where its state and its checkpoints lie until it is done, and longer.
    pub(super) resume: &'a Path,
    /// Hears of every step.
    pub(super) on_step: &'a dyn Fn(&StepStats),
    pub(super) log: &'a dyn Fn(&str),
    pub(super) warn: &'a dyn Fn(&str),
}

/// What came of a training.
pub(super) struct Trained {
    /// Name and folder, by epoch.
    pub(super) checkpoints: Vec<(String, PathBuf)>,
    /// One a step.
    pub(super) losses: Vec<LossPoint>,
    pub(super) rows: usize,
    /// Counted from the rows, so that a resumed training counts all of it.
    pub(super) tokens: usize,
}

impl Training<'_> {
    pub(super) fn run(&self, host: &Host<'_>) -> Result<Trained, StepError> {
        let base = open_base(self.spec, host)?;
        let rows = self.chats.iter().map(|chat| tokens(&base, chat));
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        let (lora, config) = settings(self.params, &base)?;
        let state = self.resume.join("state.safetensors");
        let mut trainer = self.trainer(&base, &rows, &lora, &config, &state)?;
        let per_epoch = trainer.steps_per_epoch();
        let name = self.spec.weights.name();
        let on_epoch = |stats: &EpochStats, adapter: &LoraAdapter| {
            let folder = self
                .resume
                .join(Checkpoint::name_of(stats.epoch, stats.step));
            save(&folder, stats, adapter, &base, &name)
        };
        let hooks = Hooks::default()
            .on_step(self.on_step)
            .on_epoch(on_epoch)
            .cancelled_by(|| host.cancel.is_cancelled())
            .save_state(&state, SAVE_EVERY);
        let outcome = trainer.run(hooks).map_err(failed)?;
        let point = |(at, loss): (usize, &f32)| LossPoint {
            step: at as u64 + 1,
            epoch: u32::try_from(at / per_epoch).unwrap_or(u32::MAX),
            loss: f64::from(*loss),
        };
        let checkpoint = |epoch: usize| {
            let name = Checkpoint::name_of(epoch, epoch * per_epoch);
            let folder = self.resume.join(&name);
            (name, folder)
        };
        let tokens: usize = rows.iter().map(|r| r.prompt.len() + r.target.len()).sum();
        Ok(Trained {
            checkpoints: (1..=self.params.epochs).map(checkpoint).collect(),
            losses: outcome.losses.iter().enumerate().map(point).collect(),
            rows: rows.len(),
            tokens: tokens * self.params.epochs,
        })
    }

    /// A trainer at the beginning, or where an earlier attempt stopped.
    fn trainer<'b>(
        &self,
        base: &'b BaseModel,
        rows: &'b [TrainRow],
        lora: &LoraConfig,
        config: &TrainConfig,
        state: &Path,
    ) -> Result<Trainer<'b>, StepError> {
        let fresh = || Trainer::new(&base.weights, lora.clone(), config.clone(), rows);
        if !state.exists() {
            return fresh().map_err(failed);
        }
        match TrainerState::load(state).and_then(|saved| fresh()?.resume(saved)) {
            Ok(resumed) if has_epochs(self.resume, &resumed) => {
                let (done, all) = (resumed.finished_steps(), resumed.steps());
                (self.log)(&format!("going on after step {done} of {all}"));
                return Ok(resumed);
            }
            Ok(_) => (self.warn)("training starts from the beginning: a checkpoint is missing"),
            // Damaged, or left by another version of the program.
            Err(error) => (self.warn)(&format!("training starts from the beginning: {error}")),
        }
        fresh().map_err(failed)
    }
}

/// Whether the checkpoint of every finished epoch is there.
fn has_epochs(folder: &Path, trainer: &Trainer<'_>) -> bool {
    let per_epoch = trainer.steps_per_epoch();
    (1..=trainer.finished_steps() / per_epoch).all(|epoch| {
        Checkpoint::load(&folder.join(Checkpoint::name_of(epoch, epoch * per_epoch))).is_ok()
    })
}

fn tokens(base: &BaseModel, chat: &ChatRow) -> Result<TrainRow, StepError> {
    let Some((answer, prompt)) = chat.messages.split_last() else {
        return Err(StepError::invalid("a chat has no messages"));
    };
    let prompt: Vec<ChatMessage> = prompt
        .iter()
        .map(|m| ChatMessage::new(m.role.as_str(), m.content.clone()))
        .collect();
    Ok(TrainRow {
        prompt: base.prompt_tokens(&prompt).map_err(failed)?,
        target: base.answer_tokens(&answer.content).map_err(failed)?,
    })
}

fn settings(params: &Params, base: &BaseModel) -> Result<(LoraConfig, TrainConfig), StepError> {
    let mut lora = LoraConfig {
        rank: params.lora.rank,
        alpha: params.lora.alpha,
        dropout: params.lora.dropout,
        ..LoraConfig::default()
    };
    if let Some(modules) = &params.lora.target_modules {
        lora.target_modules.clone_from(modules);
    }
    if let Some(text) = &params.lora.invocation {
        let tokens = base.tokenizer.encode(text, true).map_err(failed)?;
        lora.invocation_tokens = Some(tokens);
    }
    let config = TrainConfig {
        epochs: params.epochs,
        batch_size: params.batch_size,
        learning_rate: params.learning_rate,
        warmup: params.warmup,
        schedule: match params.schedule {
            ScheduleSpec::Linear => Schedule::Linear,
            ScheduleSpec::Cosine => Schedule::Cosine,
            ScheduleSpec::Constant => Schedule::Constant,
        },
        weight_decay: params.weight_decay,
        seed: params.seed,
        ..TrainConfig::default()
    };
    Ok((lora, config))
}

/// Writes a checkpoint; a reader sees all of it or nothing.
fn save(
    folder: &Path,
    stats: &EpochStats,
    adapter: &LoraAdapter,
    base: &BaseModel,
    name: &str,
) -> Result<(), ModelError> {
    let part = folder.with_extension("part");
    // What a killed attempt left.
    let _ = std::fs::remove_dir_all(&part);
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(&part).map_err(ModelError::io(&part))?;
    adapter.save(&part, name)?;
    let checkpoint = Checkpoint::of_adapter(&part, stats.epoch, stats.step, &base.id);
    let checkpoint = checkpoint.map_err(|e| ModelError::format(&part, e.message))?;
    checkpoint
        .save(&part)
        .map_err(|e| ModelError::format(&part, e.message))?;
    std::fs::rename(&part, folder).map_err(ModelError::io(folder))
}
