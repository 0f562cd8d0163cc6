//! What vLLM makes of an adapter that a training declares. Ray Serve LLM runs it too.
//!
//! Source: vLLM 0.32, whose `PEFTHelper` refuses activated adapters, DoRA, saved modules, repeated
//! layers and changed base weights, and ranks above `--max-lora-rank` (16 where nothing is said).

use flowrun_engine::finding::{Finding, Severity};

use super::Training;
pub(super) use crate::finetune::declared::Beyond;

/// The highest rank that vLLM takes where it is not told another.
pub(super) const USUAL_RANK: u64 = 16;
/// The highest that it can be told.
pub(super) const HIGHEST_RANK: u64 = 512;
/// Modules of the models that most servers have; others depend on the model.
const MODULES: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
];
const PLAIN: &str = "train plain LoRA for it";

/// What vLLM, which `whose` names, refuses of what a training makes. `severity` is how certain it
/// is that it is vLLM.
pub(super) fn refused(training: &Training<'_>, whose: &str, severity: Severity) -> Vec<Finding> {
    let beyond = training.declared.beyond.iter().map(|said| {
        let word = said.value.word();
        let message = match severity {
            Severity::Error => format!("{whose}, which is vLLM, does not load {word}"),
            Severity::Warning => format!("{whose} does not load {word} if it is vLLM"),
        };
        training.finding(severity, &said.path, message, PLAIN)
    });
    beyond.collect()
}

/// A rank above the highest that there is room for.
pub(super) fn rank_above(
    training: &Training<'_>,
    highest: u64,
    severity: Severity,
    message: impl FnOnce(u64) -> String,
    help: &str,
) -> Option<Finding> {
    let rank = training.declared.rank.as_ref()?;
    let above = rank.value > highest;
    above.then(|| training.finding(severity, &rank.path, message(rank.value), help))
}

/// Modules that not every model adapts at vLLM.
pub(super) fn unusual_modules(training: &Training<'_>, whose: &str) -> Option<Finding> {
    let modules = training.declared.modules.as_ref()?;
    let is_usual = |module: &&String| MODULES.contains(&module.as_str());
    let odd = modules.value.iter().find(|module| !is_usual(module))?;
    Some(training.finding(
        Severity::Warning,
        &modules.path,
        format!(
            "{whose}, which is vLLM, may not load adapters of `{odd}`: it depends on the model"
        ),
        "name linear layers of attention and MLP, such as `q_proj`",
    ))
}
