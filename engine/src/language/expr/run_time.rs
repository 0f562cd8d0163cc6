//! Expressions that wait for the run: an item of a `foreach`, a condition on metrics.
//!
//! Everything else was filled in when the pipeline was read.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::budget::Budget;
use super::evaluation::{as_text, evaluate};
use super::names::check_reference;
use super::text::{OPEN, Part, split};
use super::{ExprError, Scope};
use crate::language::token::{references, tokens};

/// Fills the `${{ … item … }}` left in a value of a `foreach` step, where `item` holds the
/// variables of one item. With no variables the value is returned as it is.
///
/// # Errors
/// What is wrong with an expression, for this item.
pub fn resolve_item(value: &Value, item: &BTreeMap<String, Value>) -> Result<Value, String> {
    if item.is_empty() {
        return Ok(value.clone());
    }
    let scope = Scope {
        context: json!({ "item": item }),
        ..Scope::default()
    };
    fill_items(value, &scope)
}

fn fill_items(value: &Value, scope: &Scope) -> Result<Value, String> {
    match value {
        Value::String(text) if text.contains(OPEN) => fill_text(text, scope),
        Value::Array(items) => items.iter().map(|v| fill_items(v, scope)).collect(),
        Value::Object(map) => map
            .iter()
            .map(|(k, v)| Ok((k.clone(), fill_items(v, scope)?)))
            .collect(),
        other => Ok(other.clone()),
    }
}

fn fill_text(text: &str, scope: &Scope) -> Result<Value, String> {
    let context = &scope.context;
    let parts = split(text).map_err(|e| e.message)?;
    let value_of = |source: &str| {
        let tokens = tokens(source)?;
        for reference in references(source, &tokens)? {
            check_reference(&reference, context)?;
        }
        evaluate(source, context, &scope.budget)
    };
    if let [Part::Expr(source)] = parts.as_slice() {
        return value_of(source).map_err(|e| e.message);
    }
    let mut out = String::new();
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Escape => out.push_str(OPEN),
            Part::Expr(source) => {
                let text = value_of(source).and_then(|value| as_text(&value, source));
                out.push_str(&text.map_err(|e| e.message)?);
            }
        }
    }
    Ok(Value::String(out))
}

/// Whether a condition (`when`, `expect`) holds. `context` is a map of what it may refer to:
/// `params`, `models`, `run` and perhaps `item` for `when`, the metrics for `expect`.
///
/// # Errors
/// An unknown name, a mistake in the expression, or a value that is not true or false.
pub fn eval_bool(expr: &str, context: &Value) -> Result<bool, String> {
    let source = condition_text(expr);
    let told = |e: ExprError| match e.help {
        Some(help) => format!("{} ({help})", e.message),
        None => e.message,
    };
    let tokens = tokens(source).map_err(told)?;
    for reference in references(source, &tokens).map_err(told)? {
        check_reference(&reference, context).map_err(told)?;
    }
    match evaluate(source, context, &Budget::default()).map_err(told)? {
        Value::Bool(holds) => Ok(holds),
        other => Err(format!(
            "`{source}` is {}, not true or false",
            crate::language::node::describe(&other)
        )),
    }
}

fn condition_text(expr: &str) -> &str {
    match split(expr).as_deref() {
        Ok([Part::Expr(source)]) => source,
        _ => expr.trim(),
    }
}
