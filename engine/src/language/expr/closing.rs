//! An expression with what is known put in place of its names, so that only `item` is left.

use std::borrow::Cow;

use serde_json::Value;

use super::budget::{Budget, spend};
use super::evaluation::lookup;
use super::{ExprError, Scope};
use crate::language::token::{Reference, Segment, references, tokens};

/// The expression with `item.…` in place of every deferred param.
pub(super) fn renamed<'a>(source: &'a str, scope: &Scope) -> Result<Cow<'a, str>, ExprError> {
    if scope.deferred.is_empty() {
        return Ok(Cow::Borrowed(source));
    }
    let tokens = tokens(source)?;
    let mut out = String::new();
    let mut from = 0;
    for reference in references(source, &tokens)? {
        let Some(variable) = scope.variable(&reference) else {
            continue;
        };
        out.push_str(&source[from..reference.start]);
        out.push_str("item.");
        out.push_str(variable);
        from = reference.start + second_segment_end(&reference);
    }
    out.push_str(&source[from..]);
    Ok(Cow::Owned(out))
}

/// How far the text of a reference goes to the end of its second segment: `.n` or `["n"]`.
fn second_segment_end(reference: &Reference<'_>) -> usize {
    let root = reference.root().len();
    let tail = reference.text.get(root..).unwrap_or_default();
    let length = match reference.segments.get(1) {
        Some(Segment::Key(name)) if tail.starts_with('.') => 1 + name.len(),
        _ => tail.find(']').map_or(tail.len(), |at| at + 1),
    };
    root + length
}

/// The expression with every known reference replaced by its value, so that only `item` is left.
pub(super) fn fill(source: &str, context: &Value, budget: &Budget) -> Result<String, ExprError> {
    let tokens = tokens(source)?;
    let mut out = String::new();
    let mut from = 0;
    for reference in references(source, &tokens)? {
        if reference.root() == "item" {
            continue;
        }
        let mixed = |why: &str| {
            let message = format!("`{}` cannot be used together with `item`", reference.text);
            ExprError::new(reference.text, "expression", message).help(why)
        };
        let value = lookup(&reference, context)
            .ok_or_else(|| mixed("its place depends on the item; use a fixed name"))?;
        let literal =
            literal(value).ok_or_else(|| mixed("use a number, text, or a list of them"))?;
        budget.within(|| spend(literal.len())).map_err(|why| {
            let message = format!("`{}` cannot be put here: {why}", reference.text);
            ExprError::new(reference.text, "expression", message)
        })?;
        out.push_str(&source[from..reference.start]);
        out.push_str(&literal);
        from = reference.start + reference.text.len();
    }
    out.push_str(&source[from..]);
    Ok(out)
}

/// The value as an expression.
fn literal(value: &Value) -> Option<String> {
    match value {
        Value::Bool(b) => Some(b.to_string()),
        Value::Number(n) => match n.as_i64() {
            Some(n) => Some(n.to_string()),
            // Never with an exponent, which expressions cannot hold.
            None => n
                .as_f64()
                .map(|f| format!("{f:?}"))
                .filter(|t| !t.contains('e')),
        },
        Value::String(text) => {
            let quote = ['"', '\'', '`'].into_iter().find(|q| !text.contains(*q))?;
            Some(format!("{quote}{text}{quote}"))
        }
        Value::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(literal).collect();
            Some(format!("[{}]", items?.join(", ")))
        }
        Value::Null | Value::Object(_) => None,
    }
}
