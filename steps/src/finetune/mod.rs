//! `finetune`: trains a LoRA adapter on chats, with a checkpoint after every epoch.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the step and its params |
//! | `embedded` | training in this process |
//! | `command` | training by another program: TRL, LLaMA-Factory, axolotl |
//! | `openai` | training by a server that speaks OpenAI's fine-tuning API |
//! | `declared` | what the params say of the checkpoints, before any training |
//! | `tuning` | training in this process for such a server |

mod command;
pub(crate) mod declared;
#[cfg(feature = "model")]
mod embedded;
mod openai;
pub mod tuning;

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_lm::lm::Role;
use flowrun_lm::messages::ChatRow;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::leakage;
use crate::models::{ModelSpec, observe, settle};
use crate::schema_of;

/// The port of the chats to validate on.
const VALIDATION: &str = "validation";
/// The port of the rows that these are of.
const VALIDATION_LINEAGE: &str = "validation_lineage";

/// The step kind.
pub struct Finetune;

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The student.
    #[schemars(with = "String", extend("x-flowrun-ref" = "models"))]
    model: ModelSpec,
    /// What trains; by default this process.
    #[serde(default)]
    backend: Backend,
    /// Shape of the adapter.
    #[serde(default)]
    lora: LoraSpec,
    /// Passes over all rows; each one leaves a checkpoint, unless `save_steps` says otherwise.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    epochs: usize,
    /// Rows per optimizer step.
    #[serde(default = "batch_size")]
    #[schemars(range(min = 1))]
    batch_size: usize,
    /// Peak learning rate.
    #[serde(default = "learning_rate")]
    learning_rate: f64,
    /// Share of all steps over which the learning rate rises to its peak.
    #[serde(default = "warmup")]
    #[schemars(range(min = 0.0, max = 1.0))]
    warmup: f64,
    /// How the learning rate falls afterwards.
    #[serde(default)]
    schedule: ScheduleSpec,
    /// AdamW's decoupled weight decay.
    #[serde(default)]
    weight_decay: f64,
    /// Gradients are scaled down to this global norm before each optimizer step; 0 leaves them. No
    /// matter to OpenAI's fine-tuning API.
    #[serde(default = "max_grad_norm", skip_serializing_if = "is_usual_norm")]
    #[schemars(range(min = 0.0))]
    max_grad_norm: f64,
    /// Tokens that are computed at once, 2048 when left out: it bounds the memory (0.7 MB a token
    /// for a model of 135 M parameters). A batch of more is computed in parts, with the same result
    /// up to rounding. In this process only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    max_tokens: Option<usize>,
    /// Seed of the first adapter, the order of the rows, and dropout.
    #[serde(default)]
    seed: u64,
    /// A checkpoint after every so many optimizer steps and after the last one, instead of after
    /// every epoch. In this process only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    save_steps: Option<usize>,
    /// Ends the training after so many epochs in a row without a better loss on `validation`. In
    /// this process only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    patience: Option<usize>,
}

impl Params {
    /// Refuses what only training in this process can do.
    fn plain_only(&self, ctx: &StepContext, who: &str) -> Result<(), StepError> {
        if self.lora.invocation.is_some() {
            return Err(StepError::invalid(format!(
                "`lora.invocation`: {who} trains no activated adapters"
            ))
            .help("leave it out; servers such as vLLM take plain LoRA only"));
        }
        if self.lora.layer_names.is_some() {
            return Err(StepError::invalid(format!(
                "`lora.layer_names`: {who} names the layers as it loads the model"
            ))
            .help("leave it out"));
        }
        let all = "leave it out: a checkpoint after every epoch, and all epochs";
        let room = "leave it out: `micro_batch` of a command, or the server, bounds the memory";
        let given = [
            ("save_steps", self.save_steps.is_some(), all),
            ("patience", self.patience.is_some(), all),
            (VALIDATION, ctx.input_opt(VALIDATION).is_some(), all),
            ("max_tokens", self.max_tokens.is_some(), room),
        ];
        match given.into_iter().find(|(_, is_given, _)| *is_given) {
            None => Ok(()),
            Some((name, _, help)) => Err(StepError::invalid(format!(
                "`{name}`: only training in this process knows it, and {who} trains"
            ))
            .help(help)),
        }
    }
}

/// Refuses chats that end with a message which no model is to write.
fn check(chats: &[ChatRow]) -> Result<(), StepError> {
    let ends = |chat: &ChatRow| chat.messages.last().map(|last| last.role);
    let other = |chat: &ChatRow| ends(chat) != Some(Role::Assistant);
    match chats.iter().position(other) {
        None => Ok(()),
        Some(at) => Err(StepError::invalid(format!(
            "line {}: a chat to train on ends with a message of the assistant",
            at + 1
        ))),
    }
}

/// What trains the student.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Backend {
    /// This process; for models with `provider: embedded`.
    #[default]
    Embedded,
    /// Another program on this machine, or wherever the step's runner is.
    Command(command::CommandSpec),
    /// A server that speaks OpenAI's fine-tuning API.
    #[serde(rename = "openai")]
    OpenAi(openai::OpenAiBackend),
}

/// Shape of an adapter, in PEFT's terms.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct LoraSpec {
    /// Rank of every pair of factors.
    #[schemars(range(min = 1))]
    rank: usize,
    /// The delta is scaled by `alpha / rank`.
    alpha: f64,
    /// Dropout on the adapter's input while training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Adapted modules; every linear layer when left out.
    target_modules: Option<Vec<String>>,
    /// Makes it an activated adapter: it takes effect from the last place in the prompt where
    /// this text stands (`<|im_start|>assistant`), and the base model alone computes what comes
    /// before, once for all adapters. Training costs a fraction; the adapter can do less.
    #[serde(skip_serializing_if = "Option::is_none")]
    invocation: Option<String>,
    /// What the adapter's files call the model's layers. Left out, as `transformers` loads the model:
    /// with its picture part for a GGUF file of Gemma 3 with 4B, 12B or 27B, else as a text model. In
    /// this process only.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer_names: Option<LayerNamesSpec>,
}

/// What an adapter's files call the layers of its model.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum LayerNamesSpec {
    /// `model.layers`: for a text model, also one without the picture part that its size was
    /// published with.
    Text,
    /// `model.language_model.layers`: for a model that is loaded with its picture part.
    BesidePictures,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: None,
            invocation: None,
            layer_names: None,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ScheduleSpec {
    /// In a straight line, to 0 just after the last step.
    #[default]
    Linear,
    /// Along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

fn one() -> usize {
    1
}

fn batch_size() -> usize {
    8
}

fn learning_rate() -> f64 {
    2e-3
}

fn warmup() -> f64 {
    0.1
}

/// That of Hugging Face's Trainer.
fn max_grad_norm() -> f64 {
    1.0
}

/// Params that say nothing of it are as they were before there was such a setting.
fn is_usual_norm(norm: &f64) -> bool {
    *norm == max_grad_norm()
}

impl Step for Finetune {
    fn kind(&self) -> &'static str {
        "finetune"
    }
    fn version(&self) -> u32 {
        5
    }
    fn about(&self) -> &'static str {
        "Fine-tunes the student with LoRA on chats; a checkpoint (PEFT files) after every epoch."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new(
                "messages",
                "messages",
                "Chats; the loss is on the assistant's messages, one of which is the last.",
            ),
            Port::new(
                "lineage",
                "lineage",
                "The rows that the chats are of; without it no score of a checkpoint is known to be clean.",
            )
            .optional(),
            Port::new(
                VALIDATION,
                "messages",
                "Chats that are not trained on: the loss on them is told after every epoch.",
            )
            .optional(),
            Port::new(
                VALIDATION_LINEAGE,
                "lineage",
                "The rows that these are of: with `patience` they have a say in the checkpoints.",
            )
            .optional(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("base", "adapter", "The student before training."),
            Port::new(
                "checkpoints",
                "adapter",
                "The student after each epoch, or every `save_steps`.",
            )
            .many(),
            Port::new(
                "loss",
                "loss",
                "Training loss, step by step, and that on `validation` at the end of each epoch.",
            ),
        ]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        settle(ctx)?;
        let params: Params = ctx.params()?;
        let outcome = match (&params.backend, &params.model) {
            #[cfg(feature = "model")]
            (Backend::Embedded, ModelSpec::Embedded(spec)) => embedded::train(ctx, &params, spec),
            #[cfg(not(feature = "model"))]
            (Backend::Embedded, ModelSpec::Embedded(_)) => Err(crate::models::local::left_out()),
            (Backend::Embedded, other) => Err(StepError::invalid(format!(
                "`{}` cannot be trained in this process: only `provider: embedded` models can",
                other.name()
            ))
            .help("say with `backend` what trains it: `command` or `openai`")),
            (Backend::Command(spec), _) => command::train(ctx, &params, spec),
            (Backend::OpenAi(spec), _) => openai::train(ctx, &params, spec),
        }?;
        record_lineage(ctx, &params, &outcome)?;
        Ok(outcome)
    }
}

/// Writes into every checkpoint which rows it was trained on and ended by, where that is known.
fn record_lineage(
    ctx: &StepContext,
    params: &Params,
    outcome: &StepOutcome,
) -> Result<(), StepError> {
    let Some(input) = ctx.input_opt("lineage") else {
        ctx.reporter.warning(
            "`lineage` is not given: scores cannot say whether their rows were trained on",
        );
        return Ok(());
    };
    let mut lineage = leakage::read(&input.path)?;
    if params.patience.is_some() {
        let Some(input) = ctx.input_opt(VALIDATION_LINEAGE) else {
            ctx.reporter.warning(
                "`validation_lineage` is not given: scores cannot say whether their rows decided \
                 when the training ended",
            );
            return Ok(());
        };
        lineage.select_by(&leakage::read(&input.path)?);
    }
    for label in outcome.lists.get("checkpoints").into_iter().flatten() {
        let folder = ctx.output_item("checkpoints", label)?;
        let mut checkpoint = Checkpoint::load(&folder)?;
        checkpoint.lineage = Some(lineage.clone());
        checkpoint.save(&folder)?;
    }
    Ok(())
}
