//! Filling in the `${{ }}` of a whole tree: models, programs and steps.
//!
//! Knows which field may refer to what, and nothing else of steps. Invariant: what
//! is left as an expression afterwards waits for `item`, is a condition, or has been
//! reported.

use serde_json::{Value, json};

use super::definition::Uses;
use super::expr::{
    ExprError, Resolved, Scope, close_condition, condition, escaped, has_expression, resolve,
};
use super::inliner::inline;
use super::node::{Data, Node};
use super::source_map::{SourceMap, Span};

/// The one key of `foreach` that is no variable.
pub(crate) const MAX_PARALLEL: &str = "max_parallel";

/// Fills in everything that is known before the run, and puts the steps of step definitions in
/// place of their uses. Returns what expressions may refer to, and the uses.
pub(crate) fn resolve_all(map: &mut SourceMap, root: &mut Node, name: &str) -> (Value, Uses) {
    if let Some(params) = root.get("params") {
        forbid(map, params);
    }
    let params = root.get("params").map_or_else(|| json!({}), Node::to_value);
    let mut scope = Scope {
        context: json!({ "params": params, "run": { "name": name } }),
        ..Scope::default()
    };
    fill_section(map, root, "models", &scope);
    let models = root.get("models").map_or_else(|| json!({}), Node::to_value);
    if let Some(context) = scope.context.as_object_mut() {
        context.insert("models".into(), models);
    }
    fill_section(map, root, "programs", &scope);
    fill_section(map, root, "pools", &scope);
    fill_section(map, root, "runners", &scope);
    fill_section(map, root, "hooks", &scope);
    fill_section(map, root, "tracking", &scope);
    let uses = inline(map, root, &mut scope);
    (scope.context, uses)
}

fn fill_section(map: &mut SourceMap, root: &mut Node, section: &str, scope: &Scope) {
    if let Some(node) = root.as_map_mut().and_then(|m| m.get_mut(section)) {
        fill(map, &mut node.value, scope, false);
    }
}

/// Fills in everything in a step that is known before the run.
pub(crate) fn resolve_step(map: &mut SourceMap, step: &mut Node, scope: &mut Scope) {
    let items = variables(step);
    let again = items.is_some() || scope.walked;
    let Some(fields) = step.as_map_mut() else {
        return;
    };
    for (name, field) in fields {
        let (sees_item, escapes) = match name.as_str() {
            "foreach" => {
                fill_lists(map, &mut field.value, scope);
                continue;
            }
            "with" | "env" | "run" | "publish" => (true, true),
            "in" => (true, false),
            "when" => {
                scope.items.clone_from(&items);
                scope.may_wait = true;
                if let Some(text) = field.value.as_text()
                    && let Err(error) = condition(text, scope)
                {
                    report(map, field.value.span, &error);
                }
                continue;
            }
            _ => (false, false),
        };
        scope.items = if sees_item { items.clone() } else { None };
        scope.may_wait = sees_item;
        fill(map, &mut field.value, scope, escapes && again);
    }
    scope.items = None;
    scope.may_wait = false;
}

/// Fills in the lists of a `foreach`. Inside a definition that is walked they may wait for the item
/// around, and are then read once more; how many items run at once may not.
fn fill_lists(map: &mut SourceMap, foreach: &mut Node, scope: &mut Scope) {
    scope.items = None;
    scope.may_wait = false;
    if foreach.as_map().is_none() {
        return fill(map, foreach, scope, false);
    }
    let lists = foreach.as_map_mut();
    for (name, entry) in lists.into_iter().flatten() {
        scope.may_wait = name != MAX_PARALLEL;
        let escapes = scope.may_wait && scope.walked;
        fill(map, &mut entry.value, scope, escapes);
    }
    scope.may_wait = false;
}

/// Fills in the `when` of a step that is a use of a definition or stands in one, with the params
/// that it sees, so that it means the same elsewhere. What is wrong with it was told when the step
/// was resolved, but for a value that is neither true nor false.
pub(crate) fn close_when(map: &mut SourceMap, step: &mut Node, scope: &mut Scope) {
    scope.items = variables(step);
    scope.may_wait = true;
    let entry = step.as_map_mut().and_then(|fields| fields.get_mut("when"));
    if let Some(entry) = entry
        && let Some(text) = entry.value.as_text().map(str::to_owned)
    {
        match close_condition(&text, scope) {
            Ok(text) => entry.value.data = Data::Text(text),
            Err(_) if condition(&text, scope).is_err() => {}
            Err(error) => report(map, entry.value.span, &error),
        }
    }
    scope.items = None;
    scope.may_wait = false;
}

/// Gives a step inside a definition the condition of the use too. Both were closed.
pub(crate) fn join_conditions(outer: &Node, step: &mut Node) {
    let Some(around) = outer.entry("when") else {
        return;
    };
    let Some(fields) = step.as_map_mut() else {
        return;
    };
    let Some(own) = fields.get_mut("when") else {
        fields.insert("when".into(), around.clone());
        return;
    };
    match (around.value.as_text(), own.value.as_text()) {
        (_, Some("false")) | (Some("true") | None, _) => {}
        (Some(before), Some(condition)) if before != "false" && condition != "true" => {
            own.value.data = Data::Text(format!("({before}) and ({condition})"));
        }
        _ => *own = around.clone(),
    }
}

/// The names of the `foreach` variables of a step that has some.
fn variables(step: &Node) -> Option<Vec<String>> {
    let foreach = step.get("foreach")?.as_map()?;
    Some(
        foreach
            .keys()
            .filter(|k| *k != MAX_PARALLEL)
            .cloned()
            .collect(),
    )
}

/// Replaces each text that holds expressions. `escapes`: the result is read once more, per item.
fn fill(map: &mut SourceMap, node: &mut Node, scope: &Scope, escapes: bool) {
    match &mut node.data {
        Data::Text(text) if text.contains("${{") => match resolve(text, scope) {
            Ok(Resolved::Done(value)) => {
                let value = if escapes { escaped(value) } else { value };
                *node = Node::from_value(value, node.span);
            }
            Ok(Resolved::Waits(text)) => node.data = Data::Text(text),
            Err(error) => report(map, node.span, &error),
        },
        Data::List(items) => items
            .iter_mut()
            .for_each(|item| fill(map, item, scope, escapes)),
        Data::Map(entries) => {
            entries
                .values_mut()
                .for_each(|e| fill(map, &mut e.value, scope, escapes));
        }
        _ => {}
    }
}

/// Notes a mistake in the text at `span`.
pub(crate) fn report(map: &mut SourceMap, span: Span, error: &ExprError) {
    let place = map.narrow(span, error.skip, &error.snippet);
    map.report(
        place,
        error.code,
        error.message.clone(),
        "",
        error.help.clone(),
    );
}

/// Params are plain values.
pub(crate) fn forbid(map: &mut SourceMap, node: &Node) {
    match &node.data {
        Data::Text(text) if has_expression(text) => {
            let help = "put the expression where the param is used".to_owned();
            map.report(
                node.span,
                "expression",
                "a param is a plain value",
                "",
                Some(help),
            );
        }
        Data::List(items) => items.iter().for_each(|item| forbid(map, item)),
        Data::Map(entries) => entries.values().for_each(|e| forbid(map, &e.value)),
        _ => {}
    }
}
