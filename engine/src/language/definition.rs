//! Step definitions: a step that `uses` a file is replaced by the steps of that file.
//!
//! The step `tidy` of a definition that `clean` uses becomes `clean/tidy`. Params are filled in
//! here; ports are joined where all steps are known ([`Use`] says how). When `clean` has a
//! `foreach`, all steps inside walk its lists; params that differ from item to item become
//! variables of theirs ([`Use::bound`]). Knows no step kind.
//!
//! Invariant: what is replaced is bounded in depth and number, whatever the files say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::check::report_mismatch;
use super::draft::{is_port_name, is_step_name};
use super::expr::{Scope, has_expression, holds_expression, unescaped};
use super::handed::{EXPECT, hand_down};
use super::load::{identity, load_used, tidy};
use super::mismatch::Shape;
use super::node::{Data, Entry, Node};
use super::overlay::fits;
use super::resolution::{MAX_PARALLEL, close_when, forbid, join_conditions, resolve_step};
use super::schema::{definition_shape, pipeline_shape};
use super::source_map::{SourceMap, Span};
use super::suggest;
use crate::pipeline::{DefinitionUse, METRICS};
use crate::step::Port;

/// Deepest use within a use.
const MAX_DEPTH: usize = 16;
/// Most uses of one pipeline.
const MAX_USES: usize = 10_000;
/// Most values of the lists that the steps inside walked definitions walk, counted for each step.
const MAX_WALKED: usize = 2_000_000;

/// The name by which the steps of a definition read its inputs.
pub(crate) const INPUTS: &str = "in";

/// The field that has a step run once for each item.
const FOREACH: &str = "foreach";

/// One use of a step definition.
pub(crate) struct Use {
    /// The prefix of the steps around it.
    pub(crate) scope: String,
    /// Where its name is written.
    pub(crate) key: Span,
    /// It as written, expressions filled in.
    pub(crate) node: Node,
    /// What the definition says; None when that is not known.
    pub(crate) definition: Option<Definition>,
    /// Its params that differ from item to item: variable of `item` to the value, in which
    /// `${{ item… }}` waits.
    pub(crate) bound: Vec<(String, Value)>,
}

impl Use {
    /// The lists that it walks.
    pub(crate) fn foreach(&self) -> Option<&Entry> {
        self.node
            .entry(FOREACH)
            .filter(|e| e.value.as_map().is_some())
    }
}

/// The ports of a step definition.
pub(crate) struct Definition {
    /// The file.
    pub(crate) file: PathBuf,
    /// One sentence for people.
    pub(crate) about: Option<String>,
    /// Input ports.
    pub(crate) inputs: Vec<Port>,
    /// Output port to the `step.output` inside.
    pub(crate) outputs: IndexMap<String, Entry>,
    /// The names of its steps, with their prefix.
    pub(crate) steps: Vec<String>,
}

/// The uses of a pipeline, by name.
pub(crate) type Uses = BTreeMap<String, Use>;

/// The uses around the steps of `scope`, innermost first.
pub(crate) fn around<'a>(uses: &'a Uses, scope: &str) -> impl Iterator<Item = (&'a str, &'a Use)> {
    std::iter::successors(use_of(uses, scope), move |(_, used)| {
        use_of(uses, &used.scope)
    })
}

/// The use whose steps have the prefix `scope`.
fn use_of<'a>(uses: &'a Uses, scope: &str) -> Option<(&'a str, &'a Use)> {
    let (name, used) = uses.get_key_value(scope.strip_suffix('/')?)?;
    Some((name.as_str(), used))
}

/// The uses with a `foreach` that the steps of `scope` belong to, innermost first.
pub(crate) fn walkers<'a>(uses: &'a Uses, scope: &str) -> impl Iterator<Item = (&'a str, &'a Use)> {
    around(uses, scope).filter(|(_, used)| used.foreach().is_some())
}

/// The innermost of them.
pub(crate) fn walker<'a>(uses: &'a Uses, scope: &str) -> Option<(&'a str, &'a Use)> {
    walkers(uses, scope).next()
}

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

/// What a pipeline keeps of its uses.
pub(crate) fn summary(uses: &Uses) -> BTreeMap<String, DefinitionUse> {
    let known = uses.iter().filter_map(|(name, used)| {
        let definition = used.definition.as_ref()?;
        let about = used.node.get("about").and_then(Node::as_text);
        let about = about.map(str::to_owned).or(definition.about.clone());
        let file = definition.file.clone();
        Some((name.clone(), DefinitionUse { file, about }))
    });
    known.collect()
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

    /// The params of the definition, as this use has them.
    fn bind(&mut self, entry: &Entry, path: &str, at: Span, tree: &Node) -> Bindings {
        let mut bindings = Bindings::default();
        let with = entry.value.get("with");
        let walked = !self.walked.is_empty();
        let number = self.bound;
        self.bound += 1;
        for (index, (name, default)) in tree.entries("params").enumerate() {
            forbid(self.map, &default.value);
            let given = with.and_then(|w| w.entry(name));
            let value = given.map(|given| given.value.to_value());
            if let Some(value) = value.as_ref().filter(|v| walked && holds_expression(v)) {
                let variable = variable(number, index, name);
                bindings
                    .waiting
                    .push((name.clone(), variable, value.clone()));
                continue;
            }
            match given {
                Some(given) => self.check_param(name, default, given),
                None if default.value.data == Data::Null => {
                    let place = with.map_or(at, |_| entry.value.place(&["with".into()], true, at));
                    let message = format!("`{path}` needs the param `{name}`");
                    self.report(place, "missing-field", message, None);
                }
                None => {}
            }
            let value = match value {
                // It was to be read once more, as what waits is.
                Some(value) if walked => unescaped(value),
                Some(value) => value,
                None => default.value.to_value(),
            };
            bindings.known.insert(name.clone(), value);
        }
        let params = || tree.entries("params").map(|(name, _)| name.as_str());
        for (name, given) in entry.value.entries("with") {
            if !params().any(|param| param == name) {
                let help = suggest::help(name, "its params", params());
                let message = format!("`{path}` has no param `{name}`");
                self.report(given.key, "unknown-param", message, help);
            }
        }
        bindings
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

    fn check_param(&mut self, name: &str, default: &Entry, given: &Entry) {
        if let Err(message) = fits(name, &default.value.data, &given.value.data) {
            let at = if given.value.is_container() {
                given.key
            } else {
                given.value.span
            };
            self.report(at, "param-type", message, None);
        }
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

/// What the params of a definition are in one use.
#[derive(Default)]
struct Bindings {
    /// Those that are known.
    known: Map<String, Value>,
    /// Those that differ from item to item: the param, the variable that holds it, its value.
    waiting: Vec<(String, String, Value)>,
}

impl Definition {
    /// The step inside whose metrics a gate on the use means: the one that makes the output
    /// `metrics`, else the one that makes all outputs.
    pub(crate) fn gated(&self) -> Option<&str> {
        fn maker(output: &Entry) -> Option<&str> {
            Some(output.value.as_text()?.split_once('.')?.0)
        }
        if let Some(metrics) = self.outputs.get(METRICS) {
            return maker(metrics);
        }
        let mut makers = self.outputs.values().map(maker);
        let first = makers.next()??;
        makers.all(|other| other == Some(first)).then_some(first)
    }
}

/// The variable of `item` for a param of the use of this number: no `foreach` can have one of that
/// name, and no other use has, since conditions that name it are handed to the steps of others.
fn variable(number: usize, index: usize, param: &str) -> String {
    if is_port_name(param) {
        format!("_{number}_{param}")
    } else {
        format!("_{number}_{index}")
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
pub(crate) fn is_path(uses: &str) -> bool {
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
