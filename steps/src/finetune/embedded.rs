//! Training in this process. Goes on where a killed attempt stopped: the trainer's state and the
//! checkpoints so far lie in the step's resume folder.

use std::path::{Path, PathBuf};

use flowrun_engine::step::{StepContext, StepError, StepOutcome};
use flowrun_lm::messages::ChatRow;
use flowrun_model::train::{
    EpochStats, Hooks, Schedule, StepStats, TrainConfig, TrainRow, Trainer, TrainerState,
};
use flowrun_model::{
    BaseModel, ChatMessage, Device, LayerNames, LoraAdapter, LoraConfig, ModelError,
    TemplateArguments,
};

use super::{LayerNamesSpec, Params, ScheduleSpec, VALIDATION};
use crate::checkpoint::Checkpoint;
use crate::folder;
use crate::models::local::{device, failed, open_whole_base};
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
    let chats: Vec<ChatRow> = read_jsonl(&ctx.input("messages")?.path)?;
    super::check(&chats)?;
    let training = Training {
        params,
        spec,
        chats,
        validation: validation(ctx, params)?,
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
    for reached in &trained.checkpoints {
        let name = &reached.name;
        folder::copy(&reached.folder, &ctx.output_item("checkpoints", name)?)?;
        labels.push(name.clone());
    }
    write_json(&ctx.output("loss"), &trained.losses)?;
    let last = trained.losses.last().map_or(f64::NAN, |point| point.loss);
    let outcome = StepOutcome::default()
        .list("checkpoints", labels)
        .metric("rows", trained.rows)
        .metric("steps", trained.losses.len())
        .metric("loss", last)
        .metric("tokens", trained.tokens);
    let validations = trained.validations.iter().copied().enumerate();
    let best = validations.min_by(|(_, a), (_, b)| a.total_cmp(b));
    Ok(match best {
        None => outcome,
        Some((epoch, loss)) => outcome
            .metric("validation_loss", f64::from(loss))
            .metric("best_epoch", epoch + 1)
            .metric("stopped_early", trained.stopped_early),
    })
}

/// The chats to validate on; none where none are given.
fn validation(ctx: &StepContext, params: &Params) -> Result<Vec<ChatRow>, StepError> {
    let Some(input) = ctx.input_opt(VALIDATION) else {
        let help = "connect `validation`, such as the `messages` of a `convert-to-messages` of \
                    rows that are not trained on";
        return match params.patience {
            None => Ok(Vec::new()),
            Some(_) => Err(StepError::invalid("`patience` needs chats to validate on").help(help)),
        };
    };
    let chats: Vec<ChatRow> = read_jsonl(&input.path)?;
    match chats.is_empty() {
        true => Err(StepError::invalid("`validation` has no chats")),
        false => super::check(&chats).map(|()| chats),
    }
}

/// A training, whoever asked for it.
pub(super) struct Training<'a> {
    pub(super) params: &'a Params,
    pub(super) spec: &'a EmbeddedSpec,
    pub(super) chats: Vec<ChatRow>,
    /// Chats whose loss is told after every epoch; may be none.
    pub(super) validation: Vec<ChatRow>,
    /// Where its state and its checkpoints lie until it is done, and longer.
    pub(super) resume: &'a Path,
    /// Hears of every step.
    pub(super) on_step: &'a dyn Fn(&StepStats),
    pub(super) log: &'a dyn Fn(&str),
    pub(super) warn: &'a dyn Fn(&str),
}

/// What came of a training.
pub(super) struct Trained {
    /// By step; never empty.
    pub(super) checkpoints: Vec<Reached>,
    /// One a step.
    pub(super) losses: Vec<LossPoint>,
    /// One an epoch, where there are chats to validate on.
    pub(super) validations: Vec<f32>,
    /// Whether the validation loss ended it.
    pub(super) stopped_early: bool,
    pub(super) rows: usize,
    /// Counted from the rows, so that a resumed training counts all of it.
    pub(super) tokens: usize,
}

/// A checkpoint on the way.
pub(super) struct Reached {
    /// `epochs-E-total-trained-steps-S`.
    pub(super) name: String,
    pub(super) folder: PathBuf,
    /// Steps trained.
    pub(super) step: usize,
}

/// When a training leaves checkpoints.
#[derive(Clone, Copy)]
struct Saving {
    per_epoch: usize,
    /// Steps from one to the next; `None` at the end of every epoch.
    save_steps: Option<usize>,
}

impl Saving {
    fn every(self) -> usize {
        self.save_steps.unwrap_or(self.per_epoch).max(1)
    }

    /// The steps up to `done` that leave one, besides the last of a training.
    fn due(self, done: usize) -> impl Iterator<Item = usize> {
        (self.every()..=done).step_by(self.every())
    }

    /// The one after a step, within `folder`.
    fn reached(self, folder: &Path, step: usize) -> Reached {
        let name = Checkpoint::name_of(self.epoch(step), step);
        Reached {
            folder: folder.join(&name),
            name,
            step,
        }
    }

    /// The epoch that a step belongs to, counted from 1.
    fn epoch(self, step: usize) -> usize {
        step.saturating_sub(1) / self.per_epoch + 1
    }
}

impl Training<'_> {
    pub(super) fn run(&self, host: &Host<'_>) -> Result<Trained, StepError> {
        let base = open_whole_base(self.spec, host)?;
        let settings = settings(self.params, &base)?;
        let invocation = settings.0.invocation_tokens.as_deref();
        let all_tokens = |chats: &[ChatRow]| -> Result<Rows, StepError> {
            let told = &self.spec.chat_template_kwargs;
            tokens(&base, chats, told, invocation)
        };
        let (rows, unseen) = (all_tokens(&self.chats)?, all_tokens(&self.validation)?);
        let learnt: usize = rows.all.iter().map(|row| 1 + row.earlier.len()).sum();
        let answers: usize = self.chats.iter().map(|chat| chat.answers().count()).sum();
        if learnt < answers {
            (self.warn)(&format!(
                "{} of {answers} answers are not learnt: earlier ones of their chats, with a prompt \
                 that the chat template refuses or that lacks the invocation, or a row that is \
                 longer than the model's context",
                answers - learnt
            ));
        }
        let device = device(host.world)?;
        match (device.gpu_name().map_err(failed)?, device) {
            (Some(gpu), _) => (self.log)(&format!("training on {gpu}")),
            (None, Device::Auto) => (self.log)("training on the processor: no GPU can be used"),
            (None, _) => {}
        }
        let state = self.resume.join("state.safetensors");
        let mut trainer = self.trainer(&base, (&rows, &unseen), &settings, device, &state)?;
        let saving = self.saving(&trainer);
        let per_epoch = saving.per_epoch;
        let of = Of {
            base: &base,
            name: self.spec.weights.name(),
            layer_names: match self.params.lora.layer_names {
                None => base.layer_names,
                Some(LayerNamesSpec::Text) => LayerNames::Text,
                Some(LayerNamesSpec::BesidePictures) => LayerNames::BesidePictures,
            },
            told: &self.spec.chat_template_kwargs,
        };
        let keep = |step: usize, adapter: &LoraAdapter| {
            let folder = saving.reached(self.resume, step).folder;
            save(&folder, (saving.epoch(step), step), adapter, &of)
        };
        let on_epoch = |stats: &EpochStats, adapter: &LoraAdapter| {
            if let Some(seen) = stats.validation {
                (self.log)(&format!(
                    "epoch {}: validation loss {:.4}, {:.1} % of its tokens right",
                    stats.epoch,
                    seen.loss,
                    100.0 * seen.token_accuracy
                ));
            }
            match self.params.save_steps {
                None => keep(stats.step, adapter),
                Some(_) => Ok(()),
            }
        };
        let on_steps = |stats: &StepStats, adapter: &LoraAdapter| keep(stats.step, adapter);
        let hooks = Hooks::default()
            .on_step(self.on_step)
            .on_steps(self.params.save_steps.unwrap_or(0), on_steps)
            .on_epoch(on_epoch)
            .cancelled_by(|| host.cancel.is_cancelled())
            .save_state(&state, SAVE_EVERY);
        let outcome = trainer.run(hooks).map_err(failed)?;
        let last = outcome.losses.len();
        let mut checkpoints: Vec<usize> = saving.due(last).collect();
        if checkpoints.last() != Some(&last) {
            keep(last, &outcome.adapter).map_err(failed)?;
            checkpoints.push(last);
        }
        let checkpoints = checkpoints.into_iter();
        let validations = &outcome.validations;
        let point = |(at, loss): (usize, &f32)| LossPoint {
            step: at as u64 + 1,
            epoch: u32::try_from(at / per_epoch).unwrap_or(u32::MAX),
            loss: f64::from(*loss),
            validation: match (at + 1) % per_epoch {
                0 => validations.get(at / per_epoch).copied().map(f64::from),
                _ => None,
            },
        };
        let tokens = rows.all.iter().map(|r| r.prompt.len() + r.target.len());
        let tokens: usize = tokens.sum();
        Ok(Trained {
            checkpoints: checkpoints
                .map(|step| saving.reached(self.resume, step))
                .collect(),
            losses: outcome.losses.iter().enumerate().map(point).collect(),
            validations: validations.clone(),
            stopped_early: outcome.stopped_early,
            rows: rows.all.len(),
            tokens: tokens * saving.epoch(last),
        })
    }

    fn saving(&self, trainer: &Trainer<'_>) -> Saving {
        Saving {
            per_epoch: trainer.steps_per_epoch(),
            save_steps: self.params.save_steps,
        }
    }

    /// A trainer at the beginning, or where an earlier attempt stopped.
    fn trainer<'b>(
        &self,
        base: &'b BaseModel,
        (rows, unseen): (&'b Rows, &'b Rows),
        (lora, config): &(LoraConfig, TrainConfig),
        device: Device,
        state: &Path,
    ) -> Result<Trainer<'b>, StepError> {
        let fresh = || -> Result<Trainer<'b>, ModelError> {
            let (lora, config) = (lora.clone(), config.clone());
            let trainer = Trainer::new(&base.weights, lora, config, &rows.all);
            let trainer = trainer.map_err(|error| rows.at_line(error))?;
            let trainer = trainer.compute_on(base, device)?;
            match unseen.all.as_slice() {
                [] => Ok(trainer),
                all => trainer
                    .validate_on(all)
                    .map_err(|error| unseen.at_line(error)),
            }
        };
        if !state.exists() {
            return fresh().map_err(failed);
        }
        match TrainerState::load(state).and_then(|saved| fresh()?.resume(saved)) {
            Ok(resumed) if has_checkpoints(self.resume, self.saving(&resumed), &resumed) => {
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

/// Whether every checkpoint up to the last finished step is there.
fn has_checkpoints(folder: &Path, saving: Saving, trainer: &Trainer<'_>) -> bool {
    let mut due = saving.due(trainer.finished_steps());
    due.all(|step| Checkpoint::load(&saving.reached(folder, step).folder).is_ok())
}

/// Chats as rows: one for each, in their order, then what these leave to rows of their own.
struct Rows {
    all: Vec<TrainRow>,
    /// The chat that each is of, counted from 0.
    chats: Vec<usize>,
}

impl Rows {
    /// An error that names the line of the chat, where it names a row.
    fn at_line(&self, error: ModelError) -> ModelError {
        match error {
            ModelError::Row { index, reason } => ModelError::Row {
                index: self.chats.get(index).copied().unwrap_or(index),
                reason,
            },
            other => other,
        }
    }
}

/// The rows of chats; an error names the line of the chat.
fn tokens(
    base: &BaseModel,
    chats: &[ChatRow],
    told: &TemplateArguments,
    invocation: Option<&[u32]>,
) -> Result<Rows, StepError> {
    let mut rows = Rows {
        all: Vec::with_capacity(chats.len()),
        chats: (0..chats.len()).collect(),
    };
    let mut apart = Vec::new();
    for (at, chat) in chats.iter().enumerate() {
        let mut all = chat_tokens(base, chat, told, invocation).map_err(|error| {
            let line = format!("line {}: {}", at + 1, error.message);
            StepError {
                message: line,
                ..error
            }
        })?;
        rows.all.extend(all.pop());
        rows.chats.extend(all.iter().map(|_| at));
        apart.append(&mut all);
    }
    rows.all.append(&mut apart);
    Ok(rows)
}

/// A chat as rows; the last is that of its last answer.
///
/// Every answer is learnt once, after the prompt that it is asked for with. An earlier one is part
/// of the last one's row where the chat template writes it there in the same way. It is a row by
/// itself where the template does not (it leaves out earlier thoughts), and with an activated adapter,
/// which takes effect with the last answer (`invocation`). One whose prompt the template refuses or
/// lacks the invocation, or whose row is longer than the model's context, is left out: it may not
/// stand in the way of the last one.
fn chat_tokens(
    base: &BaseModel,
    chat: &ChatRow,
    told: &TemplateArguments,
    invocation: Option<&[u32]>,
) -> Result<Vec<TrainRow>, StepError> {
    let messages: Vec<ChatMessage> = chat
        .messages
        .iter()
        .map(|m| ChatMessage::new(m.role.as_str(), m.content.clone()))
        .collect();
    let row_of = |at: usize| -> Result<TrainRow, ModelError> {
        Ok(TrainRow {
            prompt: base.prompt_tokens_with(&messages[..at], told)?,
            target: base.answer_tokens(&messages[at].content)?,
            earlier: Vec::new(),
        })
    };
    let mut answers: Vec<usize> = chat.answers().collect();
    let Some(last) = answers.pop() else {
        return Err(StepError::invalid("a chat has no message of the assistant"));
    };
    let mut last = row_of(last).map_err(failed)?;
    // What goes through the model is all but the last token.
    let longest = base.weights.config.context.saturating_add(1);
    let lacks = |prompt: &[u32], invocation: &[u32]| {
        let mut places = prompt.windows(invocation.len().max(1));
        !places.any(|part| part == invocation)
    };
    let mut apart = Vec::new();
    for at in answers {
        let row = match row_of(at) {
            Ok(row) => row,
            Err(ModelError::Template(_)) => continue,
            Err(error) => return Err(failed(error)),
        };
        let whole = [row.prompt.as_slice(), row.target.as_slice()].concat();
        let is_lacking = invocation.is_some_and(|tokens| lacks(&row.prompt, tokens));
        if row.prompt.is_empty() || is_lacking || whole.len() > longest {
            continue;
        }
        match last.prompt.starts_with(&whole) && invocation.is_none() {
            true => last.earlier.push(row.prompt.len()..whole.len()),
            false => apart.push(row),
        }
    }
    apart.push(last);
    Ok(apart)
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
    Ok((lora, config(params)))
}

fn config(params: &Params) -> TrainConfig {
    let usual = TrainConfig::default();
    TrainConfig {
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
        clip: params.max_grad_norm,
        max_tokens: params.max_tokens.unwrap_or(usual.max_tokens),
        seed: params.seed,
        patience: params.patience,
        ..usual
    }
}

/// What all checkpoints of a training have in common.
struct Of<'a> {
    base: &'a BaseModel,
    /// The base model's name.
    name: String,
    /// What the files call its layers.
    layer_names: LayerNames,
    /// What the chat template was told.
    told: &'a TemplateArguments,
}

/// Writes a checkpoint; a reader sees all of it or nothing.
fn save(
    folder: &Path,
    (epoch, step): (usize, usize),
    adapter: &LoraAdapter,
    of: &Of<'_>,
) -> Result<(), ModelError> {
    let part = folder.with_extension("part");
    // What a killed attempt left.
    let _ = std::fs::remove_dir_all(&part);
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(&part).map_err(ModelError::io(&part))?;
    adapter.save_as(&part, &of.name, of.layer_names)?;
    let checkpoint = Checkpoint::of_adapter(&part, epoch, step, &of.base.id);
    let mut checkpoint = checkpoint.map_err(|e| ModelError::format(&part, e.message))?;
    checkpoint.chat_template_kwargs = Some(of.told.clone());
    checkpoint
        .save(&part)
        .map_err(|e| ModelError::format(&part, e.message))?;
    std::fs::rename(&part, folder).map_err(ModelError::io(folder))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_lm::lm::{Message, Role};
    use serde_json::json;

    use super::*;

    #[test]
    fn the_params_reach_the_training() {
        let model = json!({"provider": "embedded", "weights": {"file": "tiny"}});
        let read = |more: serde_json::Value| {
            let mut params = json!({ "model": model });
            let more = more.as_object().unwrap().clone();
            params.as_object_mut().unwrap().extend(more);
            let params: Params = serde_json::from_value(params).unwrap();
            config(&params)
        };
        let usual = read(json!({}));
        assert_eq!((usual.clip, usual.max_tokens), (1.0, 2048));
        let told = read(json!({"max_grad_norm": 0.25, "max_tokens": 300, "weight_decay": 0.01}));
        assert_eq!((told.clip, told.max_tokens), (0.25, 300));
        assert_eq!(told.weight_decay, 0.01);
    }

    /// One of the tiny models that other tests compare with `transformers`.
    fn base(name: &str) -> BaseModel {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/parity");
        BaseModel::load(&folder.join(name), name).unwrap()
    }

    fn chat(messages: &[&str]) -> ChatRow {
        let roles = [Role::User, Role::Assistant].into_iter().cycle();
        let messages = messages.iter().zip(roles).map(|(text, role)| Message {
            role,
            content: (*text).to_owned(),
        });
        ChatRow {
            messages: messages.collect(),
        }
    }

    /// The rows with the tokens that each learns; an activated adapter is invoked by `invocation`.
    fn learnt(
        base: &BaseModel,
        messages: &[&str],
        invocation: Option<&[u32]>,
    ) -> Vec<Vec<Vec<u32>>> {
        let told = TemplateArguments::new();
        let rows = chat_tokens(base, &chat(messages), &told, invocation).unwrap();
        let learnt = rows.iter().map(|row| {
            let earlier = row.earlier.iter();
            let earlier = earlier.map(|answer| row.prompt[answer.clone()].to_vec());
            earlier.chain([row.target.clone()]).collect()
        });
        learnt.collect()
    }

    #[test]
    fn every_answer_of_a_chat_is_learnt_once() {
        let base = base("tiny/rope");
        let answer = |text: &str| base.answer_tokens(text).unwrap();
        let (yes, no) = (answer("yes"), answer("no"));
        let single = learnt(&base, &["a", "yes"], None);
        assert_eq!(single, [vec![yes.clone()]]);
        let chat = ["a", "yes", "my card", "no"];
        let one = learnt(&base, &chat, None);
        assert_eq!(one, [vec![yes.clone(), no.clone()]]);
        // An activated adapter takes effect with the last answer of a row.
        let invocation = |text: &str| base.tokenizer.encode(text, true).unwrap();
        let apart = learnt(&base, &chat, Some(invocation("a").as_slice()));
        assert_eq!(apart, [vec![yes.clone()], vec![no.clone()]]);
        // Only the last one's prompt invokes it.
        let invoked = learnt(
            &base,
            &["a", "yes", "1", "no"],
            Some(invocation("1").as_slice()),
        );
        assert_eq!(invoked, [vec![no.clone()]]);
        // This template leaves out what an earlier answer thought.
        let qwen = self::base("families/qwen3");
        let thought = "<think>\nhm\n</think>\n\nyes";
        let apart = learnt(&qwen, &["a", thought, "my card", "no"], None);
        let answer = |text: &str| qwen.answer_tokens(text).unwrap();
        assert_eq!(apart, [vec![answer(thought)], vec![answer("no")]]);
        assert_eq!(learnt(&qwen, &chat, None)[0].len(), 2);
    }

    #[test]
    fn an_earlier_answer_that_cannot_be_learnt_is_left_out() {
        let base = base("tiny/rope");
        let mut greeted = chat(&["a", "yes"]);
        let greeting = Message {
            role: Role::Assistant,
            content: "Hi".to_owned(),
        };
        greeted.messages.insert(0, greeting);
        let rows = chat_tokens(&base, &greeted, &TemplateArguments::new(), None).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].target, base.answer_tokens("yes").unwrap());
        assert!(rows[0].earlier.is_empty());
        let qwen = self::base("families/qwen3");
        let thoughts = "hm ".repeat(qwen.weights.config.context);
        let thought = format!("<think>\n{thoughts}\n</think>\n\nyes");
        let left = learnt(&qwen, &["a", thought.as_str(), "my card", "no"], None);
        assert_eq!(left, [vec![qwen.answer_tokens("no").unwrap()]]);
    }

    #[test]
    fn rows_of_their_own_come_after_those_of_the_chats() {
        let base = base("tiny/rope");
        let chats = [chat(&["a", "yes", "b", "no"]), chat(&["c", "yes"])];
        let told = TemplateArguments::new();
        let a = base.tokenizer.encode("a", true).unwrap();
        let rows = tokens(&base, &chats, &told, Some(a.as_slice())).unwrap();
        let targets = rows.all.iter().map(|row| row.target.as_slice());
        let targets: Vec<&[u32]> = targets.collect();
        let (yes, no) = (base.answer_tokens("yes"), base.answer_tokens("no"));
        let (yes, no) = (yes.unwrap(), no.unwrap());
        assert_eq!(targets, [no.as_slice(), &yes, &yes]);
        let reason = "too long".to_owned();
        let error = rows.at_line(ModelError::Row { index: 2, reason });
        assert_eq!(error.to_string(), "training row 1: too long");
        let none = chat(&["a"]);
        let error = tokens(&base, &[none], &told, None).err().unwrap();
        assert!(error.message.starts_with("line 1: "), "{}", error.message);
    }
}
