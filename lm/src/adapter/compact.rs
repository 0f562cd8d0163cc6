//! [`CompactAdapter`]: the fewest tokens that a fine-tuned model needs: the
//! instructions in one line, the input's text, the answer's text. What
//! `format_assistant` writes, `parse` reads back.
//!
//! | outputs | answer |
//! |---|---|
//! | one | its text |
//! | `reasoning` and others | the reasoning, then a line `name: text` for each other |
//! | several others | a line `name: text` for each |

use super::{Adapter, Dialect, FormatError, ParseError, message, output_names};
use crate::adapter::field_text::value_text;
use crate::example::Demo;
use crate::field_type::FieldType;
use crate::lm::{Choices, Message, Role};
use crate::python_text::strip;
use crate::signature::{Field, Signature};
use crate::value::{Fields, Value};

/// The short format for small fine-tuned models.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompactAdapter;

const DIALECT: Dialect = Dialect::Dspy25;

impl CompactAdapter {
    fn user(signature: &Signature, inputs: &Fields) -> Result<String, FormatError> {
        match signature.inputs.as_slice() {
            [only] => text_of(only, inputs),
            several => {
                let lines: Vec<String> = several
                    .iter()
                    .map(|field| Ok(format!("{}: {}", field.name, text_of(field, inputs)?)))
                    .collect::<Result<_, _>>()?;
                Ok(lines.join("\n"))
            }
        }
    }
}

/// The outputs that take a line of their own, after the free text if there is one.
fn lines_of(signature: &Signature) -> (Option<&Field>, &[Field]) {
    match signature.outputs.as_slice() {
        [only] => (Some(only), &[]),
        [first, rest @ ..] if first.name == "reasoning" => (Some(first), rest),
        all => (None, all),
    }
}

fn text_of(field: &Field, values: &Fields) -> Result<String, FormatError> {
    let value = values
        .get(&field.name)
        .ok_or_else(|| FormatError::Missing {
            field: field.name.clone(),
        })?;
    Ok(strip(&value_text(field, value, DIALECT)?).to_owned())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Adapter for CompactAdapter {
    fn format(
        &self,
        signature: &Signature,
        demos: &[Demo],
        inputs: &Fields,
    ) -> Result<Vec<Message>, FormatError> {
        let mut messages = Vec::new();
        let instructions = one_line(&signature.instructions);
        if !instructions.is_empty() {
            messages.push(message(Role::System, instructions));
        }
        for demo in demos {
            let is_set =
                |field: &Field| !matches!(demo.fields.get(&field.name), None | Some(Value::Null));
            if signature.fields().all(is_set) {
                messages.push(message(Role::User, Self::user(signature, &demo.fields)?));
                let answer = self.format_assistant(signature, &demo.fields)?;
                messages.push(message(Role::Assistant, answer));
            }
        }
        messages.push(message(Role::User, Self::user(signature, inputs)?));
        Ok(messages)
    }

    fn format_assistant(
        &self,
        signature: &Signature,
        outputs: &Fields,
    ) -> Result<String, FormatError> {
        let (free, lines) = lines_of(signature);
        let mut parts = Vec::new();
        if let Some(field) = free {
            parts.push(text_of(field, outputs)?);
        }
        for field in lines {
            parts.push(format!(
                "{}: {}",
                field.name,
                one_line(&text_of(field, outputs)?)
            ));
        }
        Ok(parts.join("\n"))
    }

    /// Named lines are looked for from the end, so the free text may hold anything.
    fn parse(&self, signature: &Signature, text: &str) -> Result<Fields, ParseError> {
        let (free, named) = lines_of(signature);
        let missing = |found: Vec<String>| ParseError::MissingFields {
            expected: output_names(signature),
            found,
        };
        let lines: Vec<&str> = strip(text).split('\n').collect();
        let split = lines
            .len()
            .checked_sub(named.len())
            .ok_or_else(|| missing(Vec::new()))?;
        let (head, tail) = lines.split_at(split);
        let mut fields = Fields::new();
        if let Some(field) = free {
            let text = head.join("\n");
            fields.insert(field.name.clone(), parse_field(field, strip(&text))?);
        }
        for (field, line) in named.iter().zip(tail) {
            let value = strip(line)
                .strip_prefix(field.name.as_str())
                .and_then(|rest| rest.strip_prefix(':'))
                .ok_or_else(|| missing(fields.keys().cloned().collect()))?;
            fields.insert(field.name.clone(), parse_field(field, strip(value))?);
        }
        Ok(fields)
    }

    fn choices(&self, signature: &Signature, values: Vec<String>) -> Choices {
        let after = match lines_of(signature) {
            (_, []) => None,
            (None, [only]) => Some(format!("{}: ", only.name)),
            (_, [.., last]) => Some(format!("\n{}: ", last.name)),
        };
        Choices {
            after,
            values,
            then: String::new(),
        }
    }

    fn maps_columns(&self) -> bool {
        true
    }
}

fn parse_field(field: &Field, text: &str) -> Result<Value, ParseError> {
    if matches!(field.ty, FieldType::Optional(_)) && text == "None" {
        return Ok(Value::Null);
    }
    // Texts of an enum may look like numbers: they are read as what the type says.
    field.ty.parse_v3(text).map_err(|reason| ParseError::Field {
        field: field.name.clone(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn texts_that_look_like_other_types_stay_texts() {
        let texts = ["1", "true", "null", "x"];
        let field = Field::text("stars").with_type(FieldType::one_of(texts));
        for text in texts {
            assert_eq!(parse_field(&field, text), Ok(text.into()));
        }
        let field = Field::text("note").with_type(FieldType::Optional(Box::new(FieldType::Str)));
        assert_eq!(parse_field(&field, "5"), Ok("5".into()));
        assert_eq!(parse_field(&field, "None"), Ok(Value::Null));
    }

    fn with_outputs(names: &[&str]) -> Signature {
        let outputs = names.iter().copied().map(Field::text).collect();
        Signature::new(Some("Sort the\nquery."), vec![Field::text("text")], outputs)
    }

    fn fields(pairs: &[(&str, &str)]) -> Fields {
        pairs
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).into()))
            .collect()
    }

    #[test]
    fn a_label_alone_is_its_text() {
        let signature = with_outputs(&["label"]);
        let demo = Demo {
            augmented: false,
            fields: fields(&[("text", "a"), ("label", "x")]),
        };
        let messages = CompactAdapter
            .format(&signature, &[demo], &fields(&[("text", "b")]))
            .unwrap();
        let contents: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
        assert_eq!(contents, ["Sort the query.", "a", "x", "b"]);
        assert_eq!(
            CompactAdapter.choices(&signature, vec!["x".into()]),
            Choices {
                after: None,
                values: vec!["x".into()],
                then: String::new()
            }
        );
    }

    #[test]
    fn reasoning_comes_first_and_is_free() {
        let signature = with_outputs(&["reasoning", "label"]);
        let answer = fields(&[("reasoning", "Because.\nlabel: no"), ("label", "yes")]);
        let text = CompactAdapter
            .format_assistant(&signature, &answer)
            .unwrap();
        assert_eq!(text, "Because.\nlabel: no\nlabel: yes");
        assert_eq!(CompactAdapter.parse(&signature, &text).unwrap(), answer);
        assert_eq!(
            CompactAdapter.choices(&signature, vec![]).after.as_deref(),
            Some("\nlabel: ")
        );
        assert!(CompactAdapter.parse(&signature, "Because.").is_err());
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read_back(reasoning in "\\PC{0,20}(\n\\PC{0,20})?", label in "[a-z_]{1,12}") {
            let signature = with_outputs(&["reasoning", "label"]);
            let answer = fields(&[("reasoning", strip(&reasoning)), ("label", &label)]);
            let text = CompactAdapter.format_assistant(&signature, &answer).unwrap();
            proptest::prop_assert_eq!(CompactAdapter.parse(&signature, &text).unwrap(), answer);
        }
    }
}
