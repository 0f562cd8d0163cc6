//! [`ChatV3Adapter`]: the message format of DSPy 3.4.1, byte for byte. Like 2.5's
//! but with other joints and tails; an answer that cannot be read is asked for
//! again as JSON.

use super::chat::{HEADER, header_choices, outputs_in};
use super::field_text::{
    INCOMPLETE, STRUCTURE, block, objective, placeholders, shown_demos, value_text,
};
use super::{Adapter, Dialect, FormatError, JsonV3Adapter, ParseError, message, output_names};
use crate::example::Demo;
use crate::field_type::FieldType;
use crate::lm::{Choices, Message, Role};
use crate::python_text::{splitlines, strip};
use crate::signature::{Field, Signature};
use crate::value::{Fields, Value};

const NOT_SUPPLIED: &str = "Not supplied for this particular example. ";

/// DSPy 3's chat adapter.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatV3Adapter;

impl ChatV3Adapter {
    fn system(signature: &Signature) -> String {
        let structure = [
            STRUCTURE.to_owned(),
            placeholders(&signature.inputs, false, Dialect::Dspy3),
            placeholders(&signature.outputs, true, Dialect::Dspy3),
            "[[ ## completed ## ]]".to_owned(),
        ];
        system_text(signature, &structure)
    }

    fn assistant(
        signature: &Signature,
        values: &Fields,
        missing: Option<&str>,
    ) -> Result<String, FormatError> {
        let blocks: Vec<String> = signature
            .outputs
            .iter()
            .map(|field| output_text(field, values, missing).map(|text| block(&field.name, &text)))
            .collect::<Result<_, _>>()?;
        Ok(format!(
            "{}\n\n[[ ## completed ## ]]\n",
            strip(&blocks.join("\n\n"))
        ))
    }
}

/// The system message, with the structure that the adapter asks for.
pub(super) fn system_text(signature: &Signature, structure: &[String]) -> String {
    format!(
        "Your input fields are:\n{}\nYour output fields are:\n{}\n{}\n{}",
        field_list(&signature.inputs),
        field_list(&signature.outputs),
        structure.join("\n\n"),
        objective(signature)
    )
}

fn field_list(fields: &[Field]) -> String {
    let items: Vec<String> = fields
        .iter()
        .enumerate()
        .map(|(i, field)| {
            let desc = field.shown_desc().unwrap_or_default();
            format!(
                "{}. `{}` ({}): {desc}",
                i + 1,
                field.name,
                field.ty.annotation(true)
            )
        })
        .collect();
    strip(&items.join("\n")).to_owned()
}

pub(super) fn output_text(
    field: &Field,
    values: &Fields,
    missing: Option<&str>,
) -> Result<String, FormatError> {
    match (values.get(&field.name), missing) {
        (Some(value), _) => value_text(field, value, Dialect::Dspy3),
        (None, Some(missing)) => Ok(missing.to_owned()),
        (None, None) => Err(FormatError::Missing {
            field: field.name.clone(),
        }),
    }
}

/// A user turn: the inputs that are there, then what is required of the answer, if anything.
fn user(
    signature: &Signature,
    values: &Fields,
    prefix: &str,
    requirements: Option<String>,
) -> Result<String, FormatError> {
    let mut parts = vec![prefix.to_owned()];
    for field in &signature.inputs {
        if let Some(value) = values.get(&field.name) {
            parts.push(block(
                &field.name,
                &value_text(field, value, Dialect::Dspy3)?,
            ));
        }
    }
    parts.extend(requirements);
    Ok(strip(&parts.join("\n\n")).to_owned())
}

pub(super) fn type_info(field: &Field) -> String {
    match &field.ty {
        FieldType::Str => String::new(),
        ty => format!(
            " (must be formatted as a valid Python {})",
            ty.annotation(true)
        ),
    }
}

/// The conversation, with the adapter's own system message and assistant turns.
pub(super) fn conversation(
    (signature, demos, inputs): (&Signature, &[Demo], &Fields),
    system: String,
    requirements: String,
    assistant: impl Fn(&Fields, Option<&str>) -> Result<String, FormatError>,
) -> Result<Vec<Message>, FormatError> {
    let mut messages = vec![message(Role::System, system)];
    for (demo, complete) in shown_demos(signature, demos, Dialect::Dspy3) {
        let prefix = if complete { "" } else { INCOMPLETE };
        messages.push(message(
            Role::User,
            user(signature, &demo.fields, prefix, None)?,
        ));
        let missing = (!complete).then_some(NOT_SUPPLIED);
        messages.push(message(Role::Assistant, assistant(&demo.fields, missing)?));
    }
    messages.push(message(
        Role::User,
        user(signature, inputs, "", Some(requirements))?,
    ));
    Ok(messages)
}

impl Adapter for ChatV3Adapter {
    fn format(
        &self,
        signature: &Signature,
        demos: &[Demo],
        inputs: &Fields,
    ) -> Result<Vec<Message>, FormatError> {
        let names: Vec<String> = signature
            .outputs
            .iter()
            .map(|field| format!("`[[ ## {} ## ]]`{}", field.name, type_info(field)))
            .collect();
        let requirements = format!(
            "Respond with the corresponding output fields, starting with the field {}, and then \
             ending with the marker for `[[ ## completed ## ]]`.",
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
        let mut sections: Vec<(String, Vec<String>)> = vec![(String::new(), Vec::new())];
        for line in splitlines(text) {
            let stripped = strip(line);
            match HEADER
                .captures(stripped)
                .and_then(|found| Some((found.get(0)?, found.get(1)?)))
            {
                Some((header, name)) => {
                    // DSPy 3 cuts the unstripped line where the stripped one's header ends.
                    let end = stripped[..header.end()].chars().count();
                    let rest: String = line.chars().skip(end).collect();
                    let rest = strip(&rest).to_owned();
                    let lines = if rest.is_empty() {
                        Vec::new()
                    } else {
                        vec![rest]
                    };
                    sections.push((name.as_str().to_owned(), lines));
                }
                None => {
                    if let Some((_, lines)) = sections.last_mut() {
                        lines.push(line.to_owned());
                    }
                }
            }
        }
        let found = outputs_in(&sections, signature, FieldType::parse_v3)?;
        in_signature_order(signature, found)
    }

    fn choices(&self, signature: &Signature, values: Vec<String>) -> Choices {
        header_choices(signature, values)
    }

    fn fallback(&self) -> Option<&dyn Adapter> {
        Some(&JsonV3Adapter)
    }
}

/// The outputs in the signature's order; a missing optional one is null.
pub(super) fn in_signature_order(
    signature: &Signature,
    mut found: Fields,
) -> Result<Fields, ParseError> {
    let mut fields = Fields::new();
    for field in &signature.outputs {
        match (found.swap_remove(&field.name), &field.ty) {
            (Some(value), _) => fields.insert(field.name.clone(), value),
            (None, FieldType::Optional(_)) => fields.insert(field.name.clone(), Value::Null),
            (None, _) => {
                let expected = output_names(signature);
                let found = fields.keys().chain(found.keys()).cloned().collect();
                return Err(ParseError::MissingFields { expected, found });
            }
        };
    }
    Ok(fields)
}
