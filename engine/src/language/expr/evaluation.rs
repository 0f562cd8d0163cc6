//! What an expression gives: tera's work, with the functions and bounds of this language.

use std::cell::RefCell;

use serde_json::Value;

use super::ExprError;
use crate::language::node::describe;
use crate::language::token::{Kind, Reference, Segment, Token, references, tokens};

/// Most numbers of a `range`.
const MAX_RANGE: i64 = 100_000;

/// tera with a `range` that ends.
fn own_words() -> tera::Tera {
    let mut tera = tera::Tera::default();
    tera.register_function("range", bounded_range);
    tera
}

fn bounded_range(args: &std::collections::HashMap<String, Value>) -> tera::Result<Value> {
    let number = |name: &str, default: Option<i64>| {
        let given = args.get(name).map(|v| {
            v.as_i64()
                .ok_or_else(|| tera::Error::msg(format!("`{name}` of `range` is no whole number")))
        });
        given
            .or(default.map(Ok))
            .unwrap_or_else(|| Err(tera::Error::msg(format!("`range` needs `{name}`"))))
    };
    let (start, end) = (number("start", Some(0))?, number("end", None)?);
    let step = number("step_by", Some(1))?;
    if step < 1 || end.saturating_sub(start) / step.max(1) > MAX_RANGE {
        let text =
            format!("`range` gives at most {MAX_RANGE} numbers, with a `step_by` of 1 or more");
        return Err(tera::Error::msg(text));
    }
    let mut all = Vec::new();
    let mut at = start;
    while at < end {
        all.push(Value::from(at));
        at = at.saturating_add(step);
    }
    Ok(Value::from(all))
}

thread_local! {
    /// Making one registers all filters, so it is kept.
    static ENGINE: RefCell<tera::Tera> = RefCell::new(own_words());
}

/// Checks that tera can read the expression.
pub(crate) fn parse(source: &str) -> Result<(), ExprError> {
    if tokens(source)?.iter().all(|t| {
        matches!(
            t,
            Token {
                kind: Kind::Word,
                ..
            }
        )
    }) {
        return Ok(());
    }
    let template = template(source);
    let parsed = tera::Template::new("expression", None, &template);
    parsed.map(|_| ()).map_err(|_| {
        ExprError::new(
            source,
            "expression",
            format!("`{source}` is not a valid expression"),
        )
        .help("expressions are tera's: `params.n * 2`, `params.a ~ \"-b\"`, `params.list | length`")
    })
}

fn template(source: &str) -> String {
    format!("{{% set flowrun_value = {source} %}}{{{{ flowrun_value | json_encode }}}}")
}

/// The value of an expression.
pub(super) fn evaluate(source: &str, context: &Value) -> Result<Value, ExprError> {
    let wrong = |message: String| ExprError::new(source, "expression", message);
    let tokens = tokens(source)?;
    if let [reference] = references(source, &tokens)?.as_slice()
        && reference.text == source
    {
        let value = lookup(reference, context).cloned();
        return value.ok_or_else(|| wrong(format!("`{source}` has no value")));
    }
    let context = tera::Context::from_value(context.clone()).map_err(|e| wrong(e.to_string()))?;
    let rendered = ENGINE.with_borrow_mut(|tera| tera.render_str(&template(source), &context));
    let text = rendered.map_err(|e| wrong(format!("`{source}` fails: {}", root_cause(&e))))?;
    serde_json::from_str(&text).map_err(|_| wrong(format!("`{source}` has no value")))
}

/// The innermost of a chain of errors: the outer ones speak of templates.
fn root_cause(error: &tera::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// The value of a reference that has only fixed names.
pub(super) fn lookup<'a>(reference: &Reference<'_>, context: &'a Value) -> Option<&'a Value> {
    reference
        .segments
        .iter()
        .try_fold(context, |value, segment| match (segment, value) {
            (Segment::Key(name), Value::Object(map)) => map.get(name),
            (Segment::Key(name), Value::Array(list)) => list.get(name.parse::<usize>().ok()?),
            _ => None,
        })
}

/// A value within a longer text.
pub(super) fn as_text(value: &Value, source: &str) -> Result<String, ExprError> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(_) | Value::Number(_) => Ok(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => {
            let what = describe(value);
            let message = format!("`{source}` is {what}, which cannot stand inside a text");
            Err(ExprError::new(source, "expression", message))
        }
    }
}
