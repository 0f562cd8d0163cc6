//! What a `foreach` walks: plain values, or artifacts that steps make. Knows nothing of who walks.

use serde_json::Value;

use super::definition::{INPUTS, walker};
use super::draft::is_port_name;
use super::expr::{has_expression, holds_expression, unescaped};
use super::node::{Data, Entry, Node};
use super::resolution::MAX_PARALLEL;
use super::source::{Item, Sources, Supply};
use super::source_map::Span;
use super::suggest;
use crate::pipeline::{ForeachList, Level, Source};

/// Reads the `foreach` of `entry`, whose names are those of `scope`. Its variables are known to
/// `sources` from then on. None when it has a wrong shape.
pub(crate) fn foreach(sources: &mut Sources<'_, '_>, scope: &str, entry: &Entry) -> Option<Level> {
    let within = walker(sources.drafts.uses, scope).is_some();
    let walk = Walk {
        sources,
        scope,
        within,
    };
    walk.foreach(entry)
}

struct Walk<'s, 'a, 'b> {
    sources: &'s mut Sources<'a, 'b>,
    /// The prefix of the names that it may use.
    scope: &'s str,
    /// It stands in a definition whose use is walked: its lists may differ from item to item.
    within: bool,
}

impl Walk<'_, '_, '_> {
    fn report(&mut self, at: Span, code: &'static str, message: String, help: Option<String>) {
        self.sources.report(at, code, message, help);
    }

    fn foreach(mut self, entry: &Entry) -> Option<Level> {
        let entries = entry.value.as_map()?;
        let mut level = Level::default();
        let mut lengths: Vec<(String, usize, Span)> = Vec::new();
        for (name, entry) in entries {
            if name == MAX_PARALLEL {
                let value = entry.value.to_value().as_u64();
                level.max_parallel = value.and_then(|n| usize::try_from(n).ok());
                continue;
            }
            if !is_port_name(name) {
                let help = "lower-case letters, digits and `_`, a letter first".to_owned();
                let message = format!("`{name}` is not a name for a variable");
                self.report(entry.key, "bad-name", message, Some(help));
            }
            let Some(list) = self.list(name, &entry.value) else {
                continue;
            };
            if let ForeachList::Values(values) = &list {
                lengths.push((name.clone(), values.len(), entry.key));
            }
            level.vars.insert(name.clone(), list);
        }
        if let [(first, length, _), rest @ ..] = lengths.as_slice()
            && let Some((name, other, at)) = rest.iter().find(|(_, n, _)| n != length)
        {
            let message = format!("`{name}` has {other} values, but `{first}` has {length}");
            let help = "several variables are walked in step, so their lists are equally long";
            self.report(*at, "foreach-length", message, Some(help.to_owned()));
        }
        if entries.keys().all(|k| k == MAX_PARALLEL) {
            let help = "for example `foreach: { checkpoint: finetune.checkpoints }`".to_owned();
            self.report(
                entry.key,
                "foreach-empty",
                "`foreach` has no variable".into(),
                Some(help),
            );
        }
        Some(level)
    }

    fn list(&mut self, name: &str, node: &Node) -> Option<ForeachList> {
        match &node.data {
            Data::Text(text) if has_expression(text) => {
                let text = text.trim();
                if self.within && text.starts_with("${{") && text.ends_with("}}") {
                    self.sources.items.insert(name.to_owned(), Item::Value);
                    return Some(ForeachList::PerItem(Value::String(text.to_owned())));
                }
                if !self.sources.map.has_error_in(node.span) {
                    let message = "`foreach` walks a list".to_owned();
                    let help = "give one expression alone that is a list: `${{ params.list }}`";
                    self.report(node.span, "bad-source", message, Some(help.to_owned()));
                }
                None
            }
            Data::Text(text) => {
                let supplies = self.sources.output(self.scope, text, node.span);
                if let [supply] = supplies.as_slice()
                    && supply.ty.is_some()
                    && !supply.many
                {
                    let message = format!("`{text}` is one artifact, not a list");
                    let help = format!("to walk just this one write `[{text}]`");
                    self.report(node.span, "foreach-single", message, Some(help));
                }
                Some(self.artifacts(name, supplies))
            }
            Data::List(items) if self.are_sources(items) => {
                let each = items.iter().map(|item| self.element(item));
                let supplies = each.collect::<Vec<_>>().into_iter().flatten().collect();
                Some(self.artifacts(name, supplies))
            }
            Data::List(items) => {
                self.sources.items.insert(name.to_owned(), Item::Value);
                let values: Vec<Value> = items.iter().map(Node::to_value).collect();
                if !self.within {
                    return Some(ForeachList::Values(values));
                }
                // What does not wait for the item around was to be read once more with the rest.
                Some(if values.iter().any(holds_expression) {
                    ForeachList::PerItem(Value::Array(values))
                } else {
                    ForeachList::Values(values.into_iter().map(unescaped).collect())
                })
            }
            _ => None,
        }
    }

    /// One element of a list of artifacts.
    fn element(&mut self, node: &Node) -> Vec<Supply> {
        if node.as_map().is_some() {
            let message = "`foreach` walks outputs of steps, not files".to_owned();
            let help = "walk the file names: they are plain values, for `with` or `run`".to_owned();
            self.report(node.span, "bad-source", message, Some(help));
            return Vec::new();
        }
        self.sources.supply(self.scope, node)
    }

    fn artifacts(&mut self, name: &str, supplies: Vec<Supply>) -> ForeachList {
        let file = supplies
            .iter()
            .find(|s| matches!(s.source, Source::File(_)));
        if let Some(supply) = file {
            let (span, shown) = (supply.span, supply.shown.clone());
            let message = format!("`foreach` walks outputs of steps, but `{shown}` is a file here");
            self.report(span, "bad-source", message, None);
        }
        let sources = supplies.iter().map(|s| s.source.clone()).collect();
        self.sources
            .items
            .insert(name.to_owned(), Item::Artifact(supplies));
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
                    let drafts = self.sources.drafts;
                    certain |= drafts.named(self.scope, step).is_some()
                        || (step == INPUTS && !self.scope.is_empty())
                        || suggest::nearest(step, drafts.names(self.scope)).is_some();
                }
                _ => return false,
            }
        }
        certain
    }
}
