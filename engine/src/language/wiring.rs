//! What a step reads and waits for: `in`, `foreach` and `needs`, with the types of
//! the ports at both ends. Knows nothing of params.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value;

use super::draft::{Draft, is_port_name};
use super::expr::has_expression;
use super::node::{Data, Node};
use super::resolution::MAX_PARALLEL;
use super::source_map::{SourceMap, Span};
use super::suggest;
use crate::pipeline::{Foreach, ForeachList, Source};
use crate::step::Port;

/// All steps of a file.
pub(crate) struct Drafts<'a> {
    /// In file order.
    pub(crate) list: Vec<Draft<'a>>,
    /// Name to place in `list`.
    pub(crate) by_name: HashMap<&'a str, usize>,
    /// Project root.
    pub(crate) root: &'a Path,
}

/// The wiring of one step.
#[derive(Default)]
pub(crate) struct Wiring {
    /// Input port to its sources.
    pub(crate) inputs: BTreeMap<String, Vec<Source>>,
    /// Fan-out.
    pub(crate) foreach: Option<Foreach>,
    /// Steps to finish first.
    pub(crate) needs: Vec<String>,
    /// The steps it waits for, and where it says so.
    pub(crate) waits_for: Vec<(usize, Span)>,
}

/// A source and what comes out of it.
struct Supply {
    source: Source,
    span: Span,
    /// As written, for messages.
    shown: String,
    /// Its type; None when it fits everywhere or is not known.
    ty: Option<String>,
    /// Several artifacts.
    many: bool,
}

/// What an item of a `foreach` variable is.
enum Item {
    /// An artifact of one of these types.
    Artifact(Vec<Supply>),
    /// A plain value.
    Value,
}

/// Wires one step.
pub(crate) fn wire(map: &mut SourceMap, drafts: &Drafts<'_>, step: &Draft<'_>) -> Wiring {
    let mut wirer = Wirer {
        map,
        drafts,
        step,
        wiring: Wiring::default(),
        items: HashMap::new(),
    };
    wirer.foreach();
    wirer.inputs();
    wirer.needs();
    wirer.wiring
}

struct Wirer<'a, 'b> {
    map: &'a mut SourceMap,
    drafts: &'a Drafts<'b>,
    step: &'a Draft<'b>,
    wiring: Wiring,
    items: HashMap<String, Item>,
}

impl Wirer<'_, '_> {
    fn report(&mut self, at: Span, code: &'static str, message: String, help: Option<String>) {
        self.map.report(at, code, message, "", help);
    }

    // ---- in

    fn inputs(&mut self) {
        let ports = self.step.kind().map(|kind| kind.inputs());
        for (name, entry) in self.step.node.entries("in") {
            let port = match &ports {
                None => None,
                Some(ports) => match ports.iter().find(|p| p.name == *name) {
                    Some(port) => Some(port),
                    None => {
                        self.unknown_port(name, entry.key, ports);
                        continue;
                    }
                },
            };
            let supplies = self.supplies(&entry.value);
            if let Some(port) = port {
                let is_list = entry.value.as_list().is_some();
                self.check_port(port, is_list, &supplies, entry.key);
            }
            let sources = supplies.into_iter().map(|s| s.source).collect();
            self.wiring.inputs.insert(name.clone(), sources);
        }
        for port in ports.iter().flatten().filter(|p| !p.optional) {
            if self
                .step
                .node
                .get("in")
                .and_then(|n| n.get(&port.name))
                .is_none()
            {
                self.missing(port);
            }
        }
    }

    fn unknown_port(&mut self, name: &str, at: Span, ports: &[Port]) {
        let kind = self.step.spec.uses.as_deref().unwrap_or_default();
        let names = ports.iter().map(|p| p.name.as_str());
        let help = suggest::help(name, "inputs", names).or_else(|| Some("it takes none".into()));
        self.report(
            at,
            "unknown-port",
            format!("`{kind}` has no input `{name}`"),
            help,
        );
    }

    fn missing(&mut self, port: &Port) {
        // `in` itself has a wrong shape: that was told already.
        if self
            .step
            .node
            .get("in")
            .is_some_and(|n| n.as_map().is_none() && n.data != Data::Null)
        {
            return;
        }
        let kind = self.step.spec.uses.as_deref().unwrap_or_default();
        let at = self.step.key_of(&["in"]);
        let message = format!("`{kind}` needs the input `{}`", port.name);
        let help = format!("{} (type `{}`)", port.about, port.ty);
        self.report(at, "missing-input", message, Some(help));
    }

    fn check_port(&mut self, port: &Port, is_list: bool, supplies: &[Supply], key: Span) {
        for supply in supplies {
            self.check_type(port, supply);
        }
        if port.many {
            return;
        }
        if is_list && supplies.len() > 1 {
            let message = format!("the input `{}` takes one artifact, not a list", port.name);
            self.report(key, "list-into-single", message, None);
            return;
        }
        for supply in supplies.iter().filter(|s| s.many) {
            let message = format!(
                "`{}` is a list, but `{}` takes one artifact",
                supply.shown, port.name
            );
            let help = format!(
                "run the step once for each: `foreach: {{ item: {} }}` and `{}: ${{{{ item.item }}}}`",
                supply.shown, port.name
            );
            self.report(supply.span, "list-into-single", message, Some(help));
        }
    }

    fn check_type(&mut self, port: &Port, supply: &Supply) {
        let each = match &supply.source {
            Source::Item(name) => match self.items.get(name) {
                Some(Item::Artifact(each)) => each.as_slice(),
                _ => return,
            },
            _ => std::slice::from_ref(supply),
        };
        let Some(wrong) = each.iter().find(|s| !fits(s.ty.as_deref(), port)) else {
            return;
        };
        let ty = wrong.ty.as_deref().unwrap_or_default();
        let message = format!(
            "`{}` is `{ty}`, but the input `{}` takes `{}`",
            wrong.shown, port.name, port.ty
        );
        let help = self.outputs_of_type(&port.ty);
        self.report(supply.span, "port-type", message, help);
    }

    /// Outputs that would fit, for help.
    fn outputs_of_type(&self, ty: &str) -> Option<String> {
        let mut found = Vec::new();
        for draft in &self.drafts.list {
            for port in draft.outputs.iter().flatten().filter(|p| p.ty == ty) {
                found.push(format!("{}.{}", draft.name, port.name));
            }
            if found.len() > 12 {
                break;
            }
        }
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        (!found.is_empty()).then(|| format!("outputs of type `{ty}`: {}", suggest::list(&found)))
    }

    // ---- sources

    fn supplies(&mut self, node: &Node) -> Vec<Supply> {
        match &node.data {
            Data::List(items) => items.iter().filter_map(|item| self.supply(item)).collect(),
            _ => self.supply(node).into_iter().collect(),
        }
    }

    fn supply(&mut self, node: &Node) -> Option<Supply> {
        match &node.data {
            Data::Text(text) if has_expression(text) => self.item(text, node.span),
            Data::Text(text) => self.output(text, node.span),
            Data::Map(_) => self.file(node),
            // Told when the shape was checked.
            _ => None,
        }
    }

    /// `${{ item.x }}`
    fn item(&mut self, text: &str, span: Span) -> Option<Supply> {
        if self.map.has_error_in(span) {
            return None;
        }
        let inner = text
            .trim()
            .strip_prefix("${{")
            .and_then(|t| t.strip_suffix("}}"));
        let name = inner
            .and_then(|t| t.trim().strip_prefix("item."))
            .filter(|n| is_port_name(n));
        let Some(name) = name else {
            let help = "write `${{ item.x }}` alone, or `step.output`".to_owned();
            let message = "an input takes a whole item, not a text made from it".to_owned();
            self.report(span, "bad-source", message, Some(help));
            return None;
        };
        if matches!(self.items.get(name), Some(Item::Value)) {
            let message = format!("`item.{name}` is a plain value, not an artifact");
            let help = "plain values are used in `with` or `env`".to_owned();
            self.report(span, "port-type", message, Some(help));
            return None;
        }
        let source = Source::Item(name.to_owned());
        Some(Supply {
            source,
            span,
            shown: format!("item.{name}"),
            ty: None,
            many: false,
        })
    }

    /// `step.output`
    fn output(&mut self, text: &str, span: Span) -> Option<Supply> {
        let Some((step, output)) = text.split_once('.') else {
            self.no_output_named(text, span);
            return None;
        };
        let Some(index) = self.drafts.by_name.get(step).copied() else {
            self.unknown_step(text, step, span);
            return None;
        };
        self.wiring.waits_for.push((index, span));
        let draft = &self.drafts.list[index];
        let mut supply = Supply {
            source: Source::Output {
                step: step.to_owned(),
                output: output.to_owned(),
            },
            span,
            shown: text.to_owned(),
            ty: None,
            many: draft.fans_out(),
        };
        let Some(ports) = &draft.outputs else {
            return Some(supply);
        };
        let Some(port) = ports.iter().find(|p| p.name == output) else {
            let names: Vec<&str> = ports.iter().map(|p| p.name.as_str()).collect();
            let help = suggest::nearest(output, names.iter().copied())
                .map(|best| format!("did you mean `{step}.{best}`?"))
                .or_else(|| suggest::help(output, "its outputs", names))
                .or_else(|| Some("it has none".to_owned()));
            let message = format!("the step `{step}` has no output `{output}`");
            self.report(span, "unknown-output", message, help);
            return None;
        };
        supply.many |= port.many;
        // What a command writes has the type that its reader asks for.
        supply.ty = (!draft.is_run()).then(|| port.ty.clone());
        Some(supply)
    }

    fn unknown_step(&mut self, text: &str, step: &str, span: Span) {
        let steps: Vec<&str> = self.drafts.list.iter().map(|d| d.name).collect();
        let output = text
            .split_once('.')
            .map(|(_, output)| output)
            .unwrap_or_default();
        let help = if self.drafts.root.join(text).exists() || text.contains('/') {
            Some(format!(
                "for a file of the project write `{{ file: {text} }}`"
            ))
        } else {
            suggest::nearest(step, steps.iter().copied())
                .map(|best| format!("did you mean `{best}.{output}`?"))
                .or_else(|| suggest::help(step, "steps", steps))
        };
        self.report(
            span,
            "unknown-step",
            format!("there is no step `{step}`"),
            help,
        );
    }

    /// A text without a dot.
    fn no_output_named(&mut self, text: &str, span: Span) {
        let Some(index) = self.drafts.by_name.get(text) else {
            if text.contains('/') || text.is_empty() || self.drafts.root.join(text).exists() {
                let help = format!("for a file of the project write `{{ file: {text} }}`");
                let message = format!("`{text}` is not an output of a step");
                return self.report(span, "bad-source", message, Some(help));
            }
            return self.unknown_step(text, text, span);
        };
        let ports = self.drafts.list[*index].outputs.iter().flatten();
        let names: Vec<String> = ports.map(|p| format!("{text}.{}", p.name)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let help = (!names.is_empty()).then(|| format!("write {}", suggest::list(&names)));
        let message = format!("which output of `{text}`?");
        self.report(span, "bad-source", message, help);
    }

    /// `{ file: path }`
    fn file(&mut self, node: &Node) -> Option<Supply> {
        let file = node.get("file")?;
        let path = file.as_text()?;
        if has_expression(path) {
            if !self.map.has_error_in(file.span) {
                let message = "a file is known before the run; it cannot depend on `item`";
                self.report(file.span, "bad-source", message.to_owned(), None);
            }
            return None;
        }
        if path.is_empty() || !self.drafts.root.join(path).exists() {
            let help = format!("paths are relative to {}", shown_root(self.drafts.root));
            self.report(
                file.span,
                "missing-file",
                format!("there is no file `{path}`"),
                Some(help),
            );
            return None;
        }
        Some(Supply {
            source: Source::File(path.into()),
            span: file.span,
            shown: path.to_owned(),
            ty: None,
            many: false,
        })
    }

    // ---- foreach

    fn foreach(&mut self) {
        let Some(node) = self.step.node.get("foreach") else {
            return;
        };
        let Some(entries) = node.as_map() else { return };
        let mut foreach = Foreach {
            vars: BTreeMap::new(),
            max_parallel: None,
        };
        let mut lengths: Vec<(String, usize, Span)> = Vec::new();
        for (name, entry) in entries {
            if name == MAX_PARALLEL {
                let value = entry.value.to_value().as_u64();
                foreach.max_parallel = value.and_then(|n| usize::try_from(n).ok());
                continue;
            }
            if !is_port_name(name) {
                let help = "lower-case letters, digits and `_`, a letter first".to_owned();
                let message = format!("`{name}` is not a name for a variable");
                self.report(entry.key, "bad-name", message, Some(help));
            }
            let Some(list) = self.foreach_list(name, &entry.value) else {
                continue;
            };
            if let ForeachList::Values(values) = &list {
                lengths.push((name.clone(), values.len(), entry.key));
            }
            foreach.vars.insert(name.clone(), list);
        }
        if let [(first, length, _), rest @ ..] = lengths.as_slice()
            && let Some((name, other, at)) = rest.iter().find(|(_, n, _)| n != length)
        {
            let message = format!("`{name}` has {other} values, but `{first}` has {length}");
            let help = "several variables are walked in step, so their lists are equally long";
            self.map
                .report(*at, "foreach-length", message, "", Some(help.to_owned()));
        }
        if entries.keys().all(|k| k == MAX_PARALLEL) {
            let at = self.step.key_of(&["foreach"]);
            let help = "for example `foreach: { checkpoint: finetune.checkpoints }`".to_owned();
            self.report(
                at,
                "foreach-empty",
                "`foreach` has no variable".into(),
                Some(help),
            );
        }
        self.wiring.foreach = Some(foreach);
    }

    fn foreach_list(&mut self, name: &str, node: &Node) -> Option<ForeachList> {
        match &node.data {
            Data::Text(text) if has_expression(text) => {
                if !self.map.has_error_in(node.span) {
                    let message = "`foreach` walks a list known here".to_owned();
                    self.report(node.span, "bad-source", message, None);
                }
                None
            }
            Data::Text(text) => {
                let supply = self.output(text, node.span)?;
                if supply.ty.is_some() && !supply.many {
                    let message = format!("`{text}` is one artifact, not a list");
                    let help = format!("to walk just this one write `[{text}]`");
                    self.report(node.span, "foreach-single", message, Some(help));
                }
                Some(self.artifacts(name, vec![supply]))
            }
            Data::List(items) if self.are_sources(items) => {
                let supplies = items.iter().filter_map(|item| self.element(item)).collect();
                Some(self.artifacts(name, supplies))
            }
            Data::List(items) => {
                self.items.insert(name.to_owned(), Item::Value);
                let values: Vec<Value> = items.iter().map(Node::to_value).collect();
                Some(ForeachList::Values(values))
            }
            _ => None,
        }
    }

    /// One element of a list of artifacts.
    fn element(&mut self, node: &Node) -> Option<Supply> {
        if node.as_map().is_some() {
            let message = "`foreach` walks outputs of steps, not files".to_owned();
            let help = "walk the file names: they are plain values, for `with` or `run`".to_owned();
            self.report(node.span, "bad-source", message, Some(help));
            return None;
        }
        self.supply(node)
    }

    fn artifacts(&mut self, name: &str, supplies: Vec<Supply>) -> ForeachList {
        let sources = supplies.iter().map(|s| s.source.clone()).collect();
        self.items.insert(name.to_owned(), Item::Artifact(supplies));
        ForeachList::Artifacts(sources)
    }

    /// Whether a list is one of artifacts: every element has the form of a source, and one of
    /// them names a step (or nearly does) or a file.
    fn are_sources(&self, items: &[Node]) -> bool {
        let mut certain = false;
        for item in items {
            match &item.data {
                Data::Map(map) if map.len() == 1 && map.contains_key("file") => certain = true,
                Data::Text(text) => {
                    let Some((step, output)) = text.split_once('.') else {
                        return false;
                    };
                    if !is_port_name(output) {
                        return false;
                    }
                    certain |= self.drafts.by_name.contains_key(step)
                        || suggest::nearest(step, self.drafts.by_name.keys().copied()).is_some();
                }
                _ => return false,
            }
        }
        certain
    }

    // ---- needs

    fn needs(&mut self) {
        let list = self
            .step
            .node
            .get("needs")
            .and_then(Node::as_list)
            .unwrap_or_default();
        for item in list {
            let Some(name) = item.as_text().filter(|t| !has_expression(t)) else {
                continue;
            };
            match self.drafts.by_name.get(name) {
                Some(index) => {
                    self.wiring.waits_for.push((*index, item.span));
                    if !self.wiring.needs.iter().any(|n| n == name) {
                        self.wiring.needs.push(name.to_owned());
                    }
                }
                None => {
                    let steps = self.drafts.list.iter().map(|d| d.name);
                    let help = match name.split_once('.') {
                        Some((step, _)) if self.drafts.by_name.contains_key(step) => {
                            Some(format!("`needs` takes the step alone: `{step}`"))
                        }
                        _ => suggest::help(name, "steps", steps),
                    };
                    let message = format!("there is no step `{name}`");
                    self.report(item.span, "unknown-step", message, help);
                }
            }
        }
    }
}

/// Whether an artifact of type `ty` may be handed to `port`.
fn fits(ty: Option<&str>, port: &Port) -> bool {
    ty.is_none_or(|ty| ty == port.ty || ty == "any" || port.ty == "any")
}

fn shown_root(root: &Path) -> String {
    let text = root.display().to_string();
    if text.is_empty() {
        "the folder you are in".into()
    } else {
        format!("`{text}`")
    }
}
