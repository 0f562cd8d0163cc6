//! [`inline`]: a step that `uses` a file is replaced by the steps of that file.
//!
//! The step `tidy` of a definition that `clean` uses becomes `clean/tidy`. Params are filled in
//! here (`binding`); ports are joined where all steps are known ([`Use`] says how). When `clean`
//! has a `foreach`, all steps inside walk its lists; params that differ from item to item become
//! variables of theirs ([`Use::bound`]). Knows no step kind.
//!
//! Invariant: what is replaced is bounded in depth and number, whatever the files say.

mod binding;

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Value, json};

use super::check::report_mismatch;
use super::definition::{Definition, FOREACH, INPUTS, Use, Uses};
use super::draft::{is_port_name, is_step_name};
use super::expr::{Scope, has_expression};
use super::handed::{EXPECT, hand_down};
use super::load::{identity, load_used, tidy};
use super::mismatch::Shape;
use super::node::{Data, Entry, Node};
use super::resolution::{MAX_PARALLEL, close_when, join_conditions, resolve_step};
use super::schema::{definition_shape, pipeline_shape};
use super::source_map::{SourceMap, Span};
use crate::pipeline::METRICS;
use crate::step::Port;

/// Deepest use within a use.
const MAX_DEPTH: usize = 16;
/// Most uses of one pipeline.
const MAX_USES: usize = 10_000;
/// Most values of the lists that the steps inside walked definitions walk, counted for each step.
const MAX_WALKED: usize = 2_000_000;

/// Resolves the steps of the file, and replaces those that use a definition.
pub(crate) fn inline(map: &mut SourceMap, root: &mut Node, scope: &mut Scope) -> Uses {
    let mut inliner = Inliner {
        map,
        uses: Uses::new(),
        open: Vec::new(),
        walked: Vec::new(),
        length: 0,
        handed: 0,
        bound: 0,
        done: IndexMap::new(),
    };
    let steps = root.as_map_mut().and_then(|m| m.get_mut("steps"));
    if let Some(steps) = steps.and_then(|s| s.value.as_map_mut()) {
        for (name, entry) in std::mem::take(steps) {
            inliner.step("", &name, entry, scope, None);
        }
        *steps = inliner.done;
    }
    inliner.uses
}

struct Inliner<'a> {
    map: &'a mut SourceMap,
    uses: Uses,
    /// The definitions around, outermost first: their identity, and as shown.
    open: Vec<(PathBuf, PathBuf)>,
    /// The `foreach` of each use around that has one, outermost first.
    walked: Vec<Entry>,
    /// How many values they have.
    length: usize,
    /// How many values were handed to steps.
    handed: usize,
    /// How many uses had their params bound.
    bound: usize,
    done: IndexMap<String, Entry>,
}

impl Inliner<'_> {
    /// `around`: the use of a definition, and the definition, that the step stands in.
    fn step(
        &mut self,
        prefix: &str,
        name: &str,
        mut entry: Entry,
        scope: &mut Scope,
        around: Option<(&Node, &Definition)>,
    ) {
        if !is_step_name(name) {
            let message = format!("`{name}` is not a step name");
            let help = "lower-case letters, digits, `-` and `_`, a letter first".to_owned();
            self.report(entry.key, "bad-name", message, Some(help));
        } else if name == INPUTS && !prefix.is_empty() {
            let message = "`in` stands for the inputs of the definition".to_owned();
            self.report(entry.key, "bad-name", message, None);
        }
        self.check_variables(&entry.value);
        resolve_step(self.map, &mut entry.value, scope);
        let full = format!("{prefix}{name}");
        let uses = entry
            .value
            .get("uses")
            .and_then(|u| Some((u.as_text()?.to_owned(), u.span)));
        let uses = uses.filter(|(path, _)| is_path(path));
        if uses.is_some() || around.is_some() {
            close_when(self.map, &mut entry.value, scope);
        }
        if let Some((outer, definition)) = around {
            // Not before: what the use says was filled in where it is written.
            let again = self.walked.is_empty() && entry.value.entry(FOREACH).is_some();
            hand_down(outer, definition, name, &mut entry.value, again);
            join_conditions(outer, &mut entry.value);
        }
        if let Some((path, at)) = uses {
            return self.used(prefix, full, entry, &path, at, scope);
        }
        self.walk(&mut entry.value);
        self.done.insert(full, entry);
    }

    /// Has a step walk the lists of the uses around it, beside its own.
    fn walk(&mut self, step: &mut Node) {
        let (Some(foreach), Some(fields)) = (self.walked.last(), step.as_map_mut()) else {
            return;
        };
        let at = foreach.key;
        let before = self.handed;
        self.handed = before.saturating_add(self.length);
        if self.handed <= MAX_WALKED {
            // Where it has its own, and further out, those of the uses are found there.
            fields
                .entry(FOREACH.to_owned())
                .or_insert_with(|| foreach.clone());
            return;
        }
        fields.shift_remove(FOREACH);
        if before <= MAX_WALKED {
            let message =
                format!("more than {MAX_WALKED} values are walked by the steps inside definitions");
            self.report(at, "yaml-limit", message, None);
        }
    }

    /// Within a walked definition a step, or a use, may walk lists of its own, under other names.
    fn check_variables(&mut self, step: &Node) {
        let is_taken = |name: &&String| {
            let mut around = self.walked.iter();
            *name != MAX_PARALLEL && around.any(|outer| outer.value.entry(name).is_some())
        };
        let clash = step.entries(FOREACH).find(|(name, _)| is_taken(name));
        if let Some((name, entry)) = clash {
            let message = format!("`{name}` is a variable of the `foreach` around already");
            let help = "choose another name for this one".to_owned();
            self.report(entry.key, "bad-name", message, Some(help));
        }
    }

    fn used(
        &mut self,
        prefix: &str,
        name: String,
        mut entry: Entry,
        path: &str,
        at: Span,
        scope: &Scope,
    ) {
        prune_step(self.map, &name, &mut entry);
        self.check_fields(&entry);
        let own = entry.value.entry(FOREACH).cloned();
        let own = own.filter(|foreach| foreach.value.as_map().is_some());
        let (outer, length) = (self.walked.len(), self.length);
        if let Some(own) = own {
            self.length = length.saturating_add(values(&own.value));
            self.walked.push(own);
        }
        let mut bound = Vec::new();
        let definition = self.definition(&name, &entry, path, at, scope, &mut bound);
        self.walked.truncate(outer);
        self.length = length;
        let used = Use {
            scope: prefix.to_owned(),
            key: entry.key,
            node: entry.value,
            definition,
            bound,
        };
        self.uses.insert(name, used);
    }

    /// Reads the definition and puts its steps in place of the use.
    fn definition(
        &mut self,
        name: &str,
        entry: &Entry,
        path: &str,
        at: Span,
        scope: &Scope,
        bound: &mut Vec<(String, Value)>,
    ) -> Option<Definition> {
        let around = self.map.path(at);
        let file = tidy(&around.parent().unwrap_or(Path::new("")).join(path));
        self.check_open(&file, path, at)?;
        let mut tree = load_used(self.map, &file, name, at)?;
        prune_definition(self.map, &mut tree)?;
        let bindings = self.bind(entry, path, at, &tree);
        let mut inner = Scope {
            context: scope.context.clone(),
            walked: !self.walked.is_empty(),
            budget: scope.budget.clone(),
            ..Scope::default()
        };
        inner.context["params"] = Value::Object(bindings.known);
        for (param, variable, value) in bindings.waiting {
            inner.deferred.insert(param, variable.clone());
            bound.push((variable, value));
        }
        let mut definition = Definition {
            about: tree.get("about").and_then(Node::as_text).map(str::to_owned),
            inputs: self.inputs(&tree),
            outputs: self.outputs(&tree),
            steps: Vec::new(),
            file: file.clone(),
        };
        let steps = steps_of(std::mem::replace(&mut tree.data, Data::Null));
        if steps.is_empty() {
            let message = format!("`{path}` has no steps");
            self.report(at, "no-steps", message, None);
        }
        self.open.push((identity(&file), file));
        let prefix = format!("{name}/");
        self.check_gates(&entry.value, &definition, path);
        for (inner_name, step) in steps {
            definition.steps.push(format!("{prefix}{inner_name}"));
            let around = Some((&entry.value, &definition));
            self.step(&prefix, &inner_name, step, &mut inner, around);
        }
        self.open.pop();
        Some(definition)
    }

    fn check_open(&mut self, file: &Path, path: &str, at: Span) -> Option<()> {
        let id = identity(file);
        if let Some(first) = self.open.iter().position(|(open, _)| *open == id) {
            let mut names: Vec<String> = self.open[first..]
                .iter()
                .map(|(_, shown)| shown.display().to_string())
                .collect();
            names.push(names.first().cloned().unwrap_or_default());
            let message = format!("step definitions use each other: `{}`", names.join(" -> "));
            self.report(at, "cycle", message, None);
            return None;
        }
        if self.open.len() >= MAX_DEPTH || self.uses.len() >= MAX_USES {
            let message = format!(
                "`{path}`: more than {MAX_DEPTH} definitions inside each other, or {MAX_USES} uses"
            );
            self.report(at, "yaml-limit", message, None);
            return None;
        }
        Some(())
    }

    /// Fields that mean nothing on a use.
    fn check_fields(&mut self, entry: &Entry) {
        let help = |field: &str| match field {
            "out" => "the definition's own `out` says what it gives",
            _ => "a step is one of a kind (`uses`) or a command (`run`)",
        };
        for field in ["out", "run"] {
            if let Some(found) = entry.value.entry(field) {
                let message = format!("`{field}` cannot stand beside the use of a definition");
                self.report(
                    found.key,
                    "misplaced-field",
                    message,
                    Some(help(field).into()),
                );
            }
        }
    }

    /// Gates (`expect`) are on the metrics of one step inside.
    fn check_gates(&mut self, outer: &Node, definition: &Definition, path: &str) {
        let gates = outer.entry(EXPECT);
        let Some(gates) = gates.filter(|_| definition.gated().is_none()) else {
            return;
        };
        let message = format!("`{path}` does not say whose metrics these are");
        let help = format!(
            "give the definition an output `{METRICS}`, or put `expect` on the step inside"
        );
        self.report(gates.key, "misplaced-field", message, Some(help));
    }

    fn inputs(&mut self, tree: &Node) -> Vec<Port> {
        let mut ports = Vec::new();
        for (name, entry) in tree.entries(INPUTS) {
            self.check_port_name(name, entry.key);
            let text = |key: &str| entry.value.get(key).and_then(Node::as_text);
            let flag = |key: &str| {
                entry
                    .value
                    .get(key)
                    .is_some_and(|n| n.data == Data::Bool(true))
            };
            let ty = entry.value.as_text().or_else(|| text("type"));
            let mut port = Port::new(name, ty.unwrap_or("any"), text("about").unwrap_or_default());
            port.optional = flag("optional");
            port.many = flag("many");
            ports.push(port);
        }
        ports
    }

    fn outputs(&mut self, tree: &Node) -> IndexMap<String, Entry> {
        let entries = tree.entries("out");
        let outputs: IndexMap<String, Entry> =
            entries.map(|(name, e)| (name.clone(), e.clone())).collect();
        for (name, entry) in &outputs {
            self.check_port_name(name, entry.key);
        }
        outputs
    }

    fn check_port_name(&mut self, name: &str, at: Span) {
        if !is_port_name(name) {
            let message = format!("`{name}` is not a port name");
            let help = "lower-case letters, digits and `_`, a letter first".to_owned();
            self.report(at, "bad-name", message, Some(help));
        }
    }

    fn report(&mut self, at: Span, code: &'static str, message: String, help: Option<String>) {
        self.map.report(at, code, message, "", help);
    }
}

/// How many values there are in one.
fn values(node: &Node) -> usize {
    match &node.data {
        Data::List(items) => items.iter().map(values).sum(),
        Data::Map(entries) => entries.values().map(|e| values(&e.value)).sum(),
        _ => 1,
    }
}

/// `uses` names a file, not a step kind.
fn is_path(uses: &str) -> bool {
    let file = Path::new(uses)
        .extension()
        .is_some_and(|e| e == "yaml" || e == "yml");
    (file || uses.contains('/')) && !has_expression(uses)
}

/// Takes out of a use what has a wrong shape.
fn prune_step(map: &mut SourceMap, name: &str, entry: &mut Entry) {
    let Ok(shape) = pipeline_shape() else { return };
    let value = json!({ "steps": { name: entry.value.to_value() } });
    for mut mismatch in shape.check(&value) {
        mismatch.path.drain(..2.min(mismatch.path.len()));
        report_mismatch(map, &entry.value, entry.key, &mismatch);
        if mismatch.code != "missing-field" {
            entry.value.remove(&mismatch.path);
        }
    }
}

/// Takes out of a definition what has a wrong shape, but for its steps, which are looked at
/// when their params are filled in. None when it is no definition at all.
fn prune_definition(map: &mut SourceMap, tree: &mut Node) -> Option<()> {
    if tree.as_map().is_none() {
        let message = format!("a step definition is a map, not {}", tree.describe());
        map.report(tree.span, "wrong-type", message, "", None);
        return None;
    }
    let shape: &Shape = definition_shape().ok()?;
    let mut value = tree.to_value();
    if let Some(steps) = value.get_mut("steps").filter(|s| s.is_object()) {
        *steps = json!({});
    }
    for mismatch in shape.check(&value) {
        report_mismatch(map, tree, tree.span, &mismatch);
        if mismatch.code != "missing-field" {
            tree.remove(&mismatch.path);
        }
    }
    Some(())
}

fn steps_of(data: Data) -> IndexMap<String, Entry> {
    let Data::Map(mut sections) = data else {
        return IndexMap::new();
    };
    let steps = sections.shift_remove("steps").map(|e| e.value.data);
    match steps {
        Some(Data::Map(steps)) => steps,
        _ => IndexMap::new(),
    }
}
