//! The items of a step: what its variables are in each, under which label, and which of them its
//! conditions leave out. Lists are walked level by level, each within the items of the one around.

use std::collections::{BTreeMap, BTreeSet};

use flowrun_cache::{Artifact, OutputRecord};
use serde_json::{Value, json};

use super::Expansion;
use super::condition::{asks_for_item, level_of, words};
use crate::pipeline::{ForeachList, Level, StepNode};
use crate::step::StepError;

/// Characters of an item's value in its label.
const LABEL: usize = 40;

/// Who is told of the items of a step.
pub(super) type Hear<'a> = dyn FnMut(&Item) -> Result<(), StepError> + 'a;

/// What the `foreach` variables are in one item.
pub(super) type Binding = BTreeMap<String, Bound>;

/// What a variable is.
#[derive(Clone)]
pub(super) enum Bound {
    Artifact { artifact: Artifact, label: String },
    Value(Value),
}

impl Bound {
    fn value(&self) -> Value {
        match self {
            Self::Artifact { label, .. } => Value::String(label.clone()),
            Self::Value(value) => value.clone(),
        }
    }
}

/// One item of a fan-out; of a step without `foreach` the only one.
#[derive(Clone, Default)]
pub(super) struct Item {
    pub(super) binding: Binding,
    pub(super) names: Names,
    /// Its labels, of each level one, joined by `/`.
    pub(super) label: Option<String>,
}

/// What expressions see as `item`.
#[derive(Clone, Default)]
pub(super) struct Names {
    pub(super) values: BTreeMap<String, Value>,
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
struct Conditions<'a> {
    at_once: Option<&'a str>,
    /// For each item of each level.
    by_level: Vec<Vec<&'a str>>,
}

impl<'a> Conditions<'a> {
    fn of(node: &'a StepNode) -> Self {
        let levels = node.foreach.iter().flat_map(|f| &f.levels);
        let texts = |level: &'a Level| level.conditions.iter().map(String::as_str).collect();
        let mut all = Self {
            at_once: None,
            by_level: levels.map(texts).collect(),
        };
        let own = node.when.as_deref();
        let foreach = node.foreach.as_ref();
        match (own, foreach) {
            (Some(when), Some(foreach)) if asks_for_item(when) => {
                let level = all.by_level.get_mut(level_of(when, &foreach.levels));
                if let Some(level) = level.filter(|level| !level.contains(&when)) {
                    level.push(when);
                }
            }
            _ => all.at_once = own,
        }
        all
    }
}

impl<F: Fn(&str, &str) -> Option<OutputRecord>> Expansion<'_, F> {
    /// Tells `hear` each item of the step, in order. False when its `when` is false for all of them.
    pub(super) fn each_item(&self, hear: &mut Hear<'_>) -> Result<bool, StepError> {
        let conditions = Conditions::of(self.node);
        if !self.all_hold(conditions.at_once.as_slice(), None)? {
            return Ok(false);
        }
        let levels = match &self.node.foreach {
            Some(foreach) => foreach.levels.as_slice(),
            None => &[],
        };
        self.walk(levels, &conditions.by_level, &Item::default(), hear)?;
        Ok(true)
    }

    /// Walks the levels within an item, but for what is left out. One item of each level is held at
    /// a time: what is known of it may be as large as the list inside it.
    fn walk(
        &self,
        levels: &[Level],
        conditions: &[Vec<&str>],
        around: &Item,
        hear: &mut Hear<'_>,
    ) -> Result<(), StepError> {
        let (Some((level, inner)), Some((asked, later))) =
            (levels.split_first(), conditions.split_first())
        else {
            return hear(around);
        };
        let mut taken = BTreeSet::new();
        for binding in self.zip(level, around)? {
            // Of every item, so that one that is left out renames no other.
            let label = self.label(&binding, &mut taken);
            let mut item = around.clone();
            item.label = Some(match &around.label {
                Some(outer) => format!("{outer}/{label}"),
                None => label,
            });
            self.name(level, &binding, &mut item.names);
            item.binding.extend(binding);
            // Of an item that is left out nothing else need be there.
            if self.all_hold(asked, Some(&item.names))? {
                self.walk(inner, later, &item, hear)?;
            }
        }
        Ok(())
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

    /// Adds what expressions see of an item of this level: values as they are, artifacts by label,
    /// and the params of definitions that follow from them.
    fn name(&self, level: &Level, binding: &Binding, names: &mut Names) {
        let values = binding.iter();
        names
            .values
            .extend(values.map(|(var, bound)| (var.clone(), bound.value())));
        for (variable, value) in level.bound.iter().chain(&level.handed) {
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
    }

    /// The params that the step itself has are there.
    pub(super) fn check_params(&self, item: &Item) -> Result<(), StepError> {
        let levels = self.node.foreach.iter().flat_map(|f| &f.levels);
        let mut bound = levels.flat_map(|level| &level.bound);
        match bound.find_map(|(variable, _)| item.names.failed.get(variable)) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// The items of a level within one of the level around.
    fn zip(&self, level: &Level, around: &Item) -> Result<Vec<Binding>, StepError> {
        let mut lists: Vec<(&String, Vec<Bound>)> = Vec::new();
        for (var, list) in &level.vars {
            let values = match list {
                ForeachList::Values(values) => values.iter().cloned().map(Bound::Value).collect(),
                ForeachList::PerItem(value) => self.values(var, value, around)?,
                ForeachList::Artifacts(sources) => self
                    .elements(sources, around)?
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

    /// The values of a list that depends on the item around.
    fn values(&self, var: &str, list: &Value, around: &Item) -> Result<Vec<Bound>, StepError> {
        if let Some(error) = around.names.failure(&list.to_string()) {
            return Err(error.clone());
        }
        let name = &self.node.name;
        let filled = (self.expressions.resolve_item)(list, &around.names.values);
        let filled = filled
            .map_err(|e| StepError::invalid(format!("`foreach` of `{name}`, `{var}`: {e}")))?;
        match filled {
            Value::Array(values) => Ok(values.into_iter().map(Bound::Value).collect()),
            other => {
                let item = around.label.as_deref().unwrap_or_default();
                let text =
                    format!("`{name}` walks `{var}`, which is `{other}` for the item `{item}`");
                Err(StepError::invalid(text).help("a `foreach` walks a list"))
            }
        }
    }

    /// The label of an item within the one around: of its first artifact, else its first value;
    /// numbered when an item before it has the same.
    fn label(&self, binding: &Binding, taken: &mut BTreeSet<String>) -> String {
        let artifact = binding.values().find_map(|b| match b {
            Bound::Artifact { label, .. } => Some(label.clone()),
            Bound::Value(_) => None,
        });
        let text = artifact
            .or_else(|| binding.values().next().map(|b| text(&b.value())))
            .unwrap_or_default();
        let mut text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if self.node.foreach.as_ref().is_some_and(|f| f.is_walked()) {
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
        label
    }
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
