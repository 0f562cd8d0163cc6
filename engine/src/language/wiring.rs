//! What a step reads and waits for: `in`, `foreach` and `needs`, with the types of
//! the ports at both ends. Knows nothing of params.

use std::collections::{BTreeMap, BTreeSet};

use super::definition::{INPUTS, Use, around, walker};
use super::draft::Draft;
use super::expr::has_expression;
use super::node::{Data, Node};
use super::source::{Drafts, Item, Sources, Supply};
use super::source_map::{SourceMap, Span};
use super::suggest;
use super::walk::foreach;
use crate::expansion::{asks_for_item, level_of};
use crate::pipeline::{Foreach, Level, Source};
use crate::step::Port;

/// The wiring of one step.
#[derive(Default)]
pub(crate) struct Wiring {
    /// Input port to its sources.
    pub(crate) inputs: BTreeMap<String, Vec<Source>>,
    /// Ports of a command that are lists, whatever comes.
    pub(crate) lists: BTreeSet<String>,
    /// Fan-out.
    pub(crate) foreach: Option<Foreach>,
    /// Steps to finish first.
    pub(crate) needs: Vec<String>,
    /// The steps it waits for, and where it says so.
    pub(crate) waits_for: Vec<(usize, Span)>,
}

/// Wires one step.
pub(crate) fn wire(map: &mut SourceMap, drafts: &Drafts<'_>, step: &Draft<'_>) -> Wiring {
    let mut wirer = Wirer {
        sources: Sources::new(map, drafts, step.scope()),
        scope: step.scope(),
        step,
        wiring: Wiring::default(),
    };
    wirer.foreach();
    wirer.inputs();
    wirer.needs();
    Wiring {
        waits_for: wirer.sources.waits_for,
        ..wirer.wiring
    }
}

/// Checks what is given to step definitions, and what they give.
pub(crate) fn check_uses(map: &mut SourceMap, drafts: &Drafts<'_>) {
    for (name, used) in drafts.uses {
        let mut sources = Sources::new(map, drafts, &used.scope);
        check_use(&mut sources, name, used);
    }
}

fn check_use(sources: &mut Sources<'_, '_>, name: &str, used: &Use) {
    let Some(definition) = &used.definition else {
        return;
    };
    let path = used.node.get("uses").and_then(Node::as_text);
    let path = path.unwrap_or_default();
    if let Some(entry) = used.foreach() {
        // The inputs may name its variables.
        foreach(sources, &used.scope, entry);
    }
    for (port, entry) in used.node.entries("in") {
        match definition.inputs.iter().find(|p| p.name == *port) {
            None => unknown_port(sources, path, port, entry.key, &definition.inputs),
            Some(port) => {
                let supplies = sources.supplies(&used.scope, &entry.value);
                let is_list = entry.value.as_list().is_some();
                check_port(sources, port, is_list, &supplies, entry.key);
            }
        }
    }
    let given = |port: &Port| {
        used.node
            .get("in")
            .is_some_and(|n| n.get(&port.name).is_some())
    };
    for port in definition
        .inputs
        .iter()
        .filter(|p| !p.optional && !given(p))
    {
        missing(sources, path, port, &used.node, used.key);
    }
    for entry in definition.outputs.values() {
        let Some(text) = entry.value.as_text() else {
            continue;
        };
        if text.split_once('.').is_some_and(|(step, _)| step == INPUTS) {
            let message = format!("`{text}` is an input: an output is made by a step inside");
            sources.report(entry.value.span, "bad-source", message, None);
        } else {
            sources.output(&format!("{name}/"), text, entry.value.span);
        }
    }
    let names = || definition.outputs.keys().map(String::as_str);
    for (port, entry) in used.node.entries("publish") {
        if !definition.outputs.contains_key(port) {
            let help = suggest::help(port, "its outputs", names());
            let message = format!("`{path}` has no output `{port}`");
            sources.report(entry.key, "unknown-output", message, help);
        }
    }
    // Who waits is found where the steps inside are wired; here names are checked.
    needs(sources, &used.scope, &used.node);
}

struct Wirer<'a, 'b> {
    sources: Sources<'a, 'b>,
    /// The prefix of the names that the step may use.
    scope: &'a str,
    step: &'a Draft<'b>,
    wiring: Wiring,
}

impl Wirer<'_, '_> {
    fn report(&mut self, at: Span, code: &'static str, message: String, help: Option<String>) {
        self.sources.report(at, code, message, help);
    }

    // ---- in

    fn inputs(&mut self) {
        let kind = self.step.spec.uses.as_deref().unwrap_or_default();
        let ports = self.step.kind().map(|kind| kind.inputs());
        for (name, entry) in self.step.node.entries("in") {
            let port = match &ports {
                None => None,
                Some(ports) => match ports.iter().find(|p| p.name == *name) {
                    Some(port) => Some(port),
                    None => {
                        unknown_port(&mut self.sources, kind, name, entry.key, ports);
                        continue;
                    }
                },
            };
            let errors = self.sources.map.has_errors();
            let supplies = self.sources.supplies(self.scope, &entry.value);
            if let Some(port) = port {
                let is_list = entry.value.as_list().is_some();
                check_port(&mut self.sources, port, is_list, &supplies, entry.key);
                if supplies.is_empty() && !port.optional && !port.many && !errors {
                    self.left_out(port, entry.value.span);
                }
            }
            if supplies.is_empty() && !self.scope.is_empty() {
                // An input of the definition that this use leaves out.
                continue;
            }
            // A list of one; or an input that takes one, to which the use of a definition gives one
            // artifact.
            let is_list = entry.value.as_list().is_some() || supplies.iter().any(|s| s.many);
            if is_list && self.step.is_run() {
                self.wiring.lists.insert(name.clone());
            }
            let sources = supplies.into_iter().map(|s| s.source).collect();
            self.wiring.inputs.insert(name.clone(), sources);
        }
        let in_node = self.step.node.get("in");
        let given = |port: &Port| in_node.is_some_and(|n| n.get(&port.name).is_some());
        for port in ports.iter().flatten().filter(|p| !p.optional && !given(p)) {
            missing(&mut self.sources, kind, port, self.step.node, self.step.key);
        }
    }

    /// A port that must be filled has an input that may be left out, and was.
    fn left_out(&mut self, port: &Port, span: Span) {
        if self.sources.map.has_error_in(span) {
            return;
        }
        let message = format!(
            "the input `{}` must be given, but this use leaves it out",
            port.name
        );
        let help = "give it, or make the definition's input one that is not `optional`".to_owned();
        self.report(span, "missing-input", message, Some(help));
    }

    // ---- foreach

    /// The lists that the step walks: those of the uses around it, outermost first, and its own.
    fn foreach(&mut self) {
        let uses = self.sources.drafts.uses;
        // A step that was handed none is one too many: that was told.
        let Some(found) = self.step.node.entry("foreach") else {
            return;
        };
        let mut levels: Vec<Level> = Vec::new();
        let uses_around: Vec<(&str, &Use)> = around(uses, self.scope).collect();
        for (name, used) in uses_around.into_iter().rev() {
            if let Some(entry) = used.foreach() {
                let Some(level) = foreach(&mut self.sources, &used.scope, entry) else {
                    return;
                };
                levels.push(Level {
                    walker: Some(name.to_owned()),
                    ..level
                });
            }
            let Some(level) = levels.last_mut() else {
                continue;
            };
            level.bound.extend(used.bound.iter().cloned());
            let when = used.node.get("when").and_then(Node::as_text);
            if let Some(when) = when.filter(|when| asks_for_item(when)) {
                // Each holds those of the uses around it: a param is asked for only where it is
                // there.
                let at = level_of(when, &levels);
                let conditions = &mut levels[at].conditions;
                if !conditions.iter().any(|other| other == when) {
                    conditions.push(when.to_owned());
                }
            }
        }
        let handed = walker(uses, self.scope).and_then(|(_, used)| used.foreach());
        if handed.is_none_or(|handed| handed.key != found.key) {
            levels.extend(foreach(&mut self.sources, self.scope, found));
        }
        if !levels.is_empty() {
            self.wiring.foreach = Some(Foreach { levels });
        }
    }

    // ---- needs

    /// What the step must wait for, and what the uses around it must.
    fn needs(&mut self) {
        let mut wants = needs(&mut self.sources, self.scope, self.step.node);
        let uses = self.sources.drafts.uses;
        let mut around = self.scope.strip_suffix('/').and_then(|name| uses.get(name));
        while let Some(used) = around {
            // Told once, where the use is checked.
            wants.extend(needs(&mut self.sources, &used.scope, &used.node));
            around = used.scope.strip_suffix('/').and_then(|name| uses.get(name));
        }
        for (index, span) in wants {
            self.sources.waits_for.push((index, span));
            let name = self.sources.drafts.list[index].name;
            if !self.wiring.needs.iter().any(|n| n == name) {
                self.wiring.needs.push(name.to_owned());
            }
        }
    }
}

/// The steps that the `needs` of a step or a use name, and where.
fn needs(sources: &mut Sources<'_, '_>, scope: &str, node: &Node) -> Vec<(usize, Span)> {
    let list = node.get("needs").and_then(Node::as_list);
    let mut found = Vec::new();
    for item in list.unwrap_or_default() {
        let Some(name) = item.as_text().filter(|t| !has_expression(t)) else {
            continue;
        };
        if sources.is_inside(scope, name, item.span) {
            continue;
        }
        match sources.drafts.named(scope, name) {
            Some(steps) => found.extend(steps.into_iter().map(|step| (step, item.span))),
            None => {
                let names = sources.drafts.names(scope);
                let help = match name.split_once('.') {
                    Some((step, _)) if names.contains(&step) => {
                        Some(format!("`needs` takes the step alone: `{step}`"))
                    }
                    _ => suggest::help(name, "steps", names),
                };
                let message = format!("there is no step `{name}`");
                sources.report(item.span, "unknown-step", message, help);
            }
        }
    }
    found
}

fn unknown_port(sources: &mut Sources<'_, '_>, kind: &str, name: &str, at: Span, ports: &[Port]) {
    let names = ports.iter().map(|p| p.name.as_str());
    let help = suggest::help(name, "inputs", names).or_else(|| Some("it takes none".into()));
    let message = format!("`{kind}` has no input `{name}`");
    sources.report(at, "unknown-port", message, help);
}

/// `node` does not fill a port; `key` is where its name is written.
fn missing(sources: &mut Sources<'_, '_>, kind: &str, port: &Port, node: &Node, key: Span) {
    // `in` itself has a wrong shape: that was told already.
    let shapeless = |n: &Node| n.as_map().is_none() && n.data != Data::Null;
    if node.get("in").is_some_and(shapeless) {
        return;
    }
    let at = node.place(&["in".to_owned()], true, key);
    let message = format!("`{kind}` needs the input `{}`", port.name);
    let help = if port.about.is_empty() {
        format!("an artifact of type `{}`", port.ty)
    } else {
        format!("{} (type `{}`)", port.about, port.ty)
    };
    sources.report(at, "missing-input", message, Some(help));
}

fn check_port(
    sources: &mut Sources<'_, '_>,
    port: &Port,
    is_list: bool,
    supplies: &[Supply],
    key: Span,
) {
    for supply in supplies {
        check_type(sources, port, supply);
    }
    if port.many {
        return;
    }
    if is_list && supplies.len() > 1 {
        let message = format!("the input `{}` takes one artifact, not a list", port.name);
        sources.report(key, "list-into-single", message, None);
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
        sources.report(supply.span, "list-into-single", message, Some(help));
    }
}

fn check_type(sources: &mut Sources<'_, '_>, port: &Port, supply: &Supply) {
    let each = match &supply.source {
        Source::Item(name) => match sources.items.get(name) {
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
    let help = outputs_of_type(sources.drafts, &port.ty);
    sources.report(supply.span, "port-type", message, help);
}

/// Outputs that would fit, for help.
fn outputs_of_type(drafts: &Drafts<'_>, ty: &str) -> Option<String> {
    let mut found = Vec::new();
    for draft in &drafts.list {
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

/// Whether an artifact of type `ty` may be handed to `port`.
fn fits(ty: Option<&str>, port: &Port) -> bool {
    ty.is_none_or(|ty| ty == port.ty || ty == "any" || port.ty == "any")
}
