//! What an expression gives: tera's work, with the functions and bounds of this language.

use std::cell::RefCell;

use serde_json::{Map, Value};

use super::ExprError;
use super::budget::{Budget, VALUE, bound_filters, spend, weight};
use crate::language::node::describe;
use crate::language::token::{Kind, Reference, Segment, Token, references, tokens};

/// Most numbers of a `range`.
const MAX_RANGE: i64 = 100_000;

/// tera with a `range` that ends, and filters whose results are counted.
fn own_words() -> tera::Tera {
    let mut tera = tera::Tera::default();
    tera.register_function("range", bounded_range);
    bound_filters(&mut tera);
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
    let count = end.saturating_sub(start) / step.max(1);
    if step < 1 || count > MAX_RANGE {
        let text =
            format!("`range` gives at most {MAX_RANGE} numbers, with a `step_by` of 1 or more");
        return Err(tera::Error::msg(text));
    }
    spend(usize::try_from(count).unwrap_or_default() * VALUE).map_err(tera::Error::msg)?;
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
pub(super) fn evaluate(source: &str, context: &Value, budget: &Budget) -> Result<Value, ExprError> {
    budget.within(|| value_of(source, context))
}

fn value_of(source: &str, context: &Value) -> Result<Value, ExprError> {
    let wrong = |message: String| ExprError::new(source, "expression", message);
    let fails = |why: String| wrong(format!("`{source}` fails: {why}"));
    let tokens = tokens(source)?;
    let references = references(source, &tokens)?;
    if let [reference] = references.as_slice()
        && reference.text == source
    {
        let value = lookup(reference, context);
        let value = value.ok_or_else(|| wrong(format!("`{source}` has no value")))?;
        spend(weight(value)).map_err(fails)?;
        return Ok(value.clone());
    }
    let named = named(&references, context).map_err(fails)?;
    let context = tera::Context::from_value(named).map_err(|e| wrong(e.to_string()))?;
    let rendered = ENGINE.with_borrow_mut(|tera| tera.render_str(&template(source), &context));
    let text = rendered.map_err(|e| fails(root_cause(&e)))?;
    serde_json::from_str(&text).map_err(|_| wrong(format!("`{source}` has no value")))
}

/// What the references name, and nothing else: what there is besides may be large.
///
/// # Errors
/// What to say when it is too much.
fn named(references: &[Reference<'_>], context: &Value) -> Result<Value, String> {
    let mut all = Value::Object(Map::new());
    for reference in references {
        if let Some(part) = part(&reference.segments, context) {
            spend(weight(part))?;
        }
        copy(&reference.segments, context, &mut all);
    }
    Ok(all)
}

/// What the path names, as far as it leads through maps.
fn part<'a>(path: &[Segment], from: &'a Value) -> Option<&'a Value> {
    match (path, from) {
        ([Segment::Key(name), rest @ ..], Value::Object(map)) => part(rest, map.get(name)?),
        _ => Some(from),
    }
}

/// Puts it in the same place of `to`, which holds other parts of `from`.
fn copy(path: &[Segment], from: &Value, to: &mut Value) {
    let ([Segment::Key(name), rest @ ..], Value::Object(map)) = (path, from) else {
        *to = from.clone();
        return;
    };
    if !to.is_object() {
        *to = Value::Object(Map::new());
    }
    if let (Some(from), Value::Object(made)) = (map.get(name), to) {
        copy(rest, from, made.entry(name.as_str()).or_insert(Value::Null));
    }
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
