//! Whether a model entry can answer as the checkpoints of a training.

use flowrun_engine::finding::{Finding, Severity};
use flowrun_engine::pipeline::StepNode;
use flowrun_lm::client::{AdapterPlace, AdapterServer, Guided, OpenAiSpec};

use super::{Training, of_asker, plain};
use crate::checkpoint::{TOLD_OTHERWISE, trained_with};
use crate::models::ModelSpec;
use crate::models::adapter_place::{RAY_STORES, contradiction};

/// The field of a step that names its model.
const MODEL: &str = "model";

/// What keeps `model`, which `step` asks, from answering as the checkpoints of `training`.
pub(super) fn check(step: &StepNode, model: &ModelSpec, training: &Training<'_>) -> Vec<Finding> {
    let mut found = match model {
        ModelSpec::OpenAi(spec) if training.declared.is_hosted => {
            hosted(step, spec, training).into_iter().collect()
        }
        ModelSpec::OpenAi(spec) => behind_server(step, spec, training),
        ModelSpec::Embedded(_) => embedded(step, model, training),
        // What it says of itself when it is opened is true of any checkpoint.
        ModelSpec::SentenceEncoder(_) => Vec::new(),
    };
    found.extend(told_otherwise(step, model, training));
    found
}

/// A chat template that would be told something else than in training.
fn told_otherwise(step: &StepNode, model: &ModelSpec, training: &Training<'_>) -> Option<Finding> {
    let trained = training.declared.told.as_ref()?;
    let entry = model.chat_template_kwargs()?;
    (entry != trained).then(|| {
        let message = format!(
            "the checkpoints of `{}` are trained {}, and the entry of `{}`, which `{}` asks, says \
             `chat_template_kwargs: {}`",
            training.step,
            trained_with(trained),
            model.name(),
            step.name,
            serde_json::json!(entry)
        );
        of_asker(Severity::Error, step, MODEL, message, TOLD_OTHERWISE)
    })
}

/// A server's model, and models that a server keeps.
fn hosted(step: &StepNode, spec: &OpenAiSpec, training: &Training<'_>) -> Option<Finding> {
    let ModelSpec::OpenAi(trained) = &training.declared.model else {
        return None;
    };
    let there = |url: &str| url.trim_end_matches('/').to_owned();
    let elsewhere = there(&trained.base_url) != there(&spec.base_url);
    elsewhere.then(|| {
        of_asker(
            Severity::Warning,
            step,
            MODEL,
            format!(
                "the models of `{}` are kept by the server at `{}`, and `{}` asks `{}`",
                training.step, trained.base_url, step.name, spec.base_url
            ),
            "ask the entry that was trained, unless both are one server",
        )
    })
}

fn embedded(step: &StepNode, model: &ModelSpec, training: &Training<'_>) -> Vec<Finding> {
    let (name, declared) = (model.name(), &training.declared);
    let error =
        |message: String, help: &str| vec![of_asker(Severity::Error, step, MODEL, message, help)];
    if declared.is_hosted {
        let message = format!(
            "`{name}` runs in this process, and the models of `{}` are kept by the server that trains them",
            training.step
        );
        return error(message, "ask the entry that was trained");
    }
    if let ModelSpec::OpenAi(trained) = &declared.model {
        let message = format!(
            "`{name}` runs in this process, and the adapters of `{}` are for `{}` of a server",
            training.step, trained.model
        );
        return error(
            message,
            "train the entry that is asked: `backend.command.base` says what the program calls it",
        );
    }
    let beyond = declared.beyond.iter();
    // Activated adapters are its own.
    let refused = beyond.filter(|said| said.value != plain::Beyond::Activated);
    refused
        .map(|said| {
            let word = said.value.word();
            let message = format!("`{name}`, which `{}` asks, does not load {word}", step.name);
            training.finding(
                Severity::Error,
                &said.path,
                message,
                "train plain LoRA for it",
            )
        })
        .collect()
}

/// A server that is given adapters.
fn behind_server(step: &StepNode, spec: &OpenAiSpec, training: &Training<'_>) -> Vec<Finding> {
    let Some(place) = &spec.adapters else {
        let message = format!(
            "`{}`, which `{}` asks, cannot answer as the checkpoints of `{}`: its entry has no `adapters`",
            spec.model, step.name, training.step
        );
        let help =
            "say with `adapters:` of the entry which folder or URL its server reads them from";
        return vec![of_asker(Severity::Error, step, MODEL, message, help)];
    };
    let mut found = Vec::new();
    // A file is known by its digest: only the server can compare it.
    let trained = match &training.declared.model {
        ModelSpec::OpenAi(trained) => Some(&trained.model),
        ModelSpec::Embedded(trained) => {
            let weights = &trained.weights;
            weights.hf.as_ref().filter(|_| weights.file.is_none())
        }
        ModelSpec::SentenceEncoder(_) => None,
    };
    if let Some(trained) = trained.filter(|trained| **trained != spec.model) {
        let message = format!(
            "the adapters of `{}` are for `{trained}`, and `{}` asks `{}`",
            training.step, step.name, spec.model
        );
        let help = "train and ask one model";
        found.push(of_asker(Severity::Error, step, MODEL, message, help));
    }
    found.extend(by_place(step, spec, place));
    let whose = format!("the server of `{}`", spec.model);
    found.extend(by_server(place, training, &whose));
    found.extend(by_rank(place, training, &whose));
    if spec.guided == Some(Guided::LlamaCpp) {
        let message = format!(
            "{whose} is spoken to as llama.cpp's, which chooses adapters by number and answers to any name with the model that it has"
        );
        let help = "serve checkpoints with `flowrun serve` or vLLM";
        found.push(of_asker(Severity::Warning, step, MODEL, message, help));
    }
    found
}

/// Where the server would not find them.
fn by_place(step: &StepNode, spec: &OpenAiSpec, place: &AdapterPlace) -> Option<Finding> {
    if let Some((what, help)) = contradiction(place) {
        let message = format!("the entry of `{}`: {what}", spec.model);
        return Some(of_asker(Severity::Error, step, MODEL, message, help));
    }
    let url = place.url.as_ref()?;
    // vLLM by itself looks into no store.
    let is_ray = place.server == Some(AdapterServer::Vllm);
    if is_ray && !RAY_STORES.iter().any(|store| url.starts_with(store)) {
        let message = format!(
            "the server of `{}` is vLLM, which looks into an object store where Ray Serve LLM runs it, and that knows {}, not `{url}`",
            spec.model,
            RAY_STORES.join(", ")
        );
        let help = "put the adapters into such a store, or leave out `server` if it is another";
        return Some(of_asker(Severity::Error, step, MODEL, message, help));
    }
    let severity = match is_ray {
        true => Severity::Error,
        false => Severity::Warning,
    };
    spec.model.contains(':').then(|| {
        let message = format!(
            "the adapters of `{}` are asked for as `{}:NAME`, and Ray Serve LLM takes what is before the first `:` for the base model",
            spec.model, spec.model
        );
        let help = "give the base model an id without `:` at the server";
        of_asker(severity, step, MODEL, message, help)
    })
}

/// What a server of this make does not load.
fn by_server(place: &AdapterPlace, training: &Training<'_>, whose: &str) -> Vec<Finding> {
    match place.server {
        Some(AdapterServer::Vllm) => {
            let mut found = plain::refused(training, whose, Severity::Error);
            found.extend(plain::unusual_modules(training, whose));
            found
        }
        Some(AdapterServer::Flowrun) => {
            let beyond = training.declared.beyond.iter();
            let refused = beyond.filter(|said| said.value != plain::Beyond::Activated);
            let finding = |said: &crate::finetune::declared::Said<plain::Beyond>| {
                let message = format!("{whose} does not load {}", said.value.word());
                let help = "train plain LoRA for it";
                training.finding(Severity::Error, &said.path, message, help)
            };
            refused.map(finding).collect()
        }
        None => plain::refused(training, whose, Severity::Warning)
            .into_iter()
            .map(|finding| Finding {
                help:
                    "train plain LoRA, or say what the server is: `adapters: { server: flowrun }`"
                        .to_owned(),
                ..finding
            })
            .collect(),
    }
}

/// Ranks that the server has no room for.
fn by_rank(place: &AdapterPlace, training: &Training<'_>, whose: &str) -> Option<Finding> {
    let is_vllm = place.server == Some(AdapterServer::Vllm);
    match place.max_rank {
        Some(most) => plain::rank_above(
            training,
            most,
            Severity::Error,
            |rank| format!("{whose} loads adapters of rank {most} at most, not {rank}"),
            "train a lower rank, or start the server with more room and say so (`adapters.max_rank`)",
        ),
        None if is_vllm => plain::rank_above(
            training,
            plain::USUAL_RANK,
            Severity::Warning,
            |rank| {
                format!(
                    "{whose} loads rank {rank} only when it was started with `--max-lora-rank`: vLLM's own is {}",
                    plain::USUAL_RANK
                )
            },
            "say the server's `--max-lora-rank` with `adapters.max_rank`",
        ),
        None => None,
    }
}
