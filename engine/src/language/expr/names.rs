//! The names in an expression: whether what they refer to is there, and known already.

use serde_json::Value;

use super::evaluation::parse;
use super::{ExprError, Scope};
use crate::language::suggest;
use crate::language::token::{Reference, Segment, references, tokens};

/// Checks names and form of an expression; true when it refers to `item`.
pub(super) fn check(source: &str, scope: &Scope) -> Result<bool, ExprError> {
    let tokens = tokens(source)?;
    if tokens.is_empty() {
        return Err(ExprError::new("", "expression", "an empty expression"));
    }
    let mut item = false;
    for reference in references(source, &tokens)? {
        if reference.root() == "item" {
            item = true;
            check_item(&reference, scope)?;
        } else if scope.variable(&reference).is_some() {
            item = true;
            check_deferred(&reference, scope)?;
        } else if reference.segments.len() == 1 && reference.root() == "params" {
            check_params(&reference, scope)?;
            check_reference(&reference, &scope.context)?;
        } else {
            check_reference(&reference, &scope.context)?;
        }
    }
    parse(source)?;
    Ok(item)
}

/// A param that differs from item to item is not known everywhere.
fn check_deferred(reference: &Reference<'_>, scope: &Scope) -> Result<(), ExprError> {
    if scope.may_wait {
        return Ok(());
    }
    let message = format!(
        "`{}` depends on the item: it is known only in `with`, `env`, `run`, `publish`, `when` and the lists of `foreach`",
        reference.prefix(2)
    );
    Err(ExprError::new(reference.text, "unknown-variable", message))
}

/// `params` as a whole.
fn check_params(reference: &Reference<'_>, scope: &Scope) -> Result<(), ExprError> {
    let Some(name) = scope.deferred.keys().next() else {
        return Ok(());
    };
    let message = format!("`params` as a whole is not known here: `{name}` depends on the item");
    let error = ExprError::new(reference.text, "expression", message);
    Err(error.help("name the params one by one"))
}

fn check_item(reference: &Reference<'_>, scope: &Scope) -> Result<(), ExprError> {
    if let Some(Segment::Key(name)) = reference.segments.get(1)
        && scope.is_deferred(name)
    {
        return Ok(());
    }
    let Some(items) = &scope.items else {
        let message = "`item` is known only in `in`, `with`, `env`, `run`, `publish` and `when` of a `foreach` step";
        return Err(ExprError::new(reference.text, "unknown-variable", message));
    };
    match reference.segments.get(1) {
        Some(Segment::Key(name)) if !items.iter().any(|i| i == name) => {
            let message = format!("`foreach` has no variable `{name}`");
            let help = suggest::help(name, "variables", items.iter().map(String::as_str));
            Err(ExprError {
                help,
                ..ExprError::new(reference.text, "unknown-variable", message)
            })
        }
        Some(_) => Ok(()),
        None => {
            let error = ExprError::new(reference.text, "expression", "`item` needs a variable");
            let first = items.first().map_or("x", String::as_str);
            Err(error.help(format!("write for example `item.{first}`")))
        }
    }
}

/// Walks the reference through the context as far as it is known.
pub(super) fn check_reference(reference: &Reference<'_>, context: &Value) -> Result<(), ExprError> {
    let mut value = context;
    for (depth, segment) in reference.segments.iter().enumerate() {
        let Segment::Key(name) = segment else {
            return Ok(());
        };
        let next = match value {
            Value::Object(map) => map.get(name),
            Value::Array(list) => name.parse::<usize>().ok().and_then(|i| list.get(i)),
            _ => None,
        };
        match next {
            Some(next) => value = next,
            None if reference.may_be_absent && depth > 0 => return Ok(()),
            None => return Err(unknown(reference, depth, name, value)),
        }
    }
    Ok(())
}

fn unknown(reference: &Reference<'_>, depth: usize, name: &str, around: &Value) -> ExprError {
    let place = reference.prefix(depth);
    let message = match (depth, place.as_str()) {
        (0, _) => format!("there is no `{name}` here"),
        (1, "params") => format!("unknown param `{name}`"),
        (1, "models") => format!("unknown model `{name}`"),
        _ => format!("`{place}` has no `{name}`"),
    };
    let keys = around
        .as_object()
        .map(|m| m.keys().map(String::as_str).collect::<Vec<_>>());
    let keys = keys.unwrap_or_default();
    let help = if depth == 0 && reference.segments.len() == 1 && params_hold(around, name) {
        Some(format!("did you mean `params.{name}`?"))
    } else {
        suggest::help(name, "known here", keys)
    };
    let code = if place == "params" {
        "unknown-param"
    } else {
        "unknown-variable"
    };
    ExprError {
        help,
        ..ExprError::new(reference.text, code, message)
    }
}

fn params_hold(context: &Value, name: &str) -> bool {
    context.get("params").and_then(|p| p.get(name)).is_some()
}

pub(super) fn refers_to_item(source: &str) -> bool {
    let found = tokens(source).and_then(|tokens| {
        Ok(references(source, &tokens)?
            .iter()
            .any(|reference| reference.root() == "item"))
    });
    found.unwrap_or(false)
}
