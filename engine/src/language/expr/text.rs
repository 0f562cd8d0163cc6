//! The texts that expressions stand in: where one begins and ends, and how a literal `${{` is
//! written. Knows nothing of what stands between the brackets.

use serde_json::Value;

use super::ExprError;

/// What opens an expression.
pub(super) const OPEN: &str = "${{";
/// What stands for a literal [`OPEN`].
pub(super) const ESCAPED: &str = "$${{";

/// A piece of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// Stands for itself.
    Text(&'a str),
    /// A literal `${{`.
    Escape,
    /// What stands between `${{` and `}}`, trimmed.
    Expr(&'a str),
}

/// True when the text holds an expression (or the start of one).
pub(crate) fn has_expression(text: &str) -> bool {
    text.match_indices(OPEN)
        .any(|(at, _)| !text[..at].ends_with('$'))
}

/// Splits a text into what stands for itself and expressions.
pub(super) fn split(text: &str) -> Result<Vec<Part<'_>>, ExprError> {
    let mut parts = Vec::new();
    let mut rest = text;
    let mut count = 0;
    while let Some(at) = rest.find(OPEN) {
        if rest[..at].ends_with('$') {
            parts.push(Part::Text(&rest[..at - 1]));
            parts.push(Part::Escape);
            rest = &rest[at + OPEN.len()..];
            continue;
        }
        parts.push(Part::Text(&rest[..at]));
        let body = &rest[at + OPEN.len()..];
        let Some(end) = end_of(body) else {
            let error = ExprError::new(OPEN, "expression", "`${{` without `}}`")
                .help("close it with `}}`, or write `$${{` for the characters themselves");
            return Err(ExprError {
                skip: count,
                ..error
            });
        };
        parts.push(Part::Expr(body[..end].trim()));
        count += 1;
        rest = &body[end + 2..];
    }
    parts.push(Part::Text(rest));
    parts.retain(|p| *p != Part::Text(""));
    Ok(parts)
}

/// Where `}}` stands in `body`, outside of quotes.
fn end_of(body: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in body.char_indices() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '"' | '\'' | '`') => quote = Some(c),
            (None, '}') if body[at..].starts_with("}}") => return Some(at),
            _ => {}
        }
    }
    None
}

/// The text with every literal `${{` escaped.
pub(crate) fn escape(text: &str) -> String {
    text.replace(OPEN, ESCAPED)
}

/// The value with every text in it changed.
fn each_text(value: Value, change: fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(&text)),
        Value::Array(items) => items.into_iter().map(|v| each_text(v, change)).collect(),
        Value::Object(map) => map
            .into_iter()
            .map(|(k, v)| (k, each_text(v, change)))
            .collect(),
        other => other,
    }
}

/// The value with every literal `${{` in it escaped, so that [`super::resolve_item`] gives it back.
pub(crate) fn escaped(value: Value) -> Value {
    each_text(value, escape)
}

/// What [`escaped`] was made from.
pub(crate) fn unescaped(value: Value) -> Value {
    each_text(value, |text| text.replace(ESCAPED, OPEN))
}

/// True when some text in the value holds an expression.
pub(crate) fn holds_expression(value: &Value) -> bool {
    match value {
        Value::String(text) => has_expression(text),
        Value::Array(items) => items.iter().any(holds_expression),
        Value::Object(map) => map.values().any(holds_expression),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::super::resolve_item;
    use super::*;

    #[test]
    fn escaping_whole_values_goes_there_and_back() {
        let value = json!({"a": ["${{ x }}", 1], "b": {"c": "$${{"}});
        let there = escaped(value.clone());
        assert!(!holds_expression(&there), "{there}");
        assert!(holds_expression(&value));
        assert_eq!(unescaped(there), value);
    }

    #[test]
    fn a_text_is_split_at_its_expressions() {
        let parts = split("a ${{ x.y }}$${{ z }} ${{ \"}}\" }}").unwrap();
        let expected = [
            Part::Text("a "),
            Part::Expr("x.y"),
            Part::Escape,
            Part::Text(" z }} "),
            Part::Expr("\"}}\""),
        ];
        assert_eq!(parts, expected);
        assert_eq!(split("${{ a }} ${{ b").unwrap_err().skip, 1);
    }

    proptest! {
        #[test]
        fn escaped_text_comes_back(text in "[a-z${} ]{0,30}") {
            let escaped = escape(&text);
            // A `$` right before an escape would read as part of it.
            prop_assume!(!text.contains("$${{"));
            let item = BTreeMap::from([("x".to_owned(), json!(1))]);
            prop_assert_eq!(resolve_item(&json!(escaped), &item), Ok(json!(text)));
        }
    }
}
