//! [`Draft`]: a step as far as it can be known by itself: what it does and which
//! ports it has. Knows no other step.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path};
use std::sync::Arc;

use super::definition::{Uses, walker, walkers};
use super::expr::has_expression;
use super::node::{Entry, Node};
use super::source_map::{SourceMap, Span};
use super::spec::StepSpec;
use super::suggest;
use crate::pipeline::Action;
use crate::step::{Port, Step};
use crate::vocabulary::Vocabulary;

/// A step of the file.
pub(crate) struct Draft<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// Where the name is written.
    pub(crate) key: Span,
    /// It as written, expressions filled in.
    pub(crate) node: &'a Node,
    /// It as a type.
    pub(crate) spec: StepSpec,
    /// What it does; None when that is not known.
    pub(crate) action: Option<Action>,
    /// Its output ports; None when they are not known.
    pub(crate) outputs: Option<Vec<Port>>,
}

impl<'a> Draft<'a> {
    /// Looks at one step of the file. `spec` is None when its shape is wrong beyond use.
    pub(crate) fn new(
        map: &mut SourceMap,
        name: &'a str,
        entry: &'a Entry,
        spec: Option<StepSpec>,
        vocabulary: &Vocabulary,
    ) -> Self {
        let usable = spec.is_some();
        let spec = spec.unwrap_or_default();
        let mut draft = Self {
            name,
            key: entry.key,
            node: &entry.value,
            spec,
            action: None,
            outputs: None,
        };
        if usable {
            draft.action = draft.action(map, vocabulary);
            draft.outputs = draft.outputs();
            draft.check_fields(map);
        }
        draft
    }

    /// The prefix that its name has with those of the steps beside it: empty outside of
    /// definitions.
    pub(crate) fn scope(&self) -> &'a str {
        let cut = self.name.rfind('/').map_or(0, |i| i + 1);
        &self.name[..cut]
    }

    /// True for a shell step.
    pub(crate) fn is_run(&self) -> bool {
        matches!(self.action, Some(Action::Run(_)))
    }

    /// The step kind's implementation.
    pub(crate) fn kind(&self) -> Option<&Arc<dyn Step>> {
        match &self.action {
            Some(Action::Uses(step)) => Some(step),
            _ => None,
        }
    }

    /// True when it fans out, whether or not its `foreach` is right.
    pub(crate) fn fans_out(&self) -> bool {
        self.node.get("foreach").is_some_and(Node::is_container)
    }

    /// How many levels of items it has, where it stands in a definition that is walked.
    pub(crate) fn levels(&self, uses: &Uses) -> usize {
        walkers(uses, self.scope()).count() + usize::from(self.walks_itself(uses))
    }

    /// True when it has lists of its own to walk within the items of the use around it.
    pub(crate) fn walks_itself(&self, uses: &Uses) -> bool {
        let around = walker(uses, self.scope()).and_then(|(_, used)| used.foreach());
        let own = self.node.entry("foreach").map(|e| e.key);
        self.fans_out() && around.is_some_and(|around| own != Some(around.key))
    }

    /// Where the field `name` is written: its value, or its key when that is a map or list.
    pub(crate) fn place(&self, path: &[&str]) -> Span {
        let path: Vec<String> = path.iter().map(|s| (*s).to_owned()).collect();
        self.node.place(&path, false, self.key)
    }

    /// Where the last key of `path` is written.
    pub(crate) fn key_of(&self, path: &[&str]) -> Span {
        let path: Vec<String> = path.iter().map(|s| (*s).to_owned()).collect();
        self.node.place(&path, true, self.key)
    }

    fn action(&self, map: &mut SourceMap, vocabulary: &Vocabulary) -> Option<Action> {
        match (&self.spec.uses, &self.spec.run) {
            (Some(_), Some(_)) => {
                let message = format!("`{}` has both `uses` and `run`", self.name);
                let help = "a step is one of a kind (`uses`) or a command (`run`)".to_owned();
                map.report(
                    self.key_of(&["run"]),
                    "uses-and-run",
                    message,
                    "",
                    Some(help),
                );
                None
            }
            (None, None) => {
                // A mistake in their own values was told already.
                if self.node.get("uses").is_none() && self.node.get("run").is_none() {
                    let message = format!("`{}` has neither `uses` nor `run`", self.name);
                    let help = "name a step kind with `uses:` or a command with `run:`".to_owned();
                    map.report(self.key, "uses-or-run", message, "", Some(help));
                }
                None
            }
            (None, Some(command)) if command.trim().is_empty() => {
                map.report(
                    self.place(&["run"]),
                    "uses-or-run",
                    "an empty command",
                    "",
                    None,
                );
                None
            }
            (None, Some(command)) => Some(Action::Run(command.clone())),
            (Some(kind), None) => self.kind_named(map, kind, vocabulary).map(Action::Uses),
        }
    }

    fn kind_named(
        &self,
        map: &mut SourceMap,
        kind: &str,
        vocabulary: &Vocabulary,
    ) -> Option<Arc<dyn Step>> {
        if has_expression(kind) {
            return None;
        }
        if let Some(step) = vocabulary.steps.get(kind) {
            return Some(step.clone());
        }
        let at = self.place(&["uses"]);
        let help = suggest::help(
            kind,
            "step kinds",
            vocabulary.steps.keys().map(String::as_str),
        );
        map.report(
            at,
            "unknown-kind",
            format!("there is no step kind `{kind}`"),
            "",
            help,
        );
        None
    }

    fn outputs(&self) -> Option<Vec<Port>> {
        match self.action.as_ref()? {
            Action::Uses(step) => Some(step.outputs()),
            Action::Run(_) => {
                let out = self.spec.out.iter().flatten();
                Some(
                    out.map(|(name, path)| Port::new(name, "file", path))
                        .collect(),
                )
            }
        }
    }

    /// Fields that belong to the other sort of step, and the ports of `run`.
    fn check_fields(&self, map: &mut SourceMap) {
        if self.kind().is_some() && self.node.get("out").is_some() {
            let message = "`out` belongs to `run`; a step kind has its own outputs";
            map.report(self.key_of(&["out"]), "misplaced-field", message, "", None);
        }
        if !self.is_run() {
            return;
        }
        if self.node.get("with").is_some() {
            let help = "use `${{ }}` in the command, or `env:`".to_owned();
            let message = "`with` belongs to `uses`; a command takes no params";
            map.report(
                self.key_of(&["with"]),
                "misplaced-field",
                message,
                "",
                Some(help),
            );
        }
        let mut paths: HashMap<&str, &str> = HashMap::new();
        for (port, path) in self.spec.out.iter().flatten() {
            check_port_name(map, port, self.key_of(&["out", port]));
            let at = self.place(&["out", port]);
            if let Err(why) = inner_path(path) {
                let help = "the path is inside the step's `out/` folder".to_owned();
                map.report(at, "bad-path", format!("`{path}` {why}"), "", Some(help));
            }
            if let Some(other) = paths.insert(path, port) {
                let message = format!("`{other}` and `{port}` are the same file");
                map.report(at, "bad-path", message, "", None);
            }
        }
        for (port, entry) in self.node.entries("in") {
            check_port_name(map, port, entry.key);
            if self
                .spec
                .out
                .as_ref()
                .is_some_and(|out| out.contains_key(port))
            {
                let help = "both would be the environment variable of that name".to_owned();
                let message = format!("`{port}` is both an input and an output");
                map.report(entry.key, "bad-name", message, "", Some(help));
            }
        }
        self.check_variables(map);
    }

    /// A port and a variable of one name would hide each other.
    fn check_variables(&self, map: &mut SourceMap) {
        let inputs = self
            .spec
            .inputs
            .iter()
            .flatten()
            .map(|(name, _)| name.as_str());
        let outputs = self
            .spec
            .out
            .iter()
            .flatten()
            .map(|(name, _)| name.as_str());
        let ports: BTreeMap<&str, ()> = inputs.chain(outputs).map(|name| (name, ())).collect();
        for (name, entry) in self.node.entries("env") {
            if ports.contains_key(name.as_str()) {
                let message = format!("`{name}` is already the variable of a port");
                map.report(entry.key, "bad-name", message, "", None);
            }
        }
    }
}

/// `[a-z][a-z0-9-]*`
pub(crate) fn is_step_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_'))
}

/// `[a-z][a-z0-9_]*`
pub(crate) fn is_port_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn check_port_name(map: &mut SourceMap, name: &str, at: Span) {
    if !is_port_name(name) {
        let message = format!("`{name}` is not a port name");
        let help = "lower-case letters, digits and `_`, a letter first".to_owned();
        map.report(at, "bad-name", message, "", Some(help));
    }
}

/// Checks that a path stays inside the folder it is relative to.
pub(crate) fn inner_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("is empty");
    }
    let mut names = 0;
    for part in Path::new(path).components() {
        match part {
            Component::Normal(_) => names += 1,
            Component::CurDir => {}
            Component::ParentDir => return Err("leaves its folder with `..`"),
            Component::RootDir | Component::Prefix(_) => return Err("is not a relative path"),
        }
    }
    if names == 0 || path.ends_with('/') {
        Err("names no file")
    } else {
        Ok(())
    }
}
