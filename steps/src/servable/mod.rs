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
//! no checkpoint can be served; what depends on more, a `when` included, is a warning.

mod asked;
mod deployed;
mod plain;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use flowrun_engine::dag::required_predecessors;
use flowrun_engine::finding::{Finding, Severity};
use flowrun_engine::pipeline::{Action, ForeachList, Source, StepNode};

use crate::finetune::declared::{Declared, declared, is_open};
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
    let left_out = may_be_left_out(steps);
    let mut found = Vec::new();
    let mut trainings = BTreeMap::new();
    for step in steps.iter().filter(|step| kind(step) == Some(FINETUNE)) {
        if let Some(declared) = declared(&step.params) {
            let training = Training {
                step: &step.name,
                declared,
            };
            let open = left_out.contains(training.step);
            found.extend(training.itself().into_iter().map(|one| softened(one, open)));
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
        let given = Some(&step.params["model"]).filter(|model| !is_open(model));
        let model: Option<ModelSpec> =
            given.and_then(|model| serde_json::from_value(model.clone()).ok());
        let open = left_out.contains(step.name.as_str());
        let mut names = BTreeMap::new();
        let mut seen = BTreeSet::new();
        trained_by(step, open, &by_name, &left_out, &mut seen, &mut names);
        let asked: Vec<(&Training<'_>, bool)> = names
            .iter()
            .filter_map(|(name, open)| Some((trainings.get(name)?, *open)))
            .collect();
        if let Some(model) = &model {
            for (training, open) in &asked {
                let all = asked::check(step, model, training).into_iter();
                found.extend(all.map(|one| softened(one, *open)));
            }
        }
        if kind(step) == Some(DEPLOY) {
            let all = deployed::check(step, model.as_ref(), &asked).into_iter();
            found.extend(all.map(|one| softened(one, open)));
        }
    }
    found
}

/// The steps that a run may leave out: for a condition, or with a step that they cannot do without.
fn may_be_left_out(steps: &[StepNode]) -> BTreeSet<&str> {
    let concerns = |step: &StepNode| matches!(kind(step), Some(FINETUNE | DEPLOY));
    let mut open: Vec<&str> = steps
        .iter()
        .filter(|step| has_condition(step))
        .map(|step| step.name.as_str())
        .collect();
    let mut all = BTreeSet::new();
    if open.is_empty() || !steps.iter().any(concerns) {
        return all;
    }
    let mut after: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for step in steps {
        for before in required_predecessors(step) {
            after.entry(before).or_default().push(&step.name);
        }
    }
    while let Some(name) = open.pop() {
        if all.insert(name) {
            open.extend(after.get(name).into_iter().flatten().copied());
        }
    }
    all
}

/// It, or some of its items, may be left out.
fn has_condition(step: &StepNode) -> bool {
    let levels = step.foreach.iter().flat_map(|each| &each.levels);
    let of_items = levels.flat_map(|level| &level.conditions);
    step.when.iter().chain(of_items).any(|text| text != "true")
}

/// A finding about what `may_be_left_out` is no error.
fn softened(finding: Finding, may_be_left_out: bool) -> Finding {
    let severity = match may_be_left_out {
        true => Severity::Warning,
        false => finding.severity,
    };
    Finding {
        severity,
        ..finding
    }
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

/// Adds the trainings whose checkpoints reach the adapters that `step` is given, each with whether
/// something on the way, as `open` says of `step`, may be left out.
fn trained_by<'a>(
    step: &'a StepNode,
    open: bool,
    by_name: &BTreeMap<&str, &'a StepNode>,
    left_out: &BTreeSet<&str>,
    seen: &mut BTreeSet<&'a str>,
    names: &mut BTreeMap<&'a str, bool>,
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
        let open = open || left_out.contains(from.name.as_str());
        match kind(from) {
            Some(FINETUNE) if output == CHECKPOINTS => {
                // A way on which nothing is left out decides.
                let known = names.entry(&from.name).or_insert(open);
                *known &= open;
            }
            // The student as it was is served by anything.
            Some(FINETUNE) | None => {}
            Some(_) => trained_by(from, open, by_name, left_out, seen, names),
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
