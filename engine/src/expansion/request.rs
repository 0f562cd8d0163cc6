//! [`ActionRequest`]: one action of a step, with everything resolved.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use flowrun_cache::{Artifact, OutputRecord, OutputValue};
use serde_json::Value;

use super::Expansion;
use super::items::Item;
use super::made::Parting;
use crate::pipeline::{Action, Source, StepNode};
use crate::step::StepError;

/// One action of a step, with everything resolved.
#[derive(Clone)]
pub(crate) struct ActionRequest {
    /// `step`, or `step[label]`.
    pub(crate) id: String,
    /// Label within the fan-out; of several levels one for each, joined by `/`.
    pub(crate) label: Option<String>,
    pub(crate) node: Arc<StepNode>,
    pub(crate) params: Value,
    pub(crate) key_params: Value,
    pub(crate) env: BTreeMap<String, String>,
    /// The shell command of a `run` step.
    pub(crate) command: Option<String>,
    /// Output port to a path in the project.
    pub(crate) publish: BTreeMap<String, String>,
    pub(crate) inputs: BTreeMap<String, PortInputs>,
}

/// The artifacts of one input port.
#[derive(Clone, PartialEq)]
pub(crate) struct PortInputs {
    /// Several artifacts may come: they lie in a folder, however many there are.
    pub(crate) list: bool,
    pub(crate) entries: Vec<Entry>,
}

/// One artifact for an input port.
#[derive(Clone, PartialEq)]
pub(crate) enum Entry {
    Artifact { artifact: Artifact, label: String },
    File(PathBuf),
}

impl ActionRequest {
    /// Would do the same work.
    pub(crate) fn same_work(&self, other: &Self) -> bool {
        self.id == other.id
            && self.params == other.params
            && self.key_params == other.key_params
            && self.env == other.env
            && self.command == other.command
            && self.inputs == other.inputs
    }
}

/// The kind of a step as users read it.
pub(crate) fn kind_of(node: &StepNode) -> &str {
    match &node.action {
        Action::Uses(step) => step.kind(),
        Action::Run(_) => "run",
    }
}

impl<F: Fn(&str, &str) -> Option<OutputRecord>> Expansion<'_, F> {
    /// The action of an item.
    pub(super) fn request(&self, item: &Item) -> Result<ActionRequest, StepError> {
        self.check_params(item)?;
        let node = self.node;
        let resolve = |value: &Value| {
            if item.binding.is_empty() {
                return Ok(value.clone());
            }
            (self.expressions.resolve_item)(value, &item.names.values)
                .map_err(|e| StepError::invalid(format!("`{}`: {e}", node.name)))
        };
        let resolve_text = |text: &String| {
            resolve(&Value::String(text.clone())).map(|value| match value {
                Value::String(text) => text,
                other => other.to_string(),
            })
        };
        let resolve_map = |map: &BTreeMap<String, String>| {
            map.iter()
                .map(|(name, text)| Ok((name.clone(), resolve_text(text)?)))
                .collect::<Result<BTreeMap<_, _>, StepError>>()
        };
        let mut inputs = BTreeMap::new();
        for (port, sources) in &node.inputs {
            let given = self.port(port, sources, item)?;
            // What it reads was not made: it works without.
            if !given.entries.is_empty() || given.list || !node.may_lack(port) {
                inputs.insert(port.clone(), given);
            }
        }
        Ok(ActionRequest {
            id: match &item.label {
                Some(label) => format!("{}[{label}]", node.name),
                None => node.name.clone(),
            },
            label: item.label.clone(),
            node: Arc::clone(node),
            params: resolve(&node.params)?,
            key_params: resolve(&node.key_params)?,
            env: resolve_map(&node.env)?,
            command: match &node.action {
                Action::Run(command) => Some(resolve_text(command)?),
                Action::Uses(_) => None,
            },
            publish: resolve_map(&node.publish)?,
            inputs,
        })
    }

    fn port(&self, port: &str, sources: &[Source], item: &Item) -> Result<PortInputs, StepError> {
        let mut list = sources.len() > 1 || self.node.lists.contains(port);
        if let Action::Uses(step) = &self.node.action {
            list = step.inputs().iter().any(|p| p.name == port && p.many);
        }
        let mut entries = Vec::new();
        // One artifact by itself is what the port says: how the output is called that gives it is
        // nothing to the step, and in no key.
        let entry = |(artifact, label): (Artifact, String), list: bool| Entry::Artifact {
            artifact,
            label: if list { label } else { port.to_owned() },
        };
        for source in sources {
            match source {
                Source::File(path) => entries.push(Entry::File(path.clone())),
                Source::Item(var) => {
                    let (artifact, label) = self.artifact_of(var, item)?;
                    entries.push(Entry::Artifact { artifact, label });
                }
                Source::Output { step, output } | Source::Sibling { step, output, .. }
                    if self.node.may_lack(port) && self.made.record(step, output).is_none() => {}
                Source::Output { step, output } => {
                    if matches!(self.record(step, output)?.value, OutputValue::List(_)) {
                        list = true;
                    }
                    let elements = self.elements(std::slice::from_ref(source), item)?;
                    entries.extend(elements.into_iter().map(|found| entry(found, list)));
                }
                Source::Sibling {
                    step,
                    output,
                    levels,
                    many,
                } => {
                    let (levels, many) = (*levels, *many);
                    list |= many;
                    let found = self.of_sibling(step, output, Parting { levels, many }, item)?;
                    if found.is_empty() && !many && !self.node.may_lack(port) {
                        return Err(self.not_made(step, output));
                    }
                    entries.extend(found.into_iter().map(|found| entry(found, list)));
                }
            }
        }
        Ok(PortInputs { list, entries })
    }
}
