//! Training by another program: one declaration becomes the config of TRL, LLaMA-Factory or
//! axolotl; the program is run to its end, and its PEFT checkpoints are taken over.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the settings, and the course of a training |
//! | `trainer` | the programs: their config, data and command line |
//! | `process` | runs the program |
//! | `collect` | reads the checkpoints and losses that it left |
//! | `declared` | what its settings say of the adapters |

mod collect;
mod declared;
mod process;
mod trainer;

use std::collections::BTreeMap;
use std::path::Path;

use flowrun_engine::step::{StepContext, StepError, StepOutcome};
use flowrun_lm::messages::ChatRow;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Params;
use crate::checkpoint::Checkpoint;
use crate::folder;
use crate::models::{Host, ModelSpec};
use crate::rows::{read_jsonl, write_json};
use collect::Collected;
use trainer::{Job, Trainer};

/// Where the program leaves its checkpoints, in the folder that it works in.
const OUT: &str = "out";

/// Another program that trains.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CommandSpec {
    /// The program.
    trainer: Trainer,
    /// How to start it, before its own arguments: `[/opt/trl/bin/trl]`. By default its usual name.
    /// A whole path's folder comes first in the program's PATH, unless it is there already.
    #[serde(default)]
    program: Option<Vec<String>>,
    /// The model as the program names it: a repository of the Hugging Face hub, or a folder. By
    /// default the student's own name at its server or on the hub.
    #[serde(default)]
    base: Option<String>,
    /// Commit, branch or tag of `base`; a branch is looked up by the program itself. Left out, it is
    /// the commit of the key where `base` is the repository of the student's own weights.
    #[serde(default)]
    revision: Option<String>,
    /// Rows on the device at once; `batch_size` is reached by accumulation. By default the
    /// largest of 1, 2, 4, 8 that divides it.
    #[serde(default)]
    #[schemars(range(min = 1))]
    micro_batch: Option<usize>,
    /// Longest conversation in tokens; a longer one is cut.
    #[serde(default = "max_length")]
    #[schemars(range(min = 1))]
    max_length: usize,
    /// What numbers are computed in.
    #[serde(default)]
    precision: Precision,
    /// LLaMA-Factory's name of the chat template, such as `llama3`.
    #[serde(default)]
    template: Option<String>,
    /// More fields of the program's config; they win over flowrun's own.
    #[serde(default)]
    config: BTreeMap<String, Value>,
    /// Environment variables of the program, besides those of flowrun itself.
    #[serde(default)]
    env: BTreeMap<String, String>,
}

/// What numbers are computed in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Precision {
    /// bfloat16 with f32 sums: for GPUs of 2020 and later.
    #[default]
    Bf16,
    /// float32.
    F32,
}

fn max_length() -> usize {
    2048
}

pub(super) fn train(
    ctx: &StepContext,
    params: &Params,
    spec: &CommandSpec,
) -> Result<StepOutcome, StepError> {
    params.plain_only(ctx, spec.trainer.name())?;
    let chats: Vec<ChatRow> = read_jsonl(&ctx.input("messages")?.path)?;
    let folder = ctx.resume_dir()?;
    // The program works elsewhere.
    let folder = &std::path::absolute(folder).map_err(|e| StepError::io(folder, &e))?;
    let base = base_name(params, spec)?;
    let revision = revision(ctx, params, spec)?;
    super::check(&chats)?;
    let job = Job::new(params, spec, (base, revision), spec.trainer.rows(&chats))?;
    let out = folder.join(OUT);
    let turn = process::Turn::take(folder, &ctx.cancel, &|| {
        let text = "the program of an attempt that was killed is still at work: waiting for it";
        ctx.reporter.warning(text);
    })?;
    if let Ok(found) = collect::collect(&out, spec.trainer.name())
        && found.checkpoints.len() == params.epochs
    {
        ctx.reporter
            .log("an earlier attempt has trained to the end");
        return take_over(ctx, params, spec, &found);
    }
    let from = spec.trainer.goes_on_from(&out);
    match &from {
        Some(checkpoint) => ctx
            .reporter
            .log(&format!("going on from {}", checkpoint.display())),
        // What is half done would pass for a checkpoint of this attempt.
        None if out.exists() => {
            std::fs::remove_dir_all(&out).map_err(|e| StepError::io(&out, &e))?;
        }
        None => {}
    }
    let told = params.model.chat_template_kwargs();
    if told.is_some() && !spec.trainer.tells_the_template() {
        ctx.reporter.warning(&format!(
            "{} is not told the model's `chat_template_kwargs`: say with `backend.command.config`, \
             in its own words, what prompts it is to train on",
            spec.trainer.name()
        ));
    }
    spec.trainer.write_data(folder, &chats, told)?;
    let config = spec.trainer.write_config(folder, &job, from.as_deref())?;
    let argv = spec.trainer.argv(spec.program.as_deref(), &config);
    let lines = |line: &str| {
        ctx.reporter.log(line);
        if let Some((step, text)) = collect::progress(line, params.epochs, job.steps()) {
            ctx.reporter
                .progress(step, job.steps() as u64, "steps", &text);
        }
    };
    let mut env = ctx.world.env.clone();
    if let Some(program) = argv.first() {
        beside_it_first(&mut env, Path::new(program));
    }
    env.extend(spec.env.clone());
    process::run(&argv, turn, folder, &env, &lines, &ctx.cancel)?;
    let found = collect::collect(&out, spec.trainer.name())?;
    take_over(ctx, params, spec, &found)
}

/// Puts the program's own folder first in PATH, as activating its virtual environment would: axolotl
/// starts `accelerate` by name, and a program's neighbours are those that it was installed with.
fn beside_it_first(env: &mut BTreeMap<String, String>, program: &Path) {
    let Some(folder) = program.parent().filter(|_| program.is_absolute()) else {
        return;
    };
    let mut path = folder.to_string_lossy().into_owned();
    if let Some(rest) = env.get("PATH").filter(|rest| !rest.is_empty()) {
        // `/usr/bin/env` is not to come before an environment that is activated.
        if std::env::split_paths(rest).any(|one| one == folder) {
            return;
        }
        path = format!("{path}:{rest}");
    }
    env.insert("PATH".to_owned(), path);
}

/// Makes the program's checkpoints the step's own.
fn take_over(
    ctx: &StepContext,
    params: &Params,
    spec: &CommandSpec,
    collected: &Collected,
) -> Result<StepOutcome, StepError> {
    let base = base_id(ctx, params)?;
    let told = spec.told(&params.model);
    Checkpoint::base().save(&ctx.output("base"))?;
    let mut labels = Vec::new();
    for found in &collected.checkpoints {
        let checkpoint = Checkpoint {
            chat_template_kwargs: told.clone(),
            ..Checkpoint::of_adapter(&found.folder, found.epoch, found.step, &base)?
        };
        let to = ctx.output_item("checkpoints", &checkpoint.name)?;
        for file in collect::FILES {
            folder::copy(&found.folder.join(file), &to.join(file))?;
        }
        checkpoint.save(&to)?;
        labels.push(checkpoint.name);
    }
    if labels.len() != params.epochs {
        ctx.reporter.warning(&format!(
            "the program left {} checkpoints for {} epochs",
            labels.len(),
            params.epochs
        ));
    }
    write_json(&ctx.output("loss"), &collected.losses)?;
    let last = collected.losses.last();
    Ok(StepOutcome::default()
        .list("checkpoints", labels)
        .metric("steps", collected.steps())
        .metric("loss", last.map_or(Value::Null, |point| point.loss.into())))
}

/// The model as the program names it.
fn base_name(params: &Params, spec: &CommandSpec) -> Result<String, StepError> {
    let own = match &params.model {
        ModelSpec::OpenAi(model) => Some(model.model.clone()),
        ModelSpec::Embedded(model) => model.weights.hf.clone(),
        ModelSpec::SentenceEncoder(_) => None,
    };
    spec.base.clone().or(own).ok_or_else(|| {
        let name = params.model.name();
        StepError::invalid(format!("`backend.command.base` is missing: `{name}` is no name of a model that other programs know"))
            .help("give a repository of the Hugging Face hub, or a folder with the same model")
    })
}

/// The revision of the model as the program is told it. A branch of the student's own weights is
/// the commit that the step's key names: the program would look it up anew, and train another.
fn revision(
    ctx: &StepContext,
    params: &Params,
    spec: &CommandSpec,
) -> Result<Option<String>, StepError> {
    let ModelSpec::Embedded(model) = &params.model else {
        return Ok(spec.revision.clone());
    };
    let is_own = spec.base.is_none() || spec.base == model.weights.hf;
    if spec.revision.is_some() || model.weights.hf.is_none() || !is_own {
        return Ok(spec.revision.clone());
    }
    Ok(model.weights.pinned(&ctx.world)?.revision)
}

/// What the checkpoints say that they were trained on.
fn base_id(ctx: &StepContext, params: &Params) -> Result<String, StepError> {
    match &params.model {
        ModelSpec::OpenAi(model) => Ok(model.model.clone()),
        ModelSpec::Embedded(model) => {
            let host = Host::from(ctx);
            Ok(model.weights.locate(host.world, host.cancel)?.digest)
        }
        ModelSpec::SentenceEncoder(_) => Err(StepError::invalid(
            "a `sentence-encoder` cannot be fine-tuned",
        )),
    }
}

/// The fields of `more` over those of `config`.
fn merged(mut config: Map<String, Value>, more: &BTreeMap<String, Value>) -> Map<String, Value> {
    config.extend(more.clone());
    config
}

fn write_yaml(path: &Path, config: &Map<String, Value>) -> Result<(), StepError> {
    let text = serde_yaml::to_string(config)
        .map_err(|e| StepError::failed(format!("{}: {e}", path.display())))?;
    std::fs::write(path, text).map_err(|e| StepError::io(path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_finds_its_neighbours_first() {
        let mut env = BTreeMap::from([("PATH".to_owned(), "/usr/bin".to_owned())]);
        beside_it_first(&mut env, Path::new("trl"));
        beside_it_first(&mut env, Path::new("bin/trl"));
        beside_it_first(&mut env, Path::new("/usr/bin/env"));
        assert_eq!(env["PATH"], "/usr/bin");
        beside_it_first(&mut env, Path::new("/opt/trl/bin/trl"));
        assert_eq!(env["PATH"], "/opt/trl/bin:/usr/bin");
        env.clear();
        beside_it_first(&mut env, Path::new("/opt/trl/bin/trl"));
        assert_eq!(env["PATH"], "/opt/trl/bin");
    }
}
