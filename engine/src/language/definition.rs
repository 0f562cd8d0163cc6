//! Step definitions: a step that `uses` a file is replaced by the steps of that file.
//!
//! The step `tidy` of a definition that `clean` uses becomes `clean/tidy`. Params are filled in
//! here; ports are joined where all steps are known ([`Use`] says how). Knows no step kind.
//!
//! Invariant: what is replaced is bounded in depth and number, whatever the files say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::check::report_mismatch;
use super::draft::{is_port_name, is_step_name};
use super::expr::{Scope, has_expression};
use super::load::{identity, load_used, tidy};
use super::mismatch::Shape;
use super::node::{Data, Entry, Node};
use super::overlay::fits;
use super::resolution::{forbid, join_conditions, resolve_step};
use super::schema::{definition_shape, pipeline_shape};
use super::source_map::{SourceMap, Span};
use super::suggest;
use crate::pipeline::DefinitionUse;
use crate::step::Port;

/// Deepest use within a use.
const MAX_DEPTH: usize = 16;
/// Most uses of one pipeline.
const MAX_USES: usize = 10_000;

/// The name by which the steps of a definition read its inputs.
pub(crate) const INPUTS: &str = "in";

/// Fields of a use that the steps inside take over when they do not say otherwise.
const HANDED_DOWN: [&str; 6] = ["retry", "timeout", "resources", "pool", "runner", "cache"];

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

/// Resolves the steps of the file, and replaces those that use a definition.
pub(crate) fn inline(map: &mut SourceMap, root: &mut Node, scope: &mut Scope) -> Uses {
    let mut inliner = Inliner {
        map,
        uses: Uses::new(),
        open: Vec::new(),
        done: IndexMap::new(),
    };
    let steps = root.as_map_mut().and_then(|m| m.get_mut("steps"));
    if let Some(steps) = steps.and_then(|s| s.value.as_map_mut()) {
        for (name, entry) in std::mem::take(steps) {
            inliner.step("", &name, entry, scope);
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
    done: IndexMap<String, Entry>,
}

impl Inliner<'_> {
    fn step(&mut self, prefix: &str, name: &str, mut entry: Entry, scope: &mut Scope) {
        if !is_step_name(name) {
            let message = format!("`{name}` is not a step name");
            let help = "lower-case letters, digits, `-` and `_`, a letter first".to_owned();
            self.report(entry.key, "bad-name", message, Some(help));
        } else if name == INPUTS && !prefix.is_empty() {
            let message = "`in` stands for the inputs of the definition".to_owned();
            self.report(entry.key, "bad-name", message, None);
        }
        resolve_step(self.map, &mut entry.value, scope);
        let full = format!("{prefix}{name}");
        let uses = entry
            .value
            .get("uses")
            .and_then(|u| Some((u.as_text()?, u.span)));
        match uses {
            Some((path, at)) if is_path(path) => {
                let path = path.to_owned();
                self.used(prefix, full, entry, &path, at, scope);
            }
            _ => {
                self.done.insert(full, entry);
            }
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
        let definition = self.definition(&name, &entry, path, at, scope);
        let used = Use {
            scope: prefix.to_owned(),
            key: entry.key,
            node: entry.value,
            definition,
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
    ) -> Option<Definition> {
        let around = self.map.path(at);
        let file = tidy(&around.parent().unwrap_or(Path::new("")).join(path));
        self.check_open(&file, path, at)?;
        let mut tree = load_used(self.map, &file, name, at)?;
        prune_definition(self.map, &mut tree)?;
        let params = self.bind(entry, path, at, &tree);
        let mut inner = Scope {
            context: scope.context.clone(),
            items: None,
        };
        inner.context["params"] = Value::Object(params);
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
        for (inner_name, mut step) in steps {
            definition.steps.push(format!("{prefix}{inner_name}"));
            hand_down(&entry.value, &definition, &inner_name, &mut step.value);
            join_conditions(self.map, &entry.value, &mut step.value, scope, &inner);
            self.step(&prefix, &inner_name, step, &mut inner);
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
            "foreach" => "put it on the steps inside, over an input that takes a list",
            "expect" => "put it on the step inside that has the metric",
            "out" => "the definition's own `out` says what it gives",
            _ => "a step is one of a kind (`uses`) or a command (`run`)",
        };
        for field in ["foreach", "expect", "out", "run"] {
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
    fn bind(&mut self, entry: &Entry, path: &str, at: Span, tree: &Node) -> Map<String, Value> {
        let mut params = Map::new();
        let with = entry.value.get("with");
        for (name, default) in tree.entries("params") {
            forbid(self.map, &default.value);
            let given = with.and_then(|w| w.entry(name));
            match given {
                Some(given) => self.check_param(name, default, given),
                None if default.value.data == Data::Null => {
                    let place = with.map_or(at, |_| entry.value.place(&["with".into()], true, at));
                    let message = format!("`{path}` needs the param `{name}`");
                    self.report(place, "missing-field", message, None);
                }
                None => {}
            }
            let value = given.map_or(&default.value, |g| &g.value).to_value();
            params.insert(name.clone(), value);
        }
        for (name, given) in entry.value.entries("with") {
            if !params.contains_key(name) {
                let help = suggest::help(name, "its params", params.keys().map(String::as_str));
                let message = format!("`{path}` has no param `{name}`");
                self.report(given.key, "unknown-param", message, help);
            }
        }
        params
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

/// Gives a step inside what the use says for all of them, and what it says of this one's outputs.
fn hand_down(outer: &Node, definition: &Definition, name: &str, step: &mut Node) {
    if step.data == Data::Null {
        step.data = Data::Map(IndexMap::new());
    }
    let published = published(outer, definition, name);
    let Some(fields) = step.as_map_mut() else {
        return;
    };
    for field in HANDED_DOWN {
        if let (Some(entry), false) = (outer.entry(field), fields.contains_key(field)) {
            fields.insert(field.to_owned(), entry.clone());
        }
    }
    if let Some(entry) = outer.entry("env") {
        add_missing(fields, "env", entry);
    }
    if let Some(entry) = published {
        add_missing(fields, "publish", &entry);
    }
    if let Some(entry) = outer.entry("secrets") {
        let own = fields.entry("secrets".into()).or_insert_with(|| Entry {
            key: entry.key,
            value: Node {
                span: entry.value.span,
                data: Data::List(Vec::new()),
            },
        });
        if let (Data::List(own), Some(more)) = (&mut own.value.data, entry.value.as_list()) {
            own.extend(more.iter().cloned());
        }
    }
}

/// Lays the entries of a map under those that are there.
fn add_missing(fields: &mut IndexMap<String, Entry>, field: &str, from: &Entry) {
    let Some(own) = fields.get_mut(field) else {
        fields.insert(field.to_owned(), from.clone());
        return;
    };
    if let (Some(own), Some(more)) = (own.value.as_map_mut(), from.value.as_map()) {
        for (name, entry) in more {
            own.entry(name.clone()).or_insert_with(|| entry.clone());
        }
    }
}

/// The `publish` of the use, for the outputs that come from the step `name` inside.
fn published(outer: &Node, definition: &Definition, name: &str) -> Option<Entry> {
    let publish = outer.entry("publish")?;
    let mut ours: IndexMap<String, Entry> = IndexMap::new();
    for (port, entry) in publish.value.as_map()? {
        let source = definition.outputs.get(port).and_then(|e| e.value.as_text());
        if let Some((step, output)) = source.and_then(|s| s.split_once('.'))
            && step == name
        {
            ours.insert(output.to_owned(), entry.clone());
        }
    }
    let value = Node {
        span: publish.value.span,
        data: Data::Map(ours),
    };
    let filled = value.as_map().is_some_and(|m| !m.is_empty());
    filled.then_some(Entry {
        key: publish.key,
        value,
    })
}
