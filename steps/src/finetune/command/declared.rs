//! What `config` of a program says of its adapters, in the program's own fields: it wins over the
//! step's params.
//!
//! Field names as in `trainer`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::trainer::Trainer;
use super::{CommandSpec, base_name};
use crate::finetune::Params;
use crate::finetune::declared::{Beyond, Declared, Refusal, Said};
use crate::models::ModelSpec;

/// Fields that say what makes an adapter more than plain LoRA.
const BEYOND: [(Trainer, &str, Beyond); 9] = [
    (Trainer::Trl, "use_dora", Beyond::Dora),
    (Trainer::Trl, "lora_modules_to_save", Beyond::SavedModules),
    (Trainer::LlamaFactory, "use_dora", Beyond::Dora),
    (
        Trainer::LlamaFactory,
        "additional_target",
        Beyond::SavedModules,
    ),
    (Trainer::LlamaFactory, "pissa_init", Beyond::ChangedBase),
    (Trainer::Axolotl, "peft_use_dora", Beyond::Dora),
    (
        Trainer::Axolotl,
        "lora_modules_to_save",
        Beyond::SavedModules,
    ),
    (
        Trainer::Axolotl,
        "peft_layer_replication",
        Beyond::RepeatedLayers,
    ),
    (
        Trainer::Axolotl,
        "peft_init_lora_weights",
        Beyond::ChangedBase,
    ),
];
/// Ways to start that change the base weights, as PEFT names them.
const CHANGING: [&str; 4] = ["pissa", "olora", "corda", "loftq"];

impl CommandSpec {
    /// The program's name.
    pub(in crate::finetune) fn program(&self) -> &'static str {
        self.trainer.name()
    }

    /// What the program tells the chat template in training, where that is known: some are told
    /// in their own words.
    pub(in crate::finetune) fn told(&self, model: &ModelSpec) -> Option<BTreeMap<String, Value>> {
        let told = || model.chat_template_kwargs().cloned().unwrap_or_default();
        self.trainer.tells_the_template().then(told)
    }

    /// What the step would refuse of these settings.
    pub(in crate::finetune) fn refused(&self, params: &Params) -> Vec<Said<Refusal>> {
        let mut found = Vec::new();
        let mut refuse = |refusal: Refusal, field: &'static str| {
            found.push(Said::new(refusal, &["backend", "command", field]));
        };
        if let Err(error) = base_name(params, self) {
            refuse(
                Refusal::new(error.message, error.help.unwrap_or_default()),
                "base",
            );
        }
        if self.trainer == Trainer::LlamaFactory && self.template.is_none() {
            let refusal = Refusal::new(
                "LLaMA-Factory needs `backend.command.template`",
                "its name of the model's chat template, such as `llama3` or `qwen`",
            );
            refuse(refusal, "template");
        }
        if let Some(micro) = self.micro_batch
            && !params.batch_size.is_multiple_of(micro)
        {
            let message = format!(
                "`micro_batch` {micro} does not divide `batch_size` {}",
                params.batch_size
            );
            refuse(
                Refusal::new(message, "choose a divisor of it"),
                "micro_batch",
            );
        }
        found
    }

    /// Adds to what the step's params declare, and corrects it.
    pub(in crate::finetune) fn declare(&self, found: &mut Declared) {
        let path = |field: &'static str| ["backend", "command", "config", field];
        for (trainer, field, beyond) in BEYOND {
            let given = self.config.get(field);
            if trainer == self.trainer && given.is_some_and(|value| says_so(field, value)) {
                found.beyond.push(Said::new(beyond, &path(field)));
            }
        }
        let (rank, modules) = match self.trainer {
            Trainer::Trl => ("lora_r", "lora_target_modules"),
            Trainer::LlamaFactory => ("lora_rank", "lora_target"),
            Trainer::Axolotl => ("lora_r", "lora_target_modules"),
        };
        if let Some(value) = self.config.get(rank) {
            found.rank = value.as_u64().map(|value| Said::new(value, &path(rank)));
        }
        if let Some(value) = self.config.get(modules) {
            let names: Option<Vec<String>> = serde_json::from_value(value.clone()).ok();
            found.modules = names.map(|names| Said::new(names, &path(modules)));
        }
    }
}

/// Whether the value of a field turns on what it is for.
fn says_so(field: &str, value: &Value) -> bool {
    match value {
        Value::Bool(on) => *on && field != "peft_init_lora_weights",
        // A way to start by its name: `gaussian` leaves the base as it is.
        Value::String(text) if field == "peft_init_lora_weights" => {
            let text = text.to_lowercase();
            CHANGING.iter().any(|way| text.starts_with(way))
        }
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Null | Value::Number(_) => false,
    }
}
