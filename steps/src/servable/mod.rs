//! Whether what a pipeline trains can be served by those that it names: the servers that its steps
//! ask, and the targets that it deploys to. Told by `check`, before hours of training.
//!
//! | file | what |
//! |---|---|
//! | `mod` | which step asks for the checkpoints of which training, and with what |
//! | `asked` | what a model entry answers as |
//! | `deployed` | what a target's files can load |
//! | `plain` | what vLLM makes of an adapter |
//!
//! Knows only what params declare: what an expression over `item`, a file of the project or a
//! server's own settings decide is no matter of this check. Invariant: an error is said only where
//! no checkpoint can be served; what depends on more is a warning.

mod asked;
mod deployed;
mod plain;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use flowrun_engine::finding::{Finding, Severity};
use flowrun_engine::pipeline::{Action, ForeachList, Source, StepNode};

use crate::finetune::declared::{Declared, declared};
use crate::models::ModelSpec;

/// The kind that trains, and its output of what it trained.
const FINETUNE: &str = "finetune";
const CHECKPOINTS: &str = "checkpoints";
/// The type of such outputs, and of the inputs that take them.
const ADAPTER: &str = "adapter";
/// The kind that serves.
const DEPLOY: &str = "deploy";

/// What may keep the steps of a pipeline from serving what it trains.
pub(crate) fn check(steps: &[StepNode]) -> Vec<Finding> {
    let by_name: BTreeMap<&str, &StepNode> = steps
        .iter()
        .map(|step| (step.name.as_str(), step))
        .collect();
    let mut found = Vec::new();
    let mut trainings = BTreeMap::new();
    for step in steps.iter().filter(|step| kind(step) == Some(FINETUNE)) {
        if let Some(declared) = declared(&step.params) {
            let training = Training {
                step: &step.name,
                declared,
            };
            found.extend(training.itself());
            trainings.insert(step.name.as_str(), training);
        }
    }
    // A pipeline may have very many steps that this is no matter of.
    let concerns = |kind: &'static str| match kind {
        FINETUNE => false,
        DEPLOY => true,
        _ => !trainings.is_empty(),
    };
    for step in steps.iter().filter(|step| kind(step).is_some_and(concerns)) {
        let model: Option<ModelSpec> = serde_json::from_value(step.params["model"].clone()).ok();
        let mut names = BTreeSet::new();
        trained_by(step, &by_name, &mut BTreeSet::new(), &mut names);
        let asked: Vec<&Training<'_>> = names
            .iter()
            .filter_map(|name| trainings.get(name))
            .collect();
        if let Some(model) = &model {
            found.extend(asked.iter().flat_map(|one| asked::check(step, model, one)));
        }
        if kind(step) == Some(DEPLOY) {
            found.extend(deployed::check(step, model.as_ref(), &asked));
        }
    }
    found
}

/// A training, and what it says of its checkpoints.
struct Training<'a> {
    step: &'a str,
    declared: Declared,
}

impl Training<'_> {
    /// What is wrong with it whoever asks for it.
    fn itself(&self) -> Vec<Finding> {
        let refused = self.declared.refused.iter().map(|said| Finding {
            severity: Severity::Error,
            step: self.step.to_owned(),
            path: said.path.clone(),
            code: "not-trained",
            message: said.value.message.clone(),
            help: said.value.help.clone(),
        });
        refused.collect()
    }

    /// A finding about what it says at `path`.
    fn finding(&self, severity: Severity, path: &[String], message: String, help: &str) -> Finding {
        Finding {
            severity,
            step: self.step.to_owned(),
            path: path.to_vec(),
            code: "not-served",
            message,
            help: help.to_owned(),
        }
    }
}

/// A finding about what a step that asks says.
fn of_asker(
    severity: Severity,
    step: &StepNode,
    field: &str,
    message: String,
    help: &str,
) -> Finding {
    Finding {
        severity,
        step: step.name.clone(),
        path: vec!["with".to_owned(), field.to_owned()],
        code: "not-served",
        message,
        help: help.to_owned(),
    }
}

fn kind(step: &StepNode) -> Option<&'static str> {
    match &step.action {
        Action::Uses(kind) => Some(kind.kind()),
        Action::Run(_) => None,
    }
}

/// Adds the trainings whose checkpoints reach the adapters that `step` is given.
fn trained_by<'a>(
    step: &'a StepNode,
    by_name: &BTreeMap<&str, &'a StepNode>,
    seen: &mut BTreeSet<&'a str>,
    names: &mut BTreeSet<&'a str>,
) {
    if !seen.insert(&step.name) {
        return;
    }
    for source in adapters_of(step) {
        let (Source::Output { step: from, output }
        | Source::Sibling {
            step: from, output, ..
        }) = source
        else {
            continue;
        };
        let Some(from) = by_name.get(from.as_str()) else {
            continue;
        };
        match kind(from) {
            Some(FINETUNE) if output == CHECKPOINTS => {
                names.insert(&from.name);
            }
            // The student as it was is served by anything.
            Some(FINETUNE) | None => {}
            Some(_) => trained_by(from, by_name, seen, names),
        }
    }
}

/// The sources of its adapters, those that it walks included.
fn adapters_of(step: &StepNode) -> Vec<&Source> {
    let Action::Uses(kind) = &step.action else {
        return Vec::new();
    };
    let ports = kind.inputs();
    let takes = |name: &str| {
        ports
            .iter()
            .any(|port| port.name == name && port.ty == ADAPTER)
    };
    let given = step.inputs.iter().filter(|(port, _)| takes(port));
    let mut all = Vec::new();
    for source in given.flat_map(|(_, sources)| sources) {
        let Source::Item(variable) = source else {
            all.push(source);
            continue;
        };
        let walked = step.foreach.as_ref().and_then(|each| each.list(variable));
        if let Some(ForeachList::Artifacts(sources)) = walked {
            all.extend(sources);
        }
    }
    all
}
