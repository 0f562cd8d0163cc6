//! [`Signature`]: what a prompting step takes and gives, and its instructions,
//! as DSPy declares them. Knows no prompt format and no model.

use crate::field_type::FieldType;
use crate::python_text::cleandoc;
use serde::{Deserialize, Serialize};

/// A named input or output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// Name: a Python identifier; prompts use it as the field's header.
    pub name: String,
    /// Description; `${name}` (DSPy's "none given") when absent.
    pub desc: Option<String>,
    /// Type of the values.
    #[serde(rename = "type")]
    pub ty: FieldType,
    /// DSPy's `prefix`, which only saved programs show; made from the name when absent.
    pub prefix: Option<String>,
}

impl Field {
    /// A text field without a description.
    pub fn text(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            desc: None,
            ty: FieldType::Str,
            prefix: None,
        }
    }

    /// The same field with a description.
    #[cfg(test)]
    pub(crate) fn with_desc(mut self, desc: impl Into<String>) -> Self {
        self.desc = Some(desc.into());
        self
    }

    /// The same field with a type.
    #[cfg(test)]
    pub(crate) fn with_type(mut self, ty: FieldType) -> Self {
        self.ty = ty;
        self
    }

    /// The description as DSPy keeps it: `${name}` when none was given.
    pub fn full_desc(&self) -> String {
        self.desc
            .clone()
            .unwrap_or_else(|| format!("${{{}}}", self.name))
    }

    /// The description that prompts show: none when it is `${name}`.
    pub(crate) fn shown_desc(&self) -> Option<&str> {
        self.desc
            .as_deref()
            .filter(|desc| *desc != format!("${{{}}}", self.name))
    }

    /// The prefix that saved programs show.
    pub(crate) fn full_prefix(&self) -> String {
        self.prefix
            .clone()
            .unwrap_or_else(|| format!("{}:", title_of(&self.name)))
    }
}

/// Inputs, outputs and instructions of one prompting step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// The task, cleaned as Python cleans docstrings.
    pub instructions: String,
    /// What is given.
    pub inputs: Vec<Field>,
    /// What is asked for, in the order in which it is to be answered.
    pub outputs: Vec<Field>,
}

impl Signature {
    /// A signature; without instructions it gets DSPy's default ones.
    pub fn new(instructions: Option<&str>, inputs: Vec<Field>, outputs: Vec<Field>) -> Self {
        let instructions = match instructions {
            Some(text) => cleandoc(text),
            None => default_instructions(&inputs, &outputs),
        };
        Self {
            instructions,
            inputs,
            outputs,
        }
    }

    /// Inputs, then outputs.
    pub fn fields(&self) -> impl Iterator<Item = &Field> {
        self.inputs.iter().chain(&self.outputs)
    }

    /// The output of that name.
    pub fn output(&self, name: &str) -> Option<&Field> {
        self.outputs.iter().find(|field| field.name == name)
    }
}

fn default_instructions(inputs: &[Field], outputs: &[Field]) -> String {
    let names = |fields: &[Field]| {
        let names: Vec<String> = fields
            .iter()
            .map(|field| format!("`{}`", field.name))
            .collect();
        names.join(", ")
    };
    format!(
        "Given the fields {}, produce the fields {}.",
        names(inputs),
        names(outputs)
    )
}

/// `max_tokens2` → `Max Tokens 2`: DSPy's `infer_prefix`.
fn title_of(name: &str) -> String {
    let mut spaced = String::new();
    let chars: Vec<char> = name.chars().collect();
    for (i, &c) in chars.iter().enumerate() {
        if i > 0 && starts_word(chars[i - 1], c, chars.get(i + 1).copied()) {
            spaced.push('_');
        }
        spaced.push(c);
    }
    let words: Vec<String> = spaced.split('_').map(title_word).collect();
    words.join(" ")
}

fn starts_word(previous: char, c: char, next: Option<char>) -> bool {
    let camel = c.is_ascii_uppercase()
        && (next.is_some_and(|next| next.is_ascii_lowercase())
            || previous.is_ascii_lowercase()
            || previous.is_ascii_digit());
    let number = (previous.is_ascii_alphabetic() && c.is_ascii_digit())
        || (previous.is_ascii_digit() && c.is_ascii_alphabetic());
    previous != '_' && (camel || number)
}

fn title_word(word: &str) -> String {
    let cased = word.chars().any(char::is_alphabetic);
    if cased && !word.chars().any(char::is_lowercase) {
        return word.to_owned();
    }
    let mut chars = word.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().collect::<String>() + &chars.as_str().to_lowercase(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_inferred_as_dspy_does() {
        for (name, prefix) in [
            ("intent", "Intent:"),
            ("some_attribute_name", "Some Attribute Name:"),
            ("camelCaseName", "Camel Case Name:"),
            ("text2number", "Text 2 Number:"),
            ("query_URL", "Query URL:"),
        ] {
            assert_eq!(Field::text(name).full_prefix(), prefix);
        }
    }

    #[test]
    fn instructions_default_to_the_fields() {
        let signature = Signature::new(
            None,
            vec![Field::text("a"), Field::text("b")],
            vec![Field::text("x")],
        );
        assert_eq!(
            signature.instructions,
            "Given the fields `a`, `b`, produce the fields `x`."
        );
    }

    #[test]
    fn a_desc_that_repeats_the_name_is_none() {
        assert_eq!(Field::text("x").shown_desc(), None);
        assert_eq!(Field::text("x").with_desc("${x}").shown_desc(), None);
        assert_eq!(Field::text("x").with_desc("").shown_desc(), Some(""));
        assert_eq!(Field::text("x").full_desc(), "${x}");
    }
}
