//! [`JsonV3Adapter`]: DSPy 3.4.1's second try when an answer in the chat format
//! cannot be read: the same task, answered as one JSON object.

use super::chat_v3::{conversation, in_signature_order, output_text, system_text, type_info};
use super::field_text::{STRUCTURE, placeholders};
use super::{Adapter, Dialect, FormatError, ParseError, output_names};
use crate::example::Demo;
use crate::literal::{parse_json, parse_python};
use crate::lm::{Choices, Message};
use crate::python_text::strip;
use crate::signature::Signature;
use crate::value::{Fields, Value};

/// DSPy 3's JSON adapter.
#[derive(Debug, Clone, Copy, Default)]
pub struct JsonV3Adapter;

impl JsonV3Adapter {
    fn system(signature: &Signature) -> String {
        let outputs: Fields = signature
            .outputs
            .iter()
            .map(|field| {
                let shown = placeholders(std::slice::from_ref(field), true, Dialect::Dspy3);
                let (_, text) = shown.split_once('\n').unwrap_or_default();
                (field.name.clone(), Value::from(text))
            })
            .collect();
        let structure = [
            STRUCTURE.to_owned(),
            "Inputs will have the following structure:".to_owned(),
            placeholders(&signature.inputs, false, Dialect::Dspy3),
            "Outputs will be a JSON object with the following fields.".to_owned(),
            indented(&outputs),
        ];
        system_text(signature, &structure)
    }

    fn assistant(
        signature: &Signature,
        values: &Fields,
        missing: Option<&str>,
    ) -> Result<String, FormatError> {
        let mut shown = Fields::new();
        for field in &signature.outputs {
            let value = match values.get(&field.name) {
                Some(value) => value.clone(),
                None => Value::Str(output_text(field, values, missing)?),
            };
            shown.insert(field.name.clone(), value);
        }
        Ok(indented(&shown))
    }
}

/// `json.dumps(…, indent=2)` for values without nesting; nested ones stay on their line.
fn indented(fields: &Fields) -> String {
    let lines: Vec<String> = fields
        .iter()
        .map(|(name, value)| {
            let name = Value::from(name.as_str()).to_json_dumps(true);
            format!("  {name}: {}", value.to_json_dumps(true))
        })
        .collect();
    format!("{{\n{}\n}}", lines.join(",\n"))
}

impl Adapter for JsonV3Adapter {
    fn format(
        &self,
        signature: &Signature,
        demos: &[Demo],
        inputs: &Fields,
    ) -> Result<Vec<Message>, FormatError> {
        let names: Vec<String> = signature
            .outputs
            .iter()
            .map(|field| format!("`{}`{}", field.name, type_info(field)))
            .collect();
        let requirements = format!(
            "Respond with a JSON object in the following order of fields: {}.",
            names.join(", then ")
        );
        conversation(
            (signature, demos, inputs),
            Self::system(signature),
            requirements,
            |values, missing| Self::assistant(signature, values, missing),
        )
    }

    fn format_assistant(
        &self,
        signature: &Signature,
        outputs: &Fields,
    ) -> Result<String, FormatError> {
        Self::assistant(signature, outputs, None)
    }

    fn parse(&self, signature: &Signature, text: &str) -> Result<Fields, ParseError> {
        let mut found = Fields::new();
        for (name, value) in object_in(text).unwrap_or_default() {
            let Some(field) = signature.output(&name) else {
                continue;
            };
            let parsed = match &value {
                Value::Str(text) => field.ty.parse_v3(text),
                _ if field.ty == crate::field_type::FieldType::Str => {
                    Ok(Value::Str(value.to_python_str()))
                }
                _ => field.ty.coerce(value),
            };
            let value = parsed.map_err(|reason| ParseError::Field {
                field: name.clone(),
                reason,
            })?;
            found.insert(name, value);
        }
        in_signature_order(signature, found)
    }

    fn choices(&self, signature: &Signature, values: Vec<String>) -> Choices {
        let after = output_names(signature)
            .pop()
            .map(|name| format!("\"{name}\": \""));
        Choices {
            after,
            values,
            then: "\"\n}".to_owned(),
        }
    }
}

/// The object that the text is, or the first balanced `{…}` in it.
fn object_in(text: &str) -> Option<Fields> {
    let read = |text: &str| match parse_json(text).or_else(|| parse_python(text)) {
        Some(Value::Dict(fields)) => Some(fields),
        _ => None,
    };
    read(strip(text)).or_else(|| read(first_braces(text)?))
}

fn first_braces(text: &str) -> Option<&str> {
    let start = text.find('{')?;
    let mut depth = 0usize;
    let mut in_text = false;
    let mut escaped = false;
    for (at, c) in text[start..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => in_text = !in_text,
            '{' if !in_text => depth += 1,
            '}' if !in_text => {
                depth -= 1;
                if depth == 0 {
                    return Some(&text[start..=start + at]);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::signature::Field;

    #[test]
    fn an_object_is_found_in_prose() {
        let signature = Signature::new(
            None,
            vec![Field::text("q")],
            vec![Field::text("a"), Field::text("b")],
        );
        let parse = |text| JsonV3Adapter.parse(&signature, text);
        let fields = parse("Sure:\n```json\n{\"b\": \"}\", \"a\": 1}\n```").unwrap();
        assert_eq!(
            Value::Dict(fields).to_json_dumps(true),
            r#"{"a": "1", "b": "}"}"#
        );
        assert!(parse("not json").is_err());
    }
}
