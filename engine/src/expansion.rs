//! [`expand`]: turns a step into its actions, once the outputs before it are
//! known. A step without `foreach` has one action, without a label.
//!
//! Knows no cache: what it makes is a list of [`ActionRequest`]s.

mod condition;
mod made;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use flowrun_cache::{Artifact, ListItem, OutputRecord, OutputValue};
use serde_json::{Value, json};

use condition::words;
pub(crate) use condition::{asks_for_item, names_one_of};
use made::Made;

use crate::pipeline::{Action, ForeachList, Pipeline, Source, StepNode};
use crate::step::StepError;

/// Characters of an item's value in its label.
const LABEL: usize = 40;

/// How expressions that need run-time values are evaluated. The engine's
/// language half gives both.
#[derive(Clone, Copy)]
pub struct Expressions {
    /// Fills `${{ … item … }}` in a value.
    pub resolve_item: fn(&Value, &BTreeMap<String, Value>) -> Result<Value, String>,
    /// Evaluates a condition over a context object.
    pub eval_bool: fn(&str, &Value) -> Result<bool, String>,
}

impl std::fmt::Debug for Expressions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Expressions")
    }
}

/// One action of a step, with everything resolved.
#[derive(Clone)]
pub(crate) struct ActionRequest {
    /// `step`, or `step[label]`.
    pub(crate) id: String,
    /// Label within the fan-out.
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

/// The actions of a step, or `None` when its `when` is false. `output` gives
/// the outputs of the steps before it.
///
/// # Errors
/// Lists of different lengths, an expression that cannot be evaluated, two
/// items that would publish to one path.
pub(crate) fn expand(
    pipeline: &Pipeline,
    node: &Arc<StepNode>,
    expressions: &Expressions,
    output: impl Fn(&str, &str) -> Option<OutputRecord>,
) -> Result<Option<Vec<ActionRequest>>, StepError> {
    let expansion = Expansion {
        pipeline,
        node,
        expressions,
        made: Made::new(output),
    };
    let conditions = expansion.conditions();
    if !expansion.all_hold(&conditions.at_once, None)? {
        return Ok(None);
    }
    let mut requests = Vec::new();
    let mut ids = BTreeSet::new();
    for binding in expansion.bindings()? {
        // Of every item, so that one that is left out renames no other.
        let label = expansion.label(&binding, &mut ids);
        let item = Item {
            names: expansion.names(&binding),
            walked: label.clone().unwrap_or_default(),
            label,
            binding,
        };
        // Of an item that is left out nothing else need be there.
        if !expansion.all_hold(&conditions.by_item, Some(&item.names))? {
            continue;
        }
        for item in expansion.within(item)? {
            if expansion.all_hold(&conditions.within, Some(&item.names))? {
                requests.push(expansion.request(&item)?);
            }
        }
    }
    check_publish(node, &requests)?;
    Ok(Some(requests))
}

/// The outputs of a fan-out: a list for each port, in the order of the items.
/// An item's own list is put in its place, labels joined by `/`.
pub(crate) fn gather(
    node: &StepNode,
    ends: &[(Option<&str>, &BTreeMap<String, OutputRecord>)],
) -> BTreeMap<String, OutputRecord> {
    let port = |name: &str, ty: &str| {
        let mut list = Vec::new();
        for (label, outputs) in ends {
            let label = label.unwrap_or_default();
            match outputs.get(name).map(|o| &o.value) {
                Some(OutputValue::One(artifact)) => list.push(ListItem {
                    label: label.to_owned(),
                    artifact: artifact.clone(),
                }),
                Some(OutputValue::List(inner)) => list.extend(inner.iter().map(|i| ListItem {
                    label: format!("{label}/{}", i.label),
                    artifact: i.artifact.clone(),
                })),
                None => {}
            }
        }
        OutputRecord {
            ty: ty.to_owned(),
            value: OutputValue::List(list),
        }
    };
    let ports = node.outputs.iter();
    ports
        .map(|p| (p.name.clone(), port(&p.name, &p.ty)))
        .collect()
}

/// What the `foreach` variables are in one item.
type Binding = BTreeMap<String, Bound>;

/// One item of a fan-out; of a step without `foreach` the only one.
struct Item {
    binding: Binding,
    names: Names,
    label: Option<String>,
    /// Its label among those of the walker: what the steps beside this one have it by.
    walked: String,
}

/// What expressions see as `item`.
#[derive(Clone)]
struct Names {
    values: BTreeMap<String, Value>,
    /// The variables that cannot be filled in for this item, and why: that may be the reason to
    /// leave it out.
    failed: BTreeMap<String, StepError>,
}

impl Names {
    /// Why an expression cannot be evaluated: it names a variable that could not be filled in.
    fn failure(&self, expression: &str) -> Option<&StepError> {
        if self.failed.is_empty() {
            return None;
        }
        words(expression).find_map(|word| self.failed.get(word))
    }
}

/// The conditions of a step, by when they are asked.
#[derive(Default)]
struct Conditions<'a> {
    at_once: Vec<&'a str>,
    /// For each item; where the step walks lists of its own, for the item around them.
    by_item: Vec<&'a str>,
    /// For each item of the lists that the step itself walks within an item of its walker.
    within: Vec<&'a str>,
}

#[derive(Clone)]
enum Bound {
    Artifact { artifact: Artifact, label: String },
    Value(Value),
}

struct Expansion<'a, F> {
    pipeline: &'a Pipeline,
    node: &'a Arc<StepNode>,
    expressions: &'a Expressions,
    made: Made<F>,
}

impl<F: Fn(&str, &str) -> Option<OutputRecord>> Expansion<'_, F> {
    fn conditions(&self) -> Conditions<'_> {
        let mut all = Conditions::default();
        let own = self.node.when.as_deref();
        let Some(foreach) = &self.node.foreach else {
            all.at_once.extend(own);
            return all;
        };
        all.by_item
            .extend(foreach.conditions.iter().map(String::as_str));
        match own {
            Some(when) if !asks_for_item(when) => all.at_once.push(when),
            Some(when) if names_one_of(when, &foreach.inner) => all.within.push(when),
            Some(when) if !all.by_item.contains(&when) => all.by_item.push(when),
            _ => {}
        }
        all
    }

    /// Conditions are asked in order, up to the first that is false.
    fn all_hold(&self, conditions: &[&str], item: Option<&Names>) -> Result<bool, StepError> {
        if conditions.is_empty() {
            return Ok(true);
        }
        let mut context = json!({
            "params": self.pipeline.params,
            "models": self.pipeline.models,
            "run": { "name": self.pipeline.name },
        });
        if let Some(names) = item {
            context["item"] = json!(names.values);
        }
        for when in conditions {
            if let Some(error) = item.and_then(|names| names.failure(when)) {
                return Err(error.clone());
            }
            let holds = (self.expressions.eval_bool)(when, &context);
            if !holds
                .map_err(|e| StepError::invalid(format!("`when` of `{}`: {e}", self.node.name)))?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What expressions see as `item`: values as they are, artifacts by label, and the params of a
    /// definition that follow from them.
    fn names(&self, binding: &Binding) -> Names {
        let values = binding.iter();
        let values = values.map(|(var, bound)| (var.clone(), bound.value()));
        let mut names = Names {
            values: values.collect(),
            failed: BTreeMap::new(),
        };
        let foreach = self.node.foreach.iter();
        for (variable, value) in foreach.flat_map(|f| f.bound.iter().chain(&f.handed)) {
            match (self.expressions.resolve_item)(value, &names.values) {
                Ok(value) => {
                    names.values.insert(variable.clone(), value);
                }
                Err(e) => {
                    let own = || format!("a param of `{}`: {e}", self.node.name);
                    let cause = names.failure(&value.to_string()).cloned();
                    let cause = cause.unwrap_or_else(|| StepError::invalid(own()));
                    names.failed.insert(variable.clone(), cause);
                }
            }
        }
        names
    }

    /// The params that the step itself has are there.
    fn check_params(&self, names: &Names) -> Result<(), StepError> {
        let mut bound = self.node.foreach.iter().flat_map(|f| &f.bound);
        match bound.find_map(|(variable, _)| names.failed.get(variable)) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    fn bindings(&self) -> Result<Vec<Binding>, StepError> {
        match &self.node.foreach {
            None => Ok(vec![Binding::new()]),
            Some(foreach) => self.zip(&foreach.vars, None),
        }
    }

    /// The items of the lists that the step itself walks within an item of its walker; that item
    /// alone when it walks none.
    fn within(&self, item: Item) -> Result<Vec<Item>, StepError> {
        let inner = self.node.foreach.as_ref().map(|f| &f.inner);
        let Some(inner) = inner.filter(|lists| !lists.is_empty()) else {
            return Ok(vec![item]);
        };
        let mut taken = BTreeSet::new();
        let mut items = Vec::new();
        for binding in self.zip(inner, Some(&item))? {
            let label = self.label(&binding, &mut taken).unwrap_or_default();
            let mut all = Item {
                names: item.names.clone(),
                label: Some(format!("{}/{label}", item.walked)),
                binding: item.binding.clone(),
                walked: item.walked.clone(),
            };
            for (var, bound) in binding {
                all.names.values.insert(var.clone(), bound.value());
                all.binding.insert(var, bound);
            }
            items.push(all);
        }
        Ok(items)
    }

    fn zip(
        &self,
        vars: &BTreeMap<String, ForeachList>,
        item: Option<&Item>,
    ) -> Result<Vec<Binding>, StepError> {
        let mut lists: Vec<(&String, Vec<Bound>)> = Vec::new();
        for (var, list) in vars {
            let values = match list {
                ForeachList::Values(values) => values.iter().cloned().map(Bound::Value).collect(),
                ForeachList::Artifacts(sources) => self
                    .elements(sources, item)?
                    .into_iter()
                    .map(|(artifact, label)| Bound::Artifact { artifact, label })
                    .collect(),
            };
            lists.push((var, values));
        }
        let lengths: BTreeSet<usize> = lists.iter().map(|(_, l)| l.len()).collect();
        if lengths.len() > 1 {
            let sizes: Vec<String> = lists
                .iter()
                .map(|(var, l)| format!("`{var}` has {}", l.len()))
                .collect();
            return Err(StepError::invalid(format!(
                "`{}` walks lists of different lengths: {}",
                self.node.name,
                sizes.join(", ")
            ))
            .help("the variables of one `foreach` are walked in step, so their lists must be of equal length"));
        }
        let len = lengths.first().copied().unwrap_or(0);
        let binding = |i: usize| {
            lists
                .iter()
                .map(|(var, l)| ((*var).clone(), l[i].clone()))
                .collect()
        };
        Ok((0..len).map(binding).collect())
    }

    /// The artifacts of sources; `item` is the one in which they are walked or read.
    fn elements(
        &self,
        sources: &[Source],
        item: Option<&Item>,
    ) -> Result<Vec<(Artifact, String)>, StepError> {
        let mut all = Vec::new();
        for source in sources {
            match (source, item) {
                (Source::Output { step, output }, _) => match &self.record(step, output)?.value {
                    OutputValue::One(artifact) => all.push((artifact.clone(), output.clone())),
                    OutputValue::List(items) => {
                        all.extend(items.iter().map(|i| (i.artifact.clone(), i.label.clone())));
                    }
                },
                (Source::Sibling { step, output, many }, Some(item)) => {
                    let found = self.of_sibling(step, output, *many, item)?;
                    if found.is_empty() && !many {
                        return Err(self.not_made(step, output));
                    }
                    all.extend(found);
                }
                (Source::Item(var), Some(item)) => all.push(self.artifact_of(var, item)?),
                _ => {
                    let text = format!("`{}` can walk outputs of steps only", self.node.name);
                    return Err(StepError::invalid(text));
                }
            }
        }
        Ok(all)
    }

    fn record(&self, step: &str, port: &str) -> Result<Rc<OutputRecord>, StepError> {
        let record = self.made.record(step, port);
        record.ok_or_else(|| self.not_made(step, port))
    }

    fn request(&self, item: &Item) -> Result<ActionRequest, StepError> {
        self.check_params(&item.names)?;
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
        let mut list = sources.len() > 1;
        if let Action::Uses(step) = &self.node.action {
            list = step.inputs().iter().any(|p| p.name == port && p.many);
        }
        let mut entries = Vec::new();
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
                    let elements = self.elements(std::slice::from_ref(source), None)?;
                    entries.extend(
                        elements
                            .into_iter()
                            .map(|(artifact, label)| Entry::Artifact { artifact, label }),
                    );
                }
                Source::Sibling { step, output, many } => {
                    list |= many;
                    let found = self.of_sibling(step, output, *many, item)?;
                    if found.is_empty() && !many && !self.node.may_lack(port) {
                        return Err(self.not_made(step, output));
                    }
                    entries.extend(
                        found
                            .into_iter()
                            .map(|(artifact, label)| Entry::Artifact { artifact, label }),
                    );
                }
            }
        }
        Ok(PortInputs { list, entries })
    }

    fn artifact_of(&self, variable: &str, item: &Item) -> Result<(Artifact, String), StepError> {
        match item.binding.get(variable) {
            Some(Bound::Artifact { artifact, label }) => Ok((artifact.clone(), label.clone())),
            _ => Err(StepError::invalid(format!(
                "`{}` needs an artifact, but `item.{variable}` is a value",
                self.node.name
            ))),
        }
    }

    /// What another step of the same walk made for this item.
    fn of_sibling(
        &self,
        step: &str,
        output: &str,
        many: bool,
        item: &Item,
    ) -> Result<Vec<(Artifact, String)>, StepError> {
        let made = self.made.of_item(step, output, many, &item.walked);
        made.ok_or_else(|| self.not_made(step, output))
    }

    fn not_made(&self, step: &str, port: &str) -> StepError {
        let text = format!(
            "`{}` needs `{step}.{port}`, which was not made",
            self.node.name
        );
        StepError::invalid(text)
    }

    /// The label of an item: of its first artifact, else its first value;
    /// numbered when an item before it has the same.
    fn label(&self, binding: &Binding, taken: &mut BTreeSet<String>) -> Option<String> {
        self.node.foreach.as_ref()?;
        let artifact = binding.values().find_map(|b| match b {
            Bound::Artifact { label, .. } => Some(label.clone()),
            Bound::Value(_) => None,
        });
        let text = artifact
            .or_else(|| binding.values().next().map(|b| text(&b.value())))
            .unwrap_or_default();
        let mut text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if self
            .node
            .foreach
            .as_ref()
            .is_some_and(|f| f.walker.is_some())
        {
            // In the label of a gathered output `/` parts it from what is inside the item.
            text = text.replace('/', ":");
        }
        let mut label: String = text.chars().take(LABEL).collect();
        if label.len() < text.len() {
            label.push('…');
        }
        let base = label.clone();
        let mut n = 1;
        while !taken.insert(label.clone()) {
            n += 1;
            label = format!("{base}#{n}");
        }
        Some(label)
    }
}

impl Bound {
    fn value(&self) -> Value {
        match self {
            Self::Artifact { label, .. } => Value::String(label.clone()),
            Self::Value(value) => value.clone(),
        }
    }
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn check_publish(node: &StepNode, requests: &[ActionRequest]) -> Result<(), StepError> {
    let mut paths = BTreeSet::new();
    for path in requests.iter().flat_map(|r| r.publish.values()) {
        if !paths.insert(path) {
            let text = format!("`{}` would publish twice to `{path}`", node.name);
            return Err(StepError::invalid(text)
                .help("name the item in the path, for example `results/${{ item.x }}.json`"));
        }
    }
    Ok(())
}
