//! What a source means: `step.output`, `in.port` of a definition, `item.x`, a file.
//!
//! Names are looked up in the scope they are written in: the pipeline's, or that of one use of a
//! step definition. Knows nothing of the ports that a source is for.

use std::collections::HashMap;
use std::path::Path;

use super::definition::{Definition, INPUTS, Use, Uses, walkers};
use super::draft::{Draft, is_port_name};
use super::expr::has_expression;
use super::node::{Data, Node};
use super::source_map::{SourceMap, Span};
use super::suggest;
use crate::pipeline::Source;

/// All steps of a file.
pub(crate) struct Drafts<'a> {
    /// In file order, those of step definitions in place of their uses.
    pub(crate) list: Vec<Draft<'a>>,
    /// Name to place in `list`.
    pub(crate) by_name: HashMap<&'a str, usize>,
    /// The uses of step definitions.
    pub(crate) uses: &'a Uses,
    /// Project root.
    pub(crate) root: &'a Path,
}

impl Drafts<'_> {
    /// The places in `list` of what `name` stands for in `scope`: a step, or the steps of a use.
    /// None when there is no such thing.
    pub(crate) fn named(&self, scope: &str, name: &str) -> Option<Vec<usize>> {
        let full = format!("{scope}{name}");
        if let Some(index) = self.by_name.get(full.as_str()) {
            return Some(vec![*index]);
        }
        let used = self.uses.get(&full)?;
        let inner = used.definition.iter().flat_map(|d| &d.steps);
        let inner = inner.filter_map(|step| self.named("", step));
        Some(inner.flatten().collect())
    }

    /// The names that may stand before a dot in `scope`.
    pub(crate) fn names<'b>(&'b self, scope: &'b str) -> Vec<&'b str> {
        let steps = self.list.iter().map(|d| d.name);
        let all = steps.chain(self.uses.keys().map(String::as_str));
        all.filter_map(|name| name.strip_prefix(scope))
            .filter(|name| !name.contains('/'))
            .collect()
    }
}

/// A source and what comes out of it.
#[derive(Clone)]
pub(crate) struct Supply {
    pub(crate) source: Source,
    pub(crate) span: Span,
    /// As written, for messages.
    pub(crate) shown: String,
    /// Its type; None when it fits everywhere or is not known.
    pub(crate) ty: Option<String>,
    /// Several artifacts.
    pub(crate) many: bool,
}

/// What an item of a `foreach` variable is.
pub(crate) enum Item {
    /// An artifact of one of these types.
    Artifact(Vec<Supply>),
    /// A plain value.
    Value,
}

/// Finds what sources mean.
pub(crate) struct Sources<'a, 'b> {
    pub(crate) map: &'a mut SourceMap,
    pub(crate) drafts: &'a Drafts<'b>,
    /// The `foreach` variables.
    pub(crate) items: HashMap<String, Item>,
    /// The steps that were named, and where.
    pub(crate) waits_for: Vec<(usize, Span)>,
    /// The prefixes of the steps that walk the same items, one for each level.
    beside: Vec<String>,
}

impl<'a, 'b> Sources<'a, 'b> {
    /// For what is written in `scope`.
    pub(crate) fn new(map: &'a mut SourceMap, drafts: &'a Drafts<'b>, scope: &str) -> Self {
        Self {
            map,
            drafts,
            items: HashMap::new(),
            waits_for: Vec::new(),
            beside: walkers(drafts.uses, scope)
                .map(|(name, _)| format!("{name}/"))
                .collect(),
        }
    }

    pub(crate) fn report(
        &mut self,
        at: Span,
        code: &'static str,
        message: String,
        help: Option<String>,
    ) {
        self.map.report(at, code, message, "", help);
    }

    /// What `node` gives, written in `scope`. Nothing where something is wrong with it, which is
    /// then reported, and for an input of a definition that its use leaves out.
    pub(crate) fn supplies(&mut self, scope: &str, node: &Node) -> Vec<Supply> {
        match &node.data {
            Data::List(items) => {
                let each = items.iter().map(|item| self.supply(scope, item));
                each.collect::<Vec<_>>().into_iter().flatten().collect()
            }
            _ => self.supply(scope, node),
        }
    }

    pub(crate) fn supply(&mut self, scope: &str, node: &Node) -> Vec<Supply> {
        match &node.data {
            Data::Text(text) if has_expression(text) => {
                self.item(text, node.span).into_iter().collect()
            }
            Data::Text(text) => self.output(scope, text, node.span),
            Data::Map(_) => self.file(node).into_iter().collect(),
            // Told when the shape was checked.
            _ => Vec::new(),
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
    pub(crate) fn output(&mut self, scope: &str, text: &str, span: Span) -> Vec<Supply> {
        let Some((step, output)) = text.split_once('.') else {
            self.no_output_named(scope, text, span);
            return Vec::new();
        };
        let full = format!("{scope}{step}");
        let drafts = self.drafts;
        if step == INPUTS
            && let Some(around) = scope.strip_suffix('/').and_then(|n| drafts.uses.get(n))
        {
            return self.input_of(around, output, span);
        }
        if self.is_inside(scope, step, span) {
            return Vec::new();
        }
        if let Some(used) = drafts.uses.get(&full) {
            return self.output_of(&full, used, text, output, span);
        }
        match drafts.by_name.get(full.as_str()) {
            Some(index) => self.output_at(*index, text, output, span),
            None => {
                self.unknown_step(scope, text, step, span);
                return Vec::new();
            }
        }
        .into_iter()
        .collect()
    }

    /// Reports a name that reaches into a definition; true when it does.
    pub(crate) fn is_inside(&mut self, scope: &str, name: &str, span: Span) -> bool {
        let uses = self.drafts.uses;
        let used = name.split_once('/').map(|(used, _)| used);
        let Some(used) = used.filter(|u| uses.contains_key(&format!("{scope}{u}"))) else {
            return false;
        };
        let message = format!("`{name}` is inside the definition that `{used}` uses");
        let help = format!("name `{used}`, or one of its outputs");
        self.report(span, "unknown-step", message, Some(help));
        true
    }

    /// The output of the step at `index`.
    fn output_at(&mut self, index: usize, text: &str, output: &str, span: Span) -> Option<Supply> {
        self.waits_for.push((index, span));
        let drafts = self.drafts;
        let draft = &drafts.list[index];
        let ports = draft.outputs.as_ref();
        let port = ports.and_then(|ports| ports.iter().find(|p| p.name == output));
        if let (Some(ports), None) = (ports, port) {
            self.unknown_output(text, ports.iter().map(|p| p.name.as_str()).collect(), span);
            return None;
        }
        let beside = self.beside.iter();
        let shared = beside.filter(|prefix| draft.name.starts_with(prefix.as_str()));
        let levels = shared.count();
        let is_sibling = levels > 0;
        let many =
            port.is_some_and(|p| p.many) || (is_sibling && draft.levels(drafts.uses) > levels);
        let (step, output) = (draft.name.to_owned(), output.to_owned());
        Some(Supply {
            source: if is_sibling {
                Source::Sibling {
                    step,
                    output,
                    levels,
                    many,
                }
            } else {
                Source::Output { step, output }
            },
            span,
            shown: text.to_owned(),
            // What a command writes has the type that its reader asks for.
            ty: port.filter(|_| !draft.is_run()).map(|p| p.ty.clone()),
            many: many || (draft.fans_out() && !is_sibling),
        })
    }

    fn unknown_output(&mut self, text: &str, names: Vec<&str>, span: Span) {
        let (step, output) = text.split_once('.').unwrap_or((text, ""));
        let help = suggest::nearest(output, names.iter().copied())
            .map(|best| format!("did you mean `{step}.{best}`?"))
            .or_else(|| suggest::help(output, "its outputs", names))
            .or_else(|| Some("it has none".to_owned()));
        let message = format!("the step `{step}` has no output `{output}`");
        self.report(span, "unknown-output", message, help);
    }

    /// An input of the definition, as its use fills it.
    fn input_of(&mut self, used: &Use, name: &str, span: Span) -> Vec<Supply> {
        let Some(definition) = &used.definition else {
            return Vec::new();
        };
        let Some(port) = definition.inputs.iter().find(|p| p.name == name) else {
            let names = definition.inputs.iter().map(|p| p.name.as_str());
            let help = suggest::help(name, "its inputs", names)
                .or_else(|| Some("name it under `in:` of the definition".to_owned()));
            let message = format!("the definition has no input `{name}`");
            self.report(span, "unknown-port", message, help);
            return Vec::new();
        };
        let Some(given) = used.node.get("in").and_then(|n| n.get(name)) else {
            return Vec::new();
        };
        let mut supplies = self.supplies(&used.scope, given);
        for supply in &mut supplies {
            // Whether the use fits the port is checked there; the steps inside see the port.
            supply.span = span;
            supply.shown = format!("{INPUTS}.{name}");
            supply.ty = (port.ty != "any").then(|| port.ty.clone());
            supply.many = port.many;
        }
        supplies
    }

    /// An output of a definition: of the step inside that makes it.
    fn output_of(
        &mut self,
        name: &str,
        used: &Use,
        text: &str,
        output: &str,
        span: Span,
    ) -> Vec<Supply> {
        let Some(definition) = &used.definition else {
            return Vec::new();
        };
        let Some(entry) = definition.outputs.get(output) else {
            let names = definition.outputs.keys().map(String::as_str).collect();
            self.unknown_output(text, names, span);
            return Vec::new();
        };
        let Some(inner) = entry
            .value
            .as_text()
            .filter(|t| !self.is_broken(definition, t))
        else {
            return Vec::new();
        };
        let mut supplies = self.output(&format!("{name}/"), inner, entry.value.span);
        for supply in &mut supplies {
            supply.span = span;
            supply.shown = text.to_owned();
        }
        supplies
    }

    /// The output of a definition names what cannot be found: told where the use is checked.
    fn is_broken(&self, definition: &Definition, inner: &str) -> bool {
        let step = inner.split_once('.').map_or(inner, |(step, _)| step);
        !definition
            .steps
            .iter()
            .any(|s| s.rsplit('/').next() == Some(step))
    }

    fn unknown_step(&mut self, scope: &str, text: &str, step: &str, span: Span) {
        let steps = self.drafts.names(scope);
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
    fn no_output_named(&mut self, scope: &str, text: &str, span: Span) {
        let full = format!("{scope}{text}");
        let Some(names) = self.outputs_named(&full) else {
            if text.contains('/') || text.is_empty() || self.drafts.root.join(text).exists() {
                let help = format!("for a file of the project write `{{ file: {text} }}`");
                let message = format!("`{text}` is not an output of a step");
                return self.report(span, "bad-source", message, Some(help));
            }
            return self.unknown_step(scope, text, text, span);
        };
        let names: Vec<String> = names.iter().map(|n| format!("{text}.{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let help = (!names.is_empty()).then(|| format!("write {}", suggest::list(&names)));
        let message = format!("which output of `{text}`?");
        self.report(span, "bad-source", message, help);
    }

    /// The outputs of a step or a use.
    fn outputs_named(&self, full: &str) -> Option<Vec<&str>> {
        if let Some(used) = self.drafts.uses.get(full) {
            let outputs = used.definition.iter().flat_map(|d| d.outputs.keys());
            return Some(outputs.map(String::as_str).collect());
        }
        let draft = &self.drafts.list[*self.drafts.by_name.get(full)?];
        let outputs = draft.outputs.iter().flatten();
        Some(outputs.map(|p| p.name.as_str()).collect())
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
}

fn shown_root(root: &Path) -> String {
    let text = root.display().to_string();
    if text.is_empty() {
        "the folder you are in".into()
    } else {
        format!("`{text}`")
    }
}
