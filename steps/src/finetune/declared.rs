//! [`Declared`]: what the params of a `finetune` step say of the checkpoints that come of it,
//! before any training. Says nothing of what they leave open.

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

/// What comes of a training.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Declared {
    /// The entry that is trained.
    pub(crate) model: ModelSpec,
    /// The server that trains keeps the models; there are no files.
    pub(crate) is_hosted: bool,
    /// What trains.
    pub(crate) by: &'static str,
    /// It trains in this process.
    pub(crate) is_own: bool,
    /// Rank of every pair of factors; `None` where the program is told in a way of its own.
    pub(crate) rank: Option<Said<u64>>,
    /// Adapted modules, where they are listed.
    pub(crate) modules: Option<Said<Vec<String>>>,
    /// What makes the adapters more than plain LoRA.
    pub(crate) beyond: Vec<Said<Beyond>>,
}

/// What the params of a `finetune` step say; `None` when they can be known only in a run.
pub(crate) fn declared(params: &Value) -> Option<Declared> {
    let params: Params = serde_json::from_value(params.clone()).ok()?;
    let rank = u64::try_from(params.lora.rank).ok()?;
    let modules = params.lora.target_modules.clone();
    let mut found = Declared {
        is_hosted: matches!(params.backend, Backend::OpenAi(_)),
        is_own: matches!(params.backend, Backend::Embedded),
        by: match &params.backend {
            Backend::Embedded => "training in this process",
            Backend::Command(spec) => spec.program(),
            Backend::OpenAi(_) => "OpenAI's fine-tuning API",
        },
        model: params.model,
        rank: Some(Said::new(rank, &["lora", "rank"])),
        modules: modules.map(|modules| Said::new(modules, &["lora", "target_modules"])),
        beyond: Vec::new(),
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
