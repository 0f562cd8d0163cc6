//! Turns a step into its items, once everything before it is done.

use std::collections::BTreeMap;
use std::path::PathBuf;

use flowrun_cache::{Artifact, OutputRecord, OutputValue};
use serde_json::{Value, json};

use super::Expressions;
use super::action::BoundInput;
use crate::pipeline::{Foreach, ForeachList, Source, StepNode};
use crate::step::StepError;

/// One item of a step; a step without `foreach` has one, without a label.
pub(super) struct Item {
    /// Label within the fan-out.
    pub(super) label: Option<String>,
    pub(super) params: Value,
    pub(super) key_params: Value,
    pub(super) env: BTreeMap<String, String>,
    inputs: BTreeMap<String, Vec<Bound>>,
}

#[derive(Clone)]
enum Bound {
    Artifact(Element),
    File(PathBuf),
}

/// An artifact with its name.
#[derive(Clone)]
struct Element {
    artifact: Artifact,
    label: String,
    listed: bool,
}

/// What a `foreach` variable is in one item.
#[derive(Clone)]
enum Bindable {
    Artifact(Element),
    Value(Value),
}

impl Item {
    /// `step`, or `step[label]`.
    pub(super) fn id(&self, step: &str) -> String {
        match &self.label {
            Some(label) => format!("{step}[{label}]"),
            None => step.to_owned(),
        }
    }

    /// The inputs for one action.
    pub(super) fn bind(&self) -> BTreeMap<String, Vec<BoundInput>> {
        let bind = |bound: &Bound| match bound.clone() {
            Bound::File(path) => BoundInput::File(path),
            Bound::Artifact(Element {
                artifact,
                label,
                listed,
            }) => BoundInput::Artifact {
                artifact,
                label,
                listed,
            },
        };
        self.inputs
            .iter()
            .map(|(port, l)| (port.clone(), l.iter().map(bind).collect()))
            .collect()
    }
}

/// The items of a step, or `None` when its `when` is false.
pub(super) fn expand(
    node: &StepNode,
    expressions: &Expressions,
    output: impl Fn(&str, &str) -> Option<OutputRecord>,
) -> Result<Option<Vec<Item>>, StepError> {
    if let Some(when) = &node.when
        && !(expressions.eval_bool)(when, &json!({}))
            .map_err(|e| StepError::invalid(format!("`when` of `{}`: {e}", node.name)))?
    {
        return Ok(None);
    }
    let bindings = match &node.foreach {
        None => vec![BTreeMap::new()],
        Some(foreach) => zip(node, foreach, &output)?,
    };
    let items = bindings
        .into_iter()
        .map(|binding| item(node, expressions, &output, &binding));
    items.collect::<Result<_, _>>().map(Some)
}

fn zip(
    node: &StepNode,
    foreach: &Foreach,
    output: &impl Fn(&str, &str) -> Option<OutputRecord>,
) -> Result<Vec<BTreeMap<String, Bindable>>, StepError> {
    let mut lists: Vec<(&String, Vec<Bindable>)> = Vec::new();
    for (var, list) in &foreach.vars {
        let values = match list {
            ForeachList::Values(values) => values.iter().cloned().map(Bindable::Value).collect(),
            ForeachList::Artifacts(sources) => {
                let mut all = Vec::new();
                for source in sources {
                    all.extend(
                        elements(node, source, output)?
                            .into_iter()
                            .map(Bindable::Artifact),
                    );
                }
                all
            }
        };
        lists.push((var, values));
    }
    let lengths: Vec<usize> = lists.iter().map(|(_, l)| l.len()).collect();
    if lengths.windows(2).any(|w| w[0] != w[1]) {
        let sizes: Vec<String> = lists
            .iter()
            .map(|(var, l)| format!("`{var}` has {}", l.len()))
            .collect();
        return Err(StepError::invalid(format!(
            "`{}` walks lists of different lengths: {}",
            node.name,
            sizes.join(", ")
        ))
        .help("the variables of one `foreach` are walked in step"));
    }
    let len = lengths.first().copied().unwrap_or(0);
    Ok((0..len)
        .map(|i| {
            lists
                .iter()
                .map(|(var, l)| ((*var).clone(), l[i].clone()))
                .collect()
        })
        .collect())
}

fn item(
    node: &StepNode,
    expressions: &Expressions,
    output: &impl Fn(&str, &str) -> Option<OutputRecord>,
    binding: &BTreeMap<String, Bindable>,
) -> Result<Item, StepError> {
    let names: BTreeMap<String, Value> = binding
        .iter()
        .map(|(var, b)| (var.clone(), b.value()))
        .collect();
    let resolve = |value: &Value| {
        if binding.is_empty() {
            return Ok(value.clone());
        }
        (expressions.resolve_item)(value, &names)
            .map_err(|e| StepError::invalid(format!("params of `{}`: {e}", node.name)))
    };
    let mut inputs = BTreeMap::new();
    for (port, sources) in &node.inputs {
        let mut bound = Vec::new();
        for source in sources {
            match source {
                Source::File(path) => bound.push(Bound::File(path.clone())),
                Source::Item(var) => match binding.get(var) {
                    Some(Bindable::Artifact(element)) => {
                        bound.push(Bound::Artifact(Element {
                            listed: true,
                            ..element.clone()
                        }));
                    }
                    _ => {
                        return Err(StepError::invalid(format!(
                            "input `{port}` of `{}` needs an artifact, but `item.{var}` is a value",
                            node.name
                        )));
                    }
                },
                Source::Output { .. } => {
                    bound.extend(
                        elements(node, source, output)?
                            .into_iter()
                            .map(Bound::Artifact),
                    );
                }
            }
        }
        inputs.insert(port.clone(), bound);
    }
    let mut env = BTreeMap::new();
    for (name, value) in &node.env {
        let value = resolve(&Value::String(value.clone()))?;
        env.insert(
            name.clone(),
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned),
        );
    }
    Ok(Item {
        label: binding.values().next().map(Bindable::label),
        params: resolve(&node.params)?,
        key_params: resolve(&node.key_params)?,
        env,
        inputs,
    })
}

fn elements(
    node: &StepNode,
    source: &Source,
    output: &impl Fn(&str, &str) -> Option<OutputRecord>,
) -> Result<Vec<Element>, StepError> {
    let Source::Output { step, output: port } = source else {
        return Ok(Vec::new());
    };
    let record = output(step, port).ok_or_else(|| {
        StepError::invalid(format!(
            "`{}` needs `{step}.{port}`, which was not made",
            node.name
        ))
    })?;
    Ok(match record.value {
        OutputValue::One(artifact) => {
            vec![Element {
                artifact,
                label: port.clone(),
                listed: false,
            }]
        }
        OutputValue::List(items) => items
            .into_iter()
            .map(|i| Element {
                artifact: i.artifact,
                label: i.label,
                listed: true,
            })
            .collect(),
    })
}

impl Bindable {
    fn value(&self) -> Value {
        match self {
            Self::Artifact(element) => Value::String(element.label.clone()),
            Self::Value(value) => value.clone(),
        }
    }

    fn label(&self) -> String {
        match self.value() {
            Value::String(text) => text,
            other => other.to_string(),
        }
    }
}
