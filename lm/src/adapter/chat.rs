//! [`ChatAdapter`]: the message format of DSPy 2.5, byte for byte. Every field has
//! a `[[ ## name ## ]]` header; the answer ends with `[[ ## completed ## ]]`.

use super::field_text::{
    INCOMPLETE, STRUCTURE, block, objective, placeholders, shown_demos, value_text,
};
use super::{Adapter, Dialect, FormatError, ParseError, message, output_names};
use crate::example::Demo;
use crate::field_type::FieldType;
use crate::lm::{Choices, Message, Role};
use crate::python_text::{splitlines, strip};
use crate::signature::{Field, Signature};
use crate::value::{Fields, Value};
use regex::Regex;
use std::borrow::Borrow;
use std::sync::LazyLock;

const NOT_SUPPLIED: &str = "Not supplied for this particular example.";

/// A field header at the start of a line. Python's `\w`: letters, numbers, underscore.
pub(super) static HEADER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^\[\[ ## ([\p{L}\p{N}_]+) ## \]\]").expect("the pattern is valid")
});

/// DSPy 2.5's chat adapter.
#[derive(Debug, Clone)]
pub struct ChatAdapter {
    dialect: Dialect,
}

impl Default for ChatAdapter {
    fn default() -> Self {
        Self::new()
    }
}

impl ChatAdapter {
    /// As in DSPy 2.5.16.
    pub fn new() -> Self {
        Self {
            dialect: Dialect::Dspy25,
        }
    }

    /// As in DSPy's fine-tuning branch of October 2024.
    pub fn dev() -> Self {
        Self {
            dialect: Dialect::Dspy25Dev,
        }
    }

    fn system(&self, signature: &Signature) -> String {
        let parts = [
            format!("Your input fields are:\n{}", field_list(&signature.inputs)),
            format!(
                "Your output fields are:\n{}",
                field_list(&signature.outputs)
            ),
            STRUCTURE.to_owned(),
            placeholders(&signature.inputs, false, self.dialect),
            placeholders(&signature.outputs, true, self.dialect),
            "[[ ## completed ## ]]".to_owned(),
            objective(signature),
        ];
        strip(&parts.join("\n\n")).to_owned()
    }

    fn user(
        &self,
        signature: &Signature,
        values: &Fields,
        complete: bool,
    ) -> Result<String, FormatError> {
        let mut parts = Vec::new();
        if !complete {
            parts.push(INCOMPLETE.to_owned());
        }
        parts.push(
            strip(
                &self
                    .blocks(&signature.inputs, values, complete)?
                    .join("\n\n"),
            )
            .to_owned(),
        );
        let names: Vec<String> = signature
            .outputs
            .iter()
            .map(|field| format!("`{}`", field.name))
            .collect();
        parts.push(format!(
            "Respond with the corresponding output fields, starting with the field {}, and then \
             ending with the marker for `completed`.",
            names.join(", then ")
        ));
        Ok(strip(&parts.join("\n\n")).to_owned())
    }

    fn assistant(
        &self,
        signature: &Signature,
        values: &Fields,
        complete: bool,
    ) -> Result<String, FormatError> {
        let mut blocks = self.blocks(&signature.outputs, values, complete)?;
        blocks.push("[[ ## completed ## ]]".to_owned());
        Ok(strip(&blocks.join("\n\n")).to_owned())
    }

    fn blocks(
        &self,
        fields: &[Field],
        values: &Fields,
        complete: bool,
    ) -> Result<Vec<String>, FormatError> {
        fields
            .iter()
            .map(|field| match values.get(&field.name) {
                Some(value) => Ok(block(&field.name, &value_text(field, value, self.dialect)?)),
                None if complete => Err(FormatError::Missing {
                    field: field.name.clone(),
                }),
                None => Ok(block(&field.name, NOT_SUPPLIED)),
            })
            .collect()
    }
}

fn field_list(fields: &[Field]) -> String {
    let items: Vec<String> = fields
        .iter()
        .enumerate()
        .map(|(i, field)| {
            let desc = field
                .shown_desc()
                .map_or_else(String::new, |desc| format!(": {desc}"));
            format!(
                "{}. `{}` ({}){desc}",
                i + 1,
                field.name,
                field.ty.annotation(false)
            )
        })
        .collect();
    strip(&items.join("\n")).to_owned()
}

impl Adapter for ChatAdapter {
    fn format(
        &self,
        signature: &Signature,
        demos: &[Demo],
        inputs: &Fields,
    ) -> Result<Vec<Message>, FormatError> {
        let mut messages = vec![message(Role::System, self.system(signature))];
        for (demo, complete) in shown_demos(signature, demos, self.dialect) {
            messages.push(message(
                Role::User,
                self.user(signature, &demo.fields, complete)?,
            ));
            let answer = self.assistant(signature, &demo.fields, complete)?;
            messages.push(message(Role::Assistant, answer));
        }
        messages.push(message(Role::User, self.user(signature, inputs, true)?));
        Ok(messages)
    }

    fn format_assistant(
        &self,
        signature: &Signature,
        outputs: &Fields,
    ) -> Result<String, FormatError> {
        self.assistant(signature, outputs, true)
    }

    fn parse(&self, signature: &Signature, text: &str) -> Result<Fields, ParseError> {
        let mut sections: Vec<(&str, Vec<&str>)> = vec![("", Vec::new())];
        for line in splitlines(text) {
            match HEADER.captures(strip(line)).and_then(|found| found.get(1)) {
                Some(name) => sections.push((name.as_str(), Vec::new())),
                None => {
                    if let Some((_, lines)) = sections.last_mut() {
                        lines.push(line);
                    }
                }
            }
        }
        let fields = outputs_in(&sections, signature, FieldType::parse_v2)?;
        let expected = output_names(signature);
        let in_order = self.dialect != Dialect::Dspy25Dev || fields.keys().eq(expected.iter());
        if fields.len() != expected.len() || !in_order {
            let found = fields.keys().cloned().collect();
            return Err(ParseError::MissingFields { expected, found });
        }
        Ok(fields)
    }

    fn choices(&self, signature: &Signature, values: Vec<String>) -> Choices {
        header_choices(signature, values)
    }
}

/// The outputs among the sections of an answer, each a name and the lines below its header. Of
/// several with one name the first counts.
pub(super) fn outputs_in<N: AsRef<str>, L: Borrow<str>>(
    sections: &[(N, Vec<L>)],
    signature: &Signature,
    parse: impl Fn(&FieldType, &str) -> Result<Value, String>,
) -> Result<Fields, ParseError> {
    let mut fields = Fields::new();
    for (name, lines) in sections {
        let name = name.as_ref();
        let Some(field) = signature.output(name) else {
            continue;
        };
        if fields.contains_key(name) {
            continue;
        }
        let value = parse(&field.ty, strip(&lines.join("\n")));
        let value = value.map_err(|reason| ParseError::Field {
            field: name.to_owned(),
            reason,
        })?;
        fields.insert(name.to_owned(), value);
    }
    Ok(fields)
}

/// The restriction of the last field under its header.
pub(super) fn header_choices(signature: &Signature, values: Vec<String>) -> Choices {
    let after = signature.outputs.last().map(|field| block(&field.name, ""));
    Choices {
        after,
        values,
        then: "\n\n[[ ## completed ## ]]".to_owned(),
    }
}
