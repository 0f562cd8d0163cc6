//! [`Trainer`]: the programs that train, each with its config, its form of the data and its
//! command line. All three are built on the Trainer of Hugging Face's `transformers`, so what they
//! leave behind is alike.
//!
//! Field names: TRL 1.4 (`SFTConfig`, `ModelConfig`), LLaMA-Factory 0.9.5
//! (`examples/train_lora`), axolotl 0.19 (its config reference).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowrun_engine::step::StepError;
use flowrun_lm::lm::Message;
use flowrun_lm::messages::ChatRow;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::{Params, ScheduleSpec};
use super::{CommandSpec, OUT, Precision, collect, merged, write_yaml};
use crate::rows::{write_json, write_jsonl};

const CONFIG: &str = "config.yaml";
const DATA: &str = "train.jsonl";
/// LLaMA-Factory's list of data sets.
const DATASETS: &str = "dataset_info.json";
/// Name of the data set in it.
const DATASET: &str = "flowrun";
/// axolotl's mark of the messages to learn.
const TRAINING: &str = "training";
/// Rows on the device at once, where nothing is said: as many of these as divide the batch.
const MICRO: [usize; 4] = [8, 4, 2, 1];

/// A program that trains LoRA adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Trainer {
    /// `trl sft`, of Hugging Face.
    Trl,
    /// `llamafactory-cli train`.
    LlamaFactory,
    /// `axolotl train`.
    Axolotl,
}

/// A training, in no program's terms.
pub(super) struct Job<'a> {
    params: &'a Params,
    spec: &'a CommandSpec,
    base: String,
    revision: Option<String>,
    rows: usize,
    micro_batch: usize,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        params: &'a Params,
        spec: &'a CommandSpec,
        (base, revision): (String, Option<String>),
        rows: usize,
    ) -> Result<Self, StepError> {
        let fits = |micro: &usize| params.batch_size.is_multiple_of(*micro);
        let micro_batch = match spec.micro_batch {
            Some(micro) if fits(&micro) => micro,
            Some(micro) => {
                return Err(StepError::invalid(format!(
                    "`micro_batch` {micro} does not divide `batch_size` {}",
                    params.batch_size
                )));
            }
            None => MICRO.into_iter().find(fits).unwrap_or(1),
        };
        if rows == 0 {
            return Err(StepError::invalid("there are no rows to train on"));
        }
        Ok(Self {
            params,
            spec,
            base,
            revision,
            rows,
            micro_batch,
        })
    }

    /// Optimizer steps on one device.
    pub(super) fn steps(&self) -> usize {
        self.rows.div_ceil(self.params.batch_size) * self.params.epochs
    }

    /// In steps, which every version of `transformers` takes; the ratio is gone from version 5.
    fn warmup_steps(&self) -> usize {
        (self.params.warmup * self.steps() as f64).round() as usize
    }

    fn accumulation(&self) -> usize {
        self.params.batch_size / self.micro_batch
    }

    fn is_bf16(&self) -> bool {
        self.spec.precision == Precision::Bf16
    }

    fn schedule(&self) -> &'static str {
        match self.params.schedule {
            ScheduleSpec::Linear => "linear",
            ScheduleSpec::Cosine => "cosine",
            ScheduleSpec::Constant => "constant_with_warmup",
        }
    }

    /// Adapted modules; `all` where all linear layers are.
    fn modules(&self, all: Value) -> Value {
        let modules = self.params.lora.target_modules.as_ref();
        modules.map_or(all, |modules| json!(modules))
    }
}

impl Trainer {
    /// What it is called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Trl => "TRL",
            Self::LlamaFactory => "LLaMA-Factory",
            Self::Axolotl => "axolotl",
        }
    }

    /// The command, with all its arguments.
    pub(super) fn argv(self, program: Option<&[String]>, config: &Path) -> Vec<String> {
        let (usual, rest): (&str, &[&str]) = match self {
            Self::Trl => ("trl", &["sft", "--config"]),
            Self::LlamaFactory => ("llamafactory-cli", &["train"]),
            Self::Axolotl => ("axolotl", &["train"]),
        };
        let program = program.map_or_else(|| vec![usual.to_owned()], <[String]>::to_vec);
        let rest = rest.iter().map(|arg| (*arg).to_owned());
        let config = config.to_string_lossy().into_owned();
        program.into_iter().chain(rest).chain([config]).collect()
    }

    /// The checkpoint that an attempt which was cut off can go on from; TRL's command starts over.
    pub(super) fn goes_on_from(self, out: &Path) -> Option<PathBuf> {
        match self {
            Self::Trl => None,
            Self::LlamaFactory | Self::Axolotl => collect::last_checkpoint(out),
        }
    }

    /// Writes the conversations as the program reads them.
    /// `told` is what the chat template is told besides; only some programs take that by the row.
    pub(super) fn write_data(
        self,
        folder: &Path,
        chats: &[ChatRow],
        told: Option<&BTreeMap<String, Value>>,
    ) -> Result<(), StepError> {
        let path = folder.join(DATA);
        match self {
            // Only with prompt and completion apart is the loss on the completion alone, whatever
            // the model's template: a row for each answer.
            Self::Trl => {
                let rows = chats.iter().flat_map(|chat| {
                    let answers = chat.answers();
                    answers.map(move |at| parted(chat, at, told))
                });
                write_jsonl(&path, rows)
            }
            Self::Axolotl => {
                let rows: Vec<Value> = chats.iter().map(marked).collect();
                write_jsonl(&path, &rows)
            }
            Self::LlamaFactory => {
                write_jsonl(&path, chats)?;
                let about = json!({ DATASET: {
                    "file_name": DATA,
                    "formatting": "sharegpt",
                    "columns": { "messages": "messages" },
                    "tags": {
                        "role_tag": "role", "content_tag": "content",
                        "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
                    },
                }});
                write_json(&folder.join(DATASETS), &about)
            }
        }
    }

    /// Rows that it trains on.
    pub(super) fn rows(self, chats: &[ChatRow]) -> usize {
        match self {
            Self::Trl => chats.iter().map(|chat| chat.answers().count()).sum(),
            Self::LlamaFactory | Self::Axolotl => chats.len(),
        }
    }

    /// Whether it tells the chat template what the rows say besides their messages.
    pub(super) fn tells_the_template(self) -> bool {
        self == Self::Trl
    }

    /// Writes the program's config; returns its path.
    pub(super) fn write_config(
        self,
        folder: &Path,
        job: &Job<'_>,
        from: Option<&Path>,
    ) -> Result<PathBuf, StepError> {
        let config = match self {
            Self::Trl => trl(job, folder),
            Self::LlamaFactory => llama_factory(job, folder, from)?,
            Self::Axolotl => axolotl(job, folder, from),
        };
        let Value::Object(config) = config else {
            return Err(StepError::failed("a trainer's config is a mapping"));
        };
        let config: Map<String, Value> = config.into_iter().filter(|(_, v)| !v.is_null()).collect();
        let path = folder.join(CONFIG);
        write_yaml(&path, &merged(config, &job.spec.config))?;
        Ok(path)
    }
}

/// A conversation up to a message to learn, apart from what comes before that.
fn parted(chat: &ChatRow, at: usize, told: Option<&BTreeMap<String, Value>>) -> Value {
    let (prompt, answer) = (&chat.messages[..at], &chat.messages[at]);
    let mut row = json!({ "prompt": prompt, "completion": [answer] });
    if let Some(told) = told {
        row["chat_template_kwargs"] = json!(told);
    }
    row
}

/// A conversation in which each message says whether it is to be learned.
fn marked(chat: &ChatRow) -> Value {
    let answers: Vec<usize> = chat.answers().collect();
    let message = |(at, message): (usize, &Message)| {
        let is_learnt = answers.contains(&at);
        json!({ "role": message.role, "content": message.content, TRAINING: is_learnt })
    };
    let messages: Vec<Value> = chat.messages.iter().enumerate().map(message).collect();
    json!({ "messages": messages })
}

/// The config with what TRL and LLaMA-Factory both hand to the Trainer (`TrainingArguments`).
fn with_arguments(mut config: Value, job: &Job<'_>, folder: &Path) -> Value {
    let params = job.params;
    let arguments = json!({
        "num_train_epochs": params.epochs,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation(),
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": job.schedule(),
        "warmup_steps": job.warmup_steps(),
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "seed": params.seed,
        "bf16": job.is_bf16(),
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": folder.join(OUT),
    });
    if let (Some(config), Value::Object(arguments)) = (config.as_object_mut(), arguments) {
        config.extend(arguments);
    }
    config
}

fn trl(job: &Job<'_>, folder: &Path) -> Value {
    let params = job.params;
    let config = json!({
        "model_name_or_path": job.base,
        "model_revision": job.revision,
        "dtype": if job.is_bf16() { "bfloat16" } else { "float32" },
        "datasets": [{ "path": "json", "data_files": { "train": folder.join(DATA) } }],
        "use_peft": true,
        "lora_r": params.lora.rank,
        "lora_alpha": params.lora.alpha,
        "lora_dropout": params.lora.dropout,
        "lora_target_modules": job.modules(json!("all-linear")),
        "max_length": job.spec.max_length,
        "completion_only_loss": true,
        "save_only_model": true,
    });
    with_arguments(config, job, folder)
}

fn llama_factory(job: &Job<'_>, folder: &Path, from: Option<&Path>) -> Result<Value, StepError> {
    let params = job.params;
    let template = job.spec.template.as_ref().ok_or_else(|| {
        StepError::invalid("LLaMA-Factory needs `backend.command.template`")
            .help("its name of the model's chat template, such as `llama3` or `qwen`")
    })?;
    let config = json!({
        "model_name_or_path": job.base,
        "model_revision": job.revision,
        "stage": "sft",
        "do_train": true,
        "finetuning_type": "lora",
        "lora_rank": params.lora.rank,
        "lora_alpha": params.lora.alpha,
        "lora_dropout": params.lora.dropout,
        "lora_target": match &params.lora.target_modules {
            Some(modules) => modules.join(","),
            None => "all".to_owned(),
        },
        "dataset_dir": folder,
        "dataset": DATASET,
        "template": template,
        "cutoff_len": job.spec.max_length,
        "train_on_prompt": false,
        "mask_history": false,
        "resume_from_checkpoint": from,
    });
    Ok(with_arguments(config, job, folder))
}

fn axolotl(job: &Job<'_>, folder: &Path, from: Option<&Path>) -> Value {
    let params = job.params;
    json!({
        "base_model": job.base,
        "revision_of_model": job.revision,
        "adapter": "lora",
        "lora_r": params.lora.rank,
        "lora_alpha": params.lora.alpha,
        "lora_dropout": params.lora.dropout,
        "lora_target_linear": params.lora.target_modules.is_none().then_some(true),
        "lora_target_modules": job.modules(Value::Null),
        "datasets": [{
            "path": folder.join(DATA),
            "ds_type": "json",
            "type": "chat_template",
            "field_messages": "messages",
            "message_property_mappings": { "role": "role", "content": "content" },
            "message_field_training": TRAINING,
            "roles_to_train": [],
            "train_on_eos": "turn",
        }],
        "chat_template": "tokenizer_default",
        "train_on_inputs": false,
        "val_set_size": 0,
        "sequence_len": job.spec.max_length,
        "sample_packing": false,
        "num_epochs": params.epochs,
        "micro_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation(),
        "optimizer": "adamw_torch",
        "learning_rate": params.learning_rate,
        "lr_scheduler": job.schedule(),
        "warmup_steps": job.warmup_steps(),
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "seed": params.seed,
        "bf16": job.is_bf16(),
        "saves_per_epoch": 1,
        // It keeps only the last four otherwise.
        "save_total_limit": params.epochs,
        "logging_steps": 1,
        "output_dir": folder.join(OUT),
        "resume_from_checkpoint": from,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_lm::lm::Role;

    use super::*;

    fn spec(trainer: &str) -> CommandSpec {
        let spec = json!({ "trainer": trainer, "base": "m", "template": "qwen" });
        serde_json::from_value(spec).unwrap()
    }

    fn message(role: Role, content: &str) -> Message {
        let content = content.to_owned();
        Message { role, content }
    }

    #[test]
    fn every_program_is_told_the_norm_of_the_gradients() {
        let model = json!({ "provider": "openai", "base_url": "http://h/v1", "model": "m" });
        let params = json!({ "model": model, "max_grad_norm": 0.25 });
        let params: Params = serde_json::from_value(params).unwrap();
        for trainer in ["trl", "llama-factory", "axolotl"] {
            let spec = spec(trainer);
            let job = Job::new(&params, &spec, ("m".to_owned(), None), 8).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let path = spec
                .trainer
                .write_config(folder.path(), &job, None)
                .unwrap();
            let text = std::fs::read_to_string(path).unwrap();
            let config: Value = serde_yaml::from_str(&text).unwrap();
            assert_eq!(config["max_grad_norm"], 0.25, "{trainer}");
        }
    }

    #[test]
    fn every_answer_of_the_assistant_is_to_be_learnt() {
        let chat = ChatRow {
            messages: vec![
                message(Role::System, "s"),
                message(Role::Assistant, "hi"),
                message(Role::User, "a"),
                message(Role::Assistant, "b"),
                message(Role::User, "c"),
                message(Role::Assistant, "d"),
            ],
        };
        let written = |trainer: &str| -> Vec<Value> {
            let folder = tempfile::tempdir().unwrap();
            let trainer = spec(trainer).trainer;
            let chats = std::slice::from_ref(&chat);
            trainer.write_data(folder.path(), chats, None).unwrap();
            let text = std::fs::read_to_string(folder.path().join(DATA)).unwrap();
            let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
            rows.collect()
        };
        let rows = written("trl");
        assert_eq!(rows.len(), 2);
        assert_eq!(spec("trl").trainer.rows(std::slice::from_ref(&chat)), 2);
        for (row, (asked, said)) in rows.iter().zip([(3, "b"), (5, "d")]) {
            assert_eq!(row["prompt"].as_array().unwrap().len(), asked);
            let answer = json!([{ "role": "assistant", "content": said }]);
            assert_eq!(row["completion"], answer);
        }
        let rows = written("axolotl");
        let messages = rows[0]["messages"].as_array().unwrap().iter();
        let learnt: Vec<&Value> = messages.map(|message| &message[TRAINING]).collect();
        assert_eq!(learnt, [false, false, false, true, false, true]);
        assert_eq!(written("llama-factory").len(), 1);
    }
}
