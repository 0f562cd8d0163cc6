//! A mistake in words. Knows nothing of where it was found.

use std::collections::BTreeSet;

use jsonschema::JsonType;
use jsonschema::error::{TypeKind, ValidationErrorKind as Kind};
use serde_json::{Map, Value};

use super::Mismatch;
use crate::language::node::describe;
use crate::language::suggest;

/// A field that the schema does not have.
pub(super) fn unknown_field(path: &[String], name: &str, known: &[&str]) -> Mismatch {
    let mut path = path.to_vec();
    path.push(name.to_owned());
    let help = suggest::help(name, "known fields", known.iter().copied())
        .or_else(|| Some("it takes no fields".to_owned()));
    Mismatch {
        on_key: true,
        ..mismatch(
            path,
            "unknown-field",
            format!("unknown field `{name}`"),
            "",
            help,
        )
    }
}

/// A text that is none of those that are allowed.
pub(super) fn not_one_of(
    path: Vec<String>,
    text: &str,
    texts: &[&str],
    names: &[&str],
) -> Mismatch {
    let all: BTreeSet<&str> = texts.iter().chain(names).copied().collect();
    let all: Vec<&str> = all.into_iter().collect();
    let message = format!("`{text}` is not one of {}", suggest::list(&all));
    let help = suggest::nearest(text, all).map(|best| format!("did you mean `{best}`?"));
    mismatch(path, "not-allowed", message, "", help)
}

/// None, or several, of the fields of which a map needs exactly one.
pub(super) fn not_one_field(
    path: Vec<String>,
    map: &Map<String, Value>,
    fields: &[&str],
) -> Mismatch {
    let all = suggest::list(fields);
    let given = fields
        .iter()
        .copied()
        .filter(|name| map.contains_key(*name));
    let given: Vec<&str> = given.collect();
    let Some(first) = given.first() else {
        let message = format!("one of the fields {all} is missing");
        return mismatch(path, "missing-field", message, "", None);
    };
    let message = format!(
        "{} exclude each other: exactly one of {all} is needed here",
        suggest::list(&given)
    );
    let help = format!("take out all but one; a profile takes one out with `{first}: null`");
    mismatch(path, "exclusive-fields", message, "", Some(help))
}

/// The field that names the variant is missing, or names none.
pub(super) fn wrong_tag(
    mut path: Vec<String>,
    found: Option<&Value>,
    field: &str,
    names: &[&str],
) -> Mismatch {
    match found {
        Some(Value::String(text)) => {
            path.push(field.to_owned());
            not_one_of(path, text, &[], names)
        }
        Some(other) => {
            path.push(field.to_owned());
            let message = format!(
                "expected one of {}, found {}",
                suggest::list(names),
                describe(other)
            );
            mismatch(path, "wrong-type", message, "", None)
        }
        None => {
            let message = format!("the field `{field}` is missing");
            let help = format!("one of {}", suggest::list(names));
            mismatch(path, "missing-field", message, "", Some(help))
        }
    }
}

/// One of a value, not of its key.
pub(super) fn mismatch(
    path: Vec<String>,
    code: &'static str,
    message: String,
    label: &str,
    help: Option<String>,
) -> Mismatch {
    Mismatch {
        path,
        on_key: false,
        code,
        message,
        label: label.to_owned(),
        help,
    }
}

/// Code, message, label and help of an error that needs no look around.
pub(super) fn simple(kind: &Kind, at: &Value) -> (&'static str, String, String, Option<String>) {
    let value = describe(at);
    let range = |text: String| ("out-of-range", text, String::new(), None);
    match kind {
        Kind::Type { kind } => {
            let expected = types(kind);
            let message = format!("expected {expected}, found {value}");
            let text_wanted = expected.contains("text") && !at.is_object() && !at.is_array();
            let help = match at {
                Value::Null => None,
                _ if text_wanted => Some("put it in quotes to make it text".to_owned()),
                Value::String(t) if expected.contains("list") => Some(format!("write `[{t}]`")),
                _ => None,
            };
            ("wrong-type", message, format!("expected {expected}"), help)
        }
        Kind::Enum { options } => {
            let shown: Vec<String> = options
                .as_array()
                .map(|o| o.iter().filter(|v| !v.is_null()).map(show).collect())
                .unwrap_or_default();
            let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
            let help = at
                .as_str()
                .and_then(|t| suggest::nearest(t, shown.iter().copied()));
            let help = help.map(|best| format!("did you mean `{best}`?"));
            let message = format!("{value} is not one of {}", suggest::list(&shown));
            ("not-allowed", message, String::new(), help)
        }
        Kind::Constant { expected_value } => {
            let message = format!("expected `{}`, found {value}", show(expected_value));
            ("not-allowed", message, String::new(), None)
        }
        Kind::Minimum { limit } => range(format!("{value} is less than {limit}")),
        Kind::Maximum { limit } => range(format!("{value} is more than {limit}")),
        Kind::ExclusiveMinimum { limit } => range(format!("{value} is not more than {limit}")),
        Kind::ExclusiveMaximum { limit } => range(format!("{value} is not less than {limit}")),
        Kind::MultipleOf { multiple_of } => {
            range(format!("{value} is not a multiple of {multiple_of}"))
        }
        Kind::MinItems { limit } => range(format!("a list of at least {limit} is needed")),
        Kind::MaxItems { limit } => range(format!("a list of at most {limit} is allowed")),
        Kind::MinLength { limit } => {
            range(format!("text of at least {limit} characters is needed"))
        }
        Kind::MaxLength { limit } => {
            range(format!("text of at most {limit} characters is allowed"))
        }
        Kind::MinProperties { limit } => range(format!("at least {limit} entries are needed")),
        Kind::MaxProperties { limit } => range(format!("at most {limit} entries are allowed")),
        Kind::UniqueItems => range("a value stands in the list twice".into()),
        Kind::Pattern { pattern } => (
            "not-allowed",
            format!("{value} does not match `{pattern}`"),
            String::new(),
            None,
        ),
        Kind::Format { format } => (
            "not-allowed",
            format!("{value} is not a {format}"),
            String::new(),
            None,
        ),
        Kind::FalseSchema => (
            "unknown-field",
            "nothing may stand here".into(),
            String::new(),
            None,
        ),
        Kind::OneOfMultipleValid { .. } => (
            "wrong-type",
            format!("{value} fits several forms at once"),
            String::new(),
            None,
        ),
        other => {
            let message = format!("{value} breaks the rule `{}`", other.keyword());
            ("not-allowed", message, String::new(), None)
        }
    }
}

fn show(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn types(kind: &TypeKind) -> String {
    match kind {
        TypeKind::Single(one) => type_name(*one).to_owned(),
        TypeKind::Multiple(set) => {
            // That a field may be left out is no news to who fills it in.
            let names = set.iter().filter(|t| *t != JsonType::Null).map(type_name);
            names.collect::<Vec<_>>().join(" or ")
        }
    }
}

fn type_name(ty: JsonType) -> &'static str {
    match ty {
        JsonType::Null => "nothing",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "a whole number",
        JsonType::Number => "a number",
        JsonType::String => "text",
        JsonType::Array => "a list",
        JsonType::Object => "a map",
    }
}

/// What a branch asks for, in a few words.
pub(super) fn form(branch: &Value) -> Option<String> {
    let name = match branch.get("type").and_then(Value::as_str)? {
        "null" => return None,
        "string" => "text",
        "array" => "a list",
        "object" => "a map",
        "integer" => "a whole number",
        "number" => "a number",
        _ => "true or false",
    };
    let required = branch.get("required").and_then(Value::as_array);
    let fields: Vec<&str> = required
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    Some(match fields.as_slice() {
        [] => name.to_owned(),
        fields => format!("{name} with {}", suggest::list(fields)),
    })
}

/// The first sentence of a description, on one line.
pub(super) fn first_sentence(text: &str) -> String {
    let end = text.find(". ").map_or(text.len(), |at| at + 1);
    text[..end].split_whitespace().collect::<Vec<_>>().join(" ")
}
