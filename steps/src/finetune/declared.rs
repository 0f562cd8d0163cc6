//! [`Declared`]: what the params of a `finetune` step say of the checkpoints that come of it,
//! before any training. Says nothing of what they leave open.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Backend, Params};
use crate::models::ModelSpec;

/// Something that the params say.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Said<T> {
    /// What.
    pub(crate) value: T,
    /// Where in the step: `with`, `lora`, `rank`.
    pub(crate) path: Vec<String>,
}

impl<T> Said<T> {
    pub(super) fn new(value: T, path: &[&str]) -> Self {
        let below = path.iter().map(|part| (*part).to_owned());
        let with = std::iter::once("with".to_owned());
        Self {
            value,
            path: with.chain(below).collect(),
        }
    }
}

/// What makes an adapter more than plain LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beyond {
    /// It takes effect from a text in the prompt on (aLoRA).
    Activated,
    /// Magnitudes are trained apart (DoRA).
    Dora,
    /// Whole modules are trained and saved beside it.
    SavedModules,
    /// Layers of the base model are repeated.
    RepeatedLayers,
    /// It starts from a decomposition that changes the base weights (PiSSA, OLoRA, CorDA, LoftQ).
    ChangedBase,
}

impl Beyond {
    /// The word for people.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Activated => "activated adapters (`lora.invocation`)",
            Self::Dora => "DoRA",
            Self::SavedModules => "adapters with whole modules beside them (`modules_to_save`)",
            Self::RepeatedLayers => "adapters with repeated layers",
            Self::ChangedBase => {
                "adapters that start from changed base weights (PiSSA, OLoRA, CorDA, LoftQ)"
            }
        }
    }
}

/// Why a training would not even begin.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    /// What is wrong.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) help: String,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: help.into(),
        }
    }
}

/// What comes of a training.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Declared {
    /// The entry that is trained.
    pub(crate) model: ModelSpec,
    /// The server that trains keeps the models; there are no files.
    pub(crate) is_hosted: bool,
    /// What the chat template is told besides the messages; `None` where only who trains knows.
    pub(crate) told: Option<BTreeMap<String, Value>>,
    /// Rank of every pair of factors; `None` where the program is told in a way of its own.
    pub(crate) rank: Option<Said<u64>>,
    /// Adapted modules, where they are listed.
    pub(crate) modules: Option<Said<Vec<String>>>,
    /// What makes the adapters more than plain LoRA.
    pub(crate) beyond: Vec<Said<Beyond>>,
    /// What the step itself would refuse when it runs.
    pub(crate) refused: Vec<Said<Refusal>>,
}

/// What the params of a `finetune` step say; `None` when they can be known only in a run.
pub(crate) fn declared(params: &Value) -> Option<Declared> {
    let decisive = ["model", "lora", "backend"];
    if decisive.iter().any(|field| is_open(&params[*field])) {
        return None;
    }
    let params: Params = serde_json::from_value(params.clone()).ok()?;
    let rank = u64::try_from(params.lora.rank).ok()?;
    let modules = params.lora.target_modules.clone();
    let told = match &params.backend {
        Backend::Embedded => {
            let told = params.model.chat_template_kwargs();
            Some(told.cloned().unwrap_or_default())
        }
        Backend::Command(spec) => spec.told(&params.model),
        Backend::OpenAi(_) => None,
    };
    let mut found = Declared {
        told,
        is_hosted: matches!(params.backend, Backend::OpenAi(_)),
        rank: Some(Said::new(rank, &["lora", "rank"])),
        modules: modules.map(|modules| Said::new(modules, &["lora", "target_modules"])),
        beyond: Vec::new(),
        refused: refused(&params),
        model: params.model,
    };
    if params.lora.invocation.is_some() {
        let activated = Said::new(Beyond::Activated, &["lora", "invocation"]);
        found.beyond.push(activated);
    }
    if let Backend::Command(spec) = &params.backend {
        spec.declare(&mut found);
    }
    Some(found)
}

/// It holds an expression, whose value is known only for an item.
pub(crate) fn is_open(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains("${{"),
        Value::Array(items) => items.iter().any(is_open),
        Value::Object(fields) => fields.values().any(is_open),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// What the step would refuse of its own params.
fn refused(params: &Params) -> Vec<Said<Refusal>> {
    let name = params.model.name();
    let of_model = |message: String, help: &str| Said::new(Refusal::new(message, help), &["model"]);
    let mut found = match (&params.backend, &params.model) {
        (Backend::Embedded, ModelSpec::Embedded(_))
        | (Backend::OpenAi(_), ModelSpec::OpenAi(_)) => Vec::new(),
        (Backend::Embedded, _) => vec![of_model(
            format!(
                "`{name}` cannot be trained in this process: only `provider: embedded` models can"
            ),
            "say with `backend` what trains it: `command` or `openai`",
        )],
        (Backend::OpenAi(_), _) => vec![of_model(
            format!(
                "`{name}` is trained by no server: `backend: openai` needs a model with `provider: openai`"
            ),
            "name the entry of the server that trains",
        )],
        (Backend::Command(spec), _) => spec.refused(params),
    };
    let by = match &params.backend {
        Backend::Embedded => return found,
        Backend::Command(spec) => spec.program(),
        Backend::OpenAi(_) => "OpenAI's fine-tuning API",
    };
    if params.lora.invocation.is_some() {
        let refusal = Refusal::new(
            format!("{by} trains no activated adapters"),
            "leave `invocation` out, or train in this process",
        );
        found.push(Said::new(refusal, &["lora", "invocation"]));
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_from_item_to_item_is_not_said() {
        let command =
            |config: Value| json!({"command": {"trainer": "trl", "base": "m", "config": config}});
        let params = |lora: Value, backend: Value| {
            let model = json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"});
            json!({"model": model, "lora": lora, "backend": backend})
        };
        let rank = json!({"rank": 4});
        let known = declared(&params(
            rank.clone(),
            command(json!({"use_dora": true, "lora_r": 8})),
        ));
        let beyond = known.map(|known| known.beyond.len());
        assert_eq!(beyond, Some(1));
        for open in [
            params(rank, command(json!({"use_dora": "${{ item.dora }}"}))),
            params(json!({"invocation": "${{ item.x }}"}), command(json!({}))),
            params(
                json!({"target_modules": ["q_proj", "${{ item.x }}"]}),
                command(json!({})),
            ),
        ] {
            assert_eq!(declared(&open), None, "{open}");
        }
    }
}
