//! Whether the files of a target of `deploy` can load what is deployed. As `deploy` itself has it
//! when it renders them, which is after the training.

use flowrun_engine::finding::{Finding, Severity};
use flowrun_engine::pipeline::StepNode;

use super::{Training, of_asker, plain, softened};
use crate::models::ModelSpec;

/// What keeps the target of `step` from loading the model or the checkpoints of `trainings`, each
/// with whether a run may leave it out.
pub(super) fn check(
    step: &StepNode,
    model: Option<&ModelSpec>,
    trainings: &[(&Training<'_>, bool)],
) -> Vec<Finding> {
    let settings = &step.params["settings"];
    let target = match step.params["target"].as_str() {
        Some("vllm") => "vllm",
        // Without it, this program's own server is what runs there.
        Some("ray-serve") if settings["adapters_url"].is_string() => "ray-serve",
        _ => return Vec::new(),
    };
    let mut found = Vec::new();
    let error =
        |message: String, help: &str| of_asker(Severity::Error, step, "target", message, help);
    match model {
        Some(ModelSpec::Embedded(spec)) => {
            let weights = &spec.weights;
            let loads = weights.hf.is_some() && weights.file.is_none();
            if !loads && !settings["base_model"].is_string() {
                found.push(error(
                    format!("`{target}` cannot load the weights `{}`", weights.name()),
                    "set `settings.base_model` to the model on the Hugging Face hub that they were made from, or to its folder",
                ));
            }
        }
        Some(ModelSpec::OpenAi(spec)) if spec.adapters.is_some() => {}
        // `model` may be an expression that is not known yet.
        None if !step.params["model"].is_null() => {}
        _ => found.push(error(
            format!("`{target}` serves a model, and the bundle has none of its own"),
            "deploy a program that asks a `provider: embedded` model, or one of a server with `adapters`",
        )),
    }
    for (training, open) in trainings {
        let all = of_training(step, target, training).into_iter();
        found.extend(all.map(|one| softened(one, *open)));
    }
    found
}

/// What keeps `target` from loading the checkpoints of `training`.
fn of_training(step: &StepNode, target: &str, training: &Training<'_>) -> Vec<Finding> {
    if training.declared.is_hosted {
        let message = format!(
            "`{target}` cannot load the models of `{}`: only their server has them",
            training.step
        );
        let help = "choose the target `bundle`: it asks that server";
        return vec![of_asker(Severity::Error, step, "target", message, help)];
    }
    let whose = format!("the target `{target}` of `{}`", step.name);
    let mut found = plain::refused(training, &whose, Severity::Error);
    found.extend(plain::unusual_modules(training, &whose));
    found.extend(plain::rank_above(
        training,
        plain::HIGHEST_RANK,
        Severity::Error,
        |rank| {
            format!(
                "{whose}, which is vLLM, loads adapters of rank {} at most, not {rank}",
                plain::HIGHEST_RANK
            )
        },
        "train a lower rank",
    ));
    found
}
