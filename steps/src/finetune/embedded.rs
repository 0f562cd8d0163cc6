//! Training in this process. Goes on where a killed attempt stopped: the trainer's state and the
//! checkpoints so far lie in the step's resume folder.

use std::path::Path;

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
    let base = open_base(spec, &Host::from(ctx))?;
    let chats: Vec<ChatRow> = read_jsonl(&ctx.input("messages")?.path)?;
    let rows = chats
        .iter()
        .map(|chat| tokens(&base, chat))
        .collect::<Result<Vec<_>, _>>()?;
    let (lora, config) = settings(params, &base)?;
    let fresh = || Trainer::new(&base.weights, lora.clone(), config.clone(), &rows);
    let resume = ctx.resume_dir()?.to_path_buf();
    let state = resume.join("state.safetensors");
    let mut trainer = fresh().map_err(failed)?;
    if state.exists() {
        match TrainerState::load(&state).and_then(|saved| fresh()?.resume(saved)) {
            Ok(resumed) if !has_epochs(&resume, &resumed) => ctx
                .reporter
                .warning("training starts from the beginning: a checkpoint is missing"),
            Ok(resumed) => {
                trainer = resumed;
                let (done, all) = (trainer.finished_steps(), trainer.steps());
                ctx.reporter
                    .log(&format!("going on after step {done} of {all}"));
            }
            // Damaged, or left by another version of the program.
            Err(error) => ctx
                .reporter
                .warning(&format!("training starts from the beginning: {error}")),
        }
    }
    let (steps, per_epoch) = (trainer.steps(), trainer.steps_per_epoch());
    let name = spec.weights.name();
    let on_step = |stats: &StepStats| {
        let text = format!("epoch {}, loss {:.4}", stats.epoch, stats.loss);
        ctx.reporter
            .progress(stats.step as u64, steps as u64, "steps", &text);
    };
    let on_epoch = |stats: &EpochStats, adapter: &LoraAdapter| {
        let folder = resume.join(Checkpoint::name_of(stats.epoch, stats.step));
        save(&folder, stats, adapter, &base, &name)
    };
    let hooks = Hooks::default()
        .on_step(on_step)
        .on_epoch(on_epoch)
        .cancelled_by(|| ctx.cancel.is_cancelled())
        .save_state(&state, SAVE_EVERY);
    let outcome = trainer.run(hooks).map_err(failed)?;

    Checkpoint::base().save(&ctx.output("base"))?;
    let mut labels = Vec::new();
    for epoch in 1..=params.epochs {
        let label = Checkpoint::name_of(epoch, epoch * per_epoch);
        let to = ctx.output_item("checkpoints", &label)?;
        folder::copy(&resume.join(&label), &to)?;
        labels.push(label);
    }
    let losses: Vec<LossPoint> = outcome
        .losses
        .iter()
        .enumerate()
        .map(|(i, loss)| LossPoint {
            step: i as u64 + 1,
            epoch: u32::try_from(i / per_epoch).unwrap_or(u32::MAX),
            loss: f64::from(*loss),
        })
        .collect();
    write_json(&ctx.output("loss"), &losses)?;
    // Counted from the rows, so that a resumed training counts all of it.
    let tokens: usize = rows.iter().map(|r| r.prompt.len() + r.target.len()).sum();
    let last = losses.last().map_or(f64::NAN, |point| point.loss);
    Ok(StepOutcome::default()
        .list("checkpoints", labels)
        .metric("rows", rows.len())
        .metric("steps", steps)
        .metric("loss", last)
        .metric("tokens", tokens * params.epochs))
}

/// Whether the checkpoint of every finished epoch is there.
fn has_epochs(folder: &Path, trainer: &Trainer<'_>) -> bool {
    let per_epoch = trainer.steps_per_epoch();
    (1..=trainer.finished_steps() / per_epoch)
        .all(|epoch| Checkpoint::load(&folder.join(Checkpoint::name_of(epoch, epoch * per_epoch))).is_ok())
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
