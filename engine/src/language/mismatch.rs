//! [`Mismatch`]: where a value does not fit a JSON Schema, in plain words.
//!
//! The `jsonschema` crate finds the errors; here they become short messages with
//! the path of the real mistake. Knows no files and no places.

mod wording;

use jsonschema::error::ValidationErrorKind as Kind;
use jsonschema::{ValidationError, Validator};
use serde_json::Value;

use self::wording::{
    first_sentence, form, mismatch, not_one_field, not_one_of, simple, unknown_field, wrong_tag,
};
use super::expr::{has_expression, holds_expression};
use super::node::describe;
use super::suggest;
use super::variant::{self, Tag};

/// One place where a value does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// Keys and indices from the value down to the mistake.
    pub(crate) path: Vec<String>,
    /// The mistake is the last key of `path` itself, not its value.
    pub(crate) on_key: bool,
    /// Stable name of the kind of mistake.
    pub(crate) code: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// Short text beside the caret.
    pub(crate) label: String,
    /// What to do about it.
    pub(crate) help: Option<String>,
}

/// A schema ready for checking.
pub(crate) struct Shape {
    schema: Value,
    validator: Validator,
}

impl Shape {
    /// Prepares a schema.
    ///
    /// # Errors
    /// When it is not a valid JSON Schema.
    pub(crate) fn new(schema: Value) -> Result<Self, String> {
        let schema = if schema.is_null() {
            Value::Bool(true)
        } else {
            schema
        };
        let validator = jsonschema::validator_for(&schema).map_err(|e| e.to_string())?;
        Ok(Self { schema, validator })
    }

    /// The schema.
    pub(crate) fn schema(&self) -> &Value {
        &self.schema
    }

    /// Where `value` does not fit. A text that still holds an expression fits everywhere.
    pub(crate) fn check(&self, value: &Value) -> Vec<Mismatch> {
        if self.validator.is_valid(value) {
            return Vec::new();
        }
        let mut found = Vec::new();
        for error in self.validator.iter_errors(value) {
            self.explain(&error, value, &mut found);
        }
        found
    }

    fn explain(&self, error: &ValidationError<'_>, whole: &Value, out: &mut Vec<Mismatch>) {
        let path: Vec<String> = decode(error.instance_path().as_str());
        let at = whole
            .pointer(error.instance_path().as_str())
            .unwrap_or(&Value::Null);
        if at.as_str().is_some_and(has_expression) {
            return;
        }
        let schema = self.around(error);
        if let (Kind::OneOfNotValid { .. } | Kind::OneOfMultipleValid { .. }, Some(fields)) =
            (error.kind(), schema.and_then(variant::exclusive))
        {
            // What is no map is told of by its type.
            out.extend(at.as_object().map(|map| not_one_field(path, map, &fields)));
            return;
        }
        match error.kind() {
            Kind::AdditionalProperties { unexpected }
            | Kind::UnevaluatedProperties { unexpected } => {
                for name in unexpected {
                    out.push(unknown_field(&path, name, &known_fields(schema)));
                }
            }
            Kind::Required { property } => {
                let name = property.as_str().unwrap_or_default();
                let about = schema
                    .and_then(|s| s.pointer(&format!("/properties/{}/description", escape(name))))
                    .and_then(Value::as_str)
                    .map(|text| format!("`{name}`: {}", first_sentence(text)));
                let message = format!("the field `{name}` is missing");
                out.push(mismatch(path, "missing-field", message, "", about));
            }
            Kind::OneOfNotValid { context } | Kind::AnyOf { context } => {
                self.explain_branches(path, at, whole, schema, context, out);
            }
            kind => {
                let (code, message, label, help) = simple(kind, at);
                out.push(mismatch(path, code, message, &label, help));
            }
        }
    }

    /// The schema whose keyword failed.
    fn around(&self, error: &ValidationError<'_>) -> Option<&Value> {
        let path = error.schema_path().as_str();
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        self.schema
            .pointer(parent)
            .map(|s| variant::deref(&self.schema, s))
    }

    /// A value that fits none of several forms: the message is about the form that was meant.
    fn explain_branches(
        &self,
        path: Vec<String>,
        at: &Value,
        whole: &Value,
        schema: Option<&Value>,
        context: &[Vec<ValidationError<'_>>],
        out: &mut Vec<Mismatch>,
    ) {
        let branches = schema
            .map(|s| variant::branches(&self.schema, s))
            .unwrap_or_default();
        let tags: Vec<Option<Tag>> = branches.iter().map(|b| variant::tag_of(b)).collect();
        let meant = meant(&branches, &tags, at, &path, context);
        if let Some(errors) = meant.and_then(|i| context.get(i)) {
            return errors.iter().for_each(|e| self.explain(e, whole, out));
        }
        if holds_expression(at) && at.is_object() && tags.iter().all(Option::is_none) {
            return;
        }
        let texts = allowed_texts(&branches);
        let names: Vec<&str> = tags.iter().flatten().map(Tag::name).collect();
        let field = tags.iter().flatten().find_map(|t| match t {
            Tag::Field(field, _) => Some(field.clone()),
            Tag::Key(_) => None,
        });
        match (at, field) {
            (Value::String(text), _) if !texts.is_empty() => {
                out.push(not_one_of(path, text, &texts, &names));
            }
            (Value::Object(map), Some(field)) => {
                out.push(wrong_tag(path, map.get(&field), &field, &names));
            }
            (Value::Object(map), None) if !names.is_empty() => {
                let unknown = map.keys().find(|k| !names.contains(&k.as_str()));
                out.push(match unknown {
                    Some(key) => unknown_field(&path, key, &names),
                    None => mismatch(
                        path,
                        "wrong-type",
                        format!("exactly one of {} is needed here", suggest::list(&names)),
                        "",
                        None,
                    ),
                });
            }
            _ => {
                let mut forms: Vec<String> = branches.iter().filter_map(|b| form(b)).collect();
                forms.dedup();
                let forms = if forms.is_empty() {
                    "another form".into()
                } else {
                    forms.join(" or ")
                };
                let message = format!("expected {forms}, found {}", describe(at));
                out.push(mismatch(path, "wrong-type", message, "", None));
            }
        }
    }
}

/// Which branch the writer had in mind.
fn meant(
    branches: &[&Value],
    tags: &[Option<Tag>],
    at: &Value,
    path: &[String],
    context: &[Vec<ValidationError<'_>>],
) -> Option<usize> {
    if let Value::Object(map) = at {
        let named: Vec<usize> = (0..tags.len())
            .filter(|i| {
                tags[*i]
                    .as_ref()
                    .is_some_and(|tag| variant::names(map, tag))
            })
            .collect();
        match named.as_slice() {
            [one] => return Some(*one),
            [] if tags.iter().any(Option::is_some) => return None,
            _ => {}
        }
    }
    // Forms of another type than the value's are out.
    let fits: Vec<usize> = (0..context.len())
        .filter(|i| {
            !context[*i].iter().any(|e| {
                decode(e.instance_path().as_str()) == path && matches!(e.kind(), Kind::Type { .. })
            })
        })
        .collect();
    if let [one] = fits.as_slice() {
        return Some(*one);
    }
    let not_null: Vec<usize> = (0..branches.len())
        .filter(|i| branches[*i].get("type").and_then(Value::as_str) != Some("null"))
        .collect();
    match (not_null.as_slice(), branches.len() == context.len()) {
        ([one], true) => Some(*one),
        _ => None,
    }
}

/// The texts that branches of fixed texts allow.
fn allowed_texts<'a>(branches: &[&'a Value]) -> Vec<&'a str> {
    let mut texts = Vec::new();
    for branch in branches {
        texts.extend(branch.get("const").and_then(Value::as_str));
        let list = branch.get("enum").and_then(Value::as_array);
        texts.extend(list.into_iter().flatten().filter_map(Value::as_str));
    }
    texts
}

fn known_fields(schema: Option<&Value>) -> Vec<&str> {
    let properties = schema
        .and_then(|s| s.get("properties"))
        .and_then(Value::as_object);
    properties
        .map(|p| p.keys().map(String::as_str).collect())
        .unwrap_or_default()
}

fn decode(pointer: &str) -> Vec<String> {
    pointer
        .split('/')
        .skip(1)
        .map(|s| s.replace("~1", "/").replace("~0", "~"))
        .collect()
}

fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn found(schema: Value, value: Value) -> Vec<String> {
        let shape = Shape::new(schema).unwrap();
        let told = |m: Mismatch| {
            let help = m.help.map(|h| format!(" ({h})")).unwrap_or_default();
            format!("{}: {}{help}", m.path.join("."), m.message)
        };
        // The validator's order is its own; a file's mistakes are told by place.
        let mut found: Vec<String> = shape.check(&value).into_iter().map(told).collect();
        found.sort();
        found
    }

    fn program() -> Value {
        json!({
            "$ref": "#/$defs/Program",
            "$defs": {
                "Program": {"oneOf": [
                    {"type": "object", "properties": {"predict": {"$ref": "#/$defs/Body"}},
                     "required": ["predict"], "additionalProperties": false},
                    {"type": "object", "properties": {"chain_of_thought": {"$ref": "#/$defs/Body"}},
                     "required": ["chain_of_thought"], "additionalProperties": false},
                ]},
                "Body": {"type": "object", "additionalProperties": false, "required": ["inputs"],
                    "properties": {
                        "inputs": {"type": "array", "items": {"type": "string"}},
                        "kind": {"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}]},
                    }},
                "Kind": {"oneOf": [{"const": "short"}, {"const": "long"}]},
            }
        })
    }

    #[test]
    fn the_named_variant_is_looked_into() {
        let wrong = json!({"chain_of_thought": {"input": ["a"], "inputs": [1], "kind": "log"}});
        assert_eq!(
            found(program(), wrong),
            [
                "chain_of_thought.input: unknown field `input` (did you mean `inputs`?)",
                "chain_of_thought.inputs.0: expected text, found the number `1` \
                 (put it in quotes to make it text)",
                "chain_of_thought.kind: `log` is not one of `long`, `short` (did you mean `long`?)",
            ]
        );
        assert_eq!(
            found(program(), json!({"chain_of_though": {"inputs": []}})),
            ["chain_of_though: unknown field `chain_of_though` (did you mean `chain_of_thought`?)"]
        );
        assert_eq!(
            found(program(), json!("predict")),
            [
                ": expected a map with `predict` or a map with `chain_of_thought`, \
              found the text `predict`"
            ]
        );
    }

    #[test]
    fn the_tag_field_picks_the_variant() {
        let schema = json!({"oneOf": [
            {"type": "object", "properties": {"provider": {"const": "openai", "type": "string"},
              "model": {"type": "string"}}, "required": ["provider", "model"],
              "additionalProperties": false},
            {"type": "object", "properties": {"provider": {"const": "embedded", "type": "string"},
              "threads": {"type": "integer", "minimum": 1}}, "required": ["provider"],
              "additionalProperties": false},
        ]});
        assert_eq!(
            found(
                schema.clone(),
                json!({"provider": "embedded", "threads": 0})
            ),
            ["threads: the number `0` is less than 1"]
        );
        assert_eq!(
            found(schema.clone(), json!({"provider": "openia", "model": "x"})),
            ["provider: `openia` is not one of `embedded`, `openai` (did you mean `openai`?)"]
        );
        assert_eq!(
            found(schema.clone(), json!({"model": "x"})),
            [": the field `provider` is missing (one of `openai`, `embedded`)"]
        );
        assert_eq!(
            found(schema, json!({"provider": "openai"})),
            [": the field `model` is missing"]
        );
    }

    #[test]
    fn of_fields_that_exclude_each_other_one_is_needed() {
        let schema = json!({
            "properties": {"place": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]}},
            "$defs": {"Place": {
                "type": "object", "additionalProperties": false,
                "properties": {
                    "folder": {"type": ["string", "null"]}, "url": {"type": ["string", "null"]},
                    "load": {"type": "boolean"},
                },
                "oneOf": [{"required": ["folder"]}, {"required": ["url"]}],
            }},
        });
        let of = |place: Value| found(schema.clone(), json!({ "place": place }));
        assert_eq!(
            of(json!({"folder": "a", "load": true})),
            Vec::<String>::new()
        );
        assert_eq!(
            of(json!({"url": "${{ params.url }}"})),
            Vec::<String>::new()
        );
        assert_eq!(
            of(json!({"folder": "a", "url": "b"})),
            [
                "place: `folder`, `url` exclude each other: exactly one of `folder`, `url` is \
                 needed here (take out all but one; a profile takes one out with `folder: null`)"
            ]
        );
        assert_eq!(
            of(json!({"load": true})),
            ["place: one of the fields `folder`, `url` is missing"]
        );
        assert_eq!(
            of(json!("a")),
            ["place: expected a map, found the text `a`"]
        );
    }

    #[test]
    fn a_text_with_an_expression_fits_everywhere() {
        let value =
            json!({"chain_of_thought": {"inputs": "${{ item.x }}", "kind": "${{ item.k }}"}});
        assert_eq!(found(program(), value), Vec::<String>::new());
    }
}
