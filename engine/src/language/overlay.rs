//! Laying one tree over another: included files, profiles, `--set`.
//!
//! Maps are merged, everything else is replaced, null takes out (RFC 7386), with
//! two exceptions: in `params` null is a value; and an entry of `models` or
//! `programs` that names another variant of its type replaces the whole entry,
//! since fields of one variant mean nothing in another.

use serde_json::Value;

use super::load::value_of;
use super::node::{Data, Entry, Node, describe};
use super::source_map::{SourceMap, Span};
use super::{suggest, variant};

/// The schemas that tell the variants of models and programs apart.
pub(crate) struct Variants<'a> {
    pub(crate) model: &'a Value,
    pub(crate) program: &'a Value,
}

/// Lays `over` on `under`; both are whole files or profiles.
pub(crate) fn merge(under: &mut Node, over: Node, variants: &Variants<'_>) {
    let Data::Map(sections) = over.data else {
        return;
    };
    let Some(target) = under.as_map_mut() else {
        return;
    };
    for (name, section) in sections {
        let Some(slot) = target.get_mut(&name) else {
            target.insert(name, section);
            continue;
        };
        slot.key = section.key;
        match name.as_str() {
            "params" => deep(&mut slot.value, section.value, Null::IsValue),
            "models" => entries(&mut slot.value, section.value, variants.model),
            "programs" => entries(&mut slot.value, section.value, variants.program),
            _ => deep(&mut slot.value, section.value, Null::TakesOut),
        }
    }
}

/// What null in an overlay means.
#[derive(Clone, Copy, PartialEq)]
enum Null {
    IsValue,
    TakesOut,
}

fn deep(under: &mut Node, over: Node, null: Null) {
    let (Data::Map(target), true) = (&mut under.data, matches!(over.data, Data::Map(_))) else {
        *under = over;
        return;
    };
    let Data::Map(source) = over.data else { return };
    for (key, entry) in source {
        let takes_out = entry.value.data == Data::Null && null == Null::TakesOut;
        match target.get_mut(&key) {
            Some(_) if takes_out => {
                target.shift_remove(&key);
            }
            Some(slot) => {
                slot.key = entry.key;
                deep(&mut slot.value, entry.value, null);
            }
            None => {
                target.insert(key, entry);
            }
        }
    }
}

/// As [`deep`], one entry at a time, where another variant replaces.
fn entries(under: &mut Node, over: Node, schema: &Value) {
    let (Data::Map(target), true) = (&mut under.data, matches!(over.data, Data::Map(_))) else {
        *under = over;
        return;
    };
    let Data::Map(source) = over.data else { return };
    for (key, entry) in source {
        let Some(slot) = target.get_mut(&key) else {
            target.insert(key, entry);
            continue;
        };
        if entry.value.data == Data::Null {
            target.shift_remove(&key);
            continue;
        }
        slot.key = entry.key;
        let variant = |node: &Node| variant::named(schema, schema, &node.to_value());
        let (old, new) = (variant(&slot.value), variant(&entry.value));
        if new.is_some() && old != new {
            slot.value = entry.value;
        } else {
            deep(&mut slot.value, entry.value, Null::TakesOut);
        }
    }
}

/// Lays the named profiles over the file, in order.
pub(crate) fn apply_profiles(
    map: &mut SourceMap,
    root: &mut Node,
    names: &[String],
    variants: &Variants<'_>,
) {
    for name in names {
        let Some(entry) = root.get("profiles").and_then(|p| p.entry(name)) else {
            let known: Vec<&str> = root.entries("profiles").map(|(k, _)| k.as_str()).collect();
            let help = suggest::help(name, "profiles", known)
                .or_else(|| Some("the file has no `profiles:`".to_owned()));
            let at = root.entry("profiles").map_or(root.span, |e| e.key);
            let message = format!("there is no profile `{name}`");
            map.report(at, "unknown-profile", message, "", help);
            continue;
        };
        let mut profile = entry.value.clone();
        profile.remove(&["about".to_owned()]);
        for (param, entry) in profile.entries("params") {
            let default = root.get("params").and_then(|p| p.get(param));
            check_param(map, root, param, default, &entry.value, entry.key);
        }
        merge(root, profile, variants);
    }
}

/// A profile may change a param, not add one or change its type.
fn check_param(
    map: &mut SourceMap,
    root: &Node,
    name: &str,
    default: Option<&Node>,
    value: &Node,
    key: Span,
) {
    let Some(default) = default else {
        let known: Vec<&str> = root.entries("params").map(|(k, _)| k.as_str()).collect();
        let help = suggest::nearest(name, known)
            .map(|best| format!("did you mean `{best}`?"))
            .unwrap_or_else(|| "give it a default under the file's own `params:`".to_owned());
        map.report(
            key,
            "unknown-param",
            format!("unknown param `{name}`"),
            "",
            Some(help),
        );
        return;
    };
    if let Err(message) = fits(name, &default.data, &value.data) {
        let span = if value.is_container() {
            key
        } else {
            value.span
        };
        map.report(span, "param-type", message, "", None);
    }
}

/// Changes params as `--set name=value` says. `name` may be dotted.
pub(crate) fn apply_sets(map: &mut SourceMap, root: &mut Node, sets: &[(String, String)]) {
    for (name, text) in sets {
        let at = root.entry("params").map_or(root.span, |e| e.key);
        let params = root.as_map_mut().and_then(|m| m.get_mut("params"));
        let known = match params.map(|e| find(&mut e.value, name)) {
            Some(Ok(node)) => {
                let span = node.span;
                match parse(name, &node.data, text) {
                    Ok(data) => *node = at_span(data, span),
                    Err(message) => {
                        let label = "the default is here";
                        map.report(span, "param-type", message, label, None);
                    }
                }
                continue;
            }
            Some(Err(known)) => known,
            None => Vec::new(),
        };
        let help = suggest::help(name, "params", known.iter().map(String::as_str))
            .or_else(|| Some("the file has no `params:`".to_owned()));
        let message = format!("`--set {name}={text}`: unknown param `{name}`");
        map.report(at, "unknown-param", message, "", help);
    }
}

/// The param `name`, whole or as a dotted path; else the names that would have done.
fn find<'a>(params: &'a mut Node, name: &str) -> Result<&'a mut Node, Vec<String>> {
    let mut path = vec![name.to_owned()];
    if params.get(name).is_none() {
        path = name.split('.').map(str::to_owned).collect();
    }
    let mut prefix = String::new();
    let mut node = params;
    for segment in path {
        if node.get(&segment).is_none() {
            let keys = node
                .as_map()
                .map(|m| m.keys().map(|k| format!("{prefix}{k}")).collect());
            return Err(keys.unwrap_or_default());
        }
        prefix.push_str(&segment);
        prefix.push('.');
        let Some(entry) = node.as_map_mut().and_then(|m| m.get_mut(&segment)) else {
            return Err(Vec::new());
        };
        node = &mut entry.value;
    }
    Ok(node)
}

/// The value of `--set`, of the type of the default.
fn parse(name: &str, default: &Data, text: &str) -> Result<Data, String> {
    if let Data::Text(_) = default {
        return Ok(Data::Text(text.to_owned()));
    }
    let data = match text.trim() {
        "" => Data::Null,
        _ => value_of(text).ok_or_else(|| format!("`--set {name}={text}` is not valid YAML"))?,
    };
    fits(name, default, &data).map_err(|why| format!("`--set {name}={text}`: {why}"))?;
    Ok(data)
}

/// Checks that a value has the type of the default it takes the place of.
pub(crate) fn fits(name: &str, default: &Data, value: &Data) -> Result<(), String> {
    let same = match (default, value) {
        (Data::Null, _) => true,
        (Data::Number(old), Data::Number(new)) => old.is_f64() || !new.is_f64(),
        (old, new) => std::mem::discriminant(old) == std::mem::discriminant(new),
    };
    if same {
        return Ok(());
    }
    let span = Span::default();
    let shown = |data: &Data| {
        describe(
            &Node {
                span,
                data: data.clone(),
            }
            .to_value(),
        )
    };
    let wanted = match default {
        Data::Number(n) if !n.is_f64() => "a whole number".to_owned(),
        Data::Number(_) => "a number".to_owned(),
        Data::Bool(_) => "true or false".to_owned(),
        Data::Text(_) => "text".to_owned(),
        other => shown(other),
    };
    Err(format!(
        "the param `{name}` is {wanted}, not {}",
        shown(value)
    ))
}

/// The value with every place in it set to `span`.
fn at_span(data: Data, span: Span) -> Node {
    let data = match data {
        Data::List(items) => Data::List(
            items
                .into_iter()
                .map(|item| at_span(item.data, span))
                .collect(),
        ),
        Data::Map(map) => Data::Map(
            map.into_iter()
                .map(|(k, e)| {
                    (
                        k,
                        Entry {
                            key: span,
                            value: at_span(e.value.data, span),
                        },
                    )
                })
                .collect(),
        ),
        other => other,
    };
    Node { span, data }
}
