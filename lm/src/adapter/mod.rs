//! [`Adapter`]: turns a signature, demos and inputs into chat messages, and a
//! model's answer back into fields. Knows no model and no program; the same
//! adapter serves prompting, fine-tuning data and serving, so they cannot differ.

mod chat;
mod chat_v3;
mod compact;
mod field_text;
mod json_v3;

pub use chat::ChatAdapter;
pub use chat_v3::ChatV3Adapter;
pub use compact::CompactAdapter;
pub use json_v3::JsonV3Adapter;

use crate::example::Demo;
use crate::lm::{Choices, Message, Role};
use crate::signature::Signature;
use crate::value::Fields;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Whose prompt bytes and optimizer rules to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Dialect {
    /// DSPy 2.5 (2.5.13 to 2.5.16): what most programs of its time were tuned with.
    #[default]
    #[serde(rename = "dspy-2.5")]
    Dspy25,
    /// DSPy's fine-tuning branch of October 2024, a little before 2.5.13: like `dspy-2.5` but
    /// without type notes, and answers must give their fields in order.
    #[serde(rename = "dspy-2.5-dev")]
    Dspy25Dev,
    /// DSPy 3 (3.4.1).
    #[serde(rename = "dspy-3")]
    Dspy3,
}

/// Which adapter a program speaks through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// DSPy's chat adapter: every field has a `[[ ## name ## ]]` header.
    #[default]
    Chat,
    /// As few tokens as possible, for small fine-tuned models.
    Compact,
}

impl AdapterKind {
    /// The adapter of this kind in that dialect.
    pub fn adapter(self, dialect: Dialect) -> Arc<dyn Adapter> {
        match (self, dialect) {
            (Self::Compact, _) => Arc::new(CompactAdapter),
            (Self::Chat, Dialect::Dspy3) => Arc::new(ChatV3Adapter),
            (Self::Chat, Dialect::Dspy25) => Arc::new(ChatAdapter::new()),
            (Self::Chat, Dialect::Dspy25Dev) => Arc::new(ChatAdapter::dev()),
        }
    }
}

/// Why a prompt cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A field that must have a value has none.
    #[error("field `{field}` has no value; give the row such a column or map one with `from`")]
    Missing {
        /// Name of the field.
        field: String,
    },
    /// A list in a text field holds something that cannot be shown.
    #[error("field `{field}` is a list with an item that is no text; give texts or type the field")]
    ListItem {
        /// Name of the field.
        field: String,
    },
}

/// Why an answer cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Fields are missing, or in the wrong order where the dialect minds.
    #[error("the answer has the fields {found:?} where {expected:?} were asked for")]
    MissingFields {
        /// Outputs asked for.
        expected: Vec<String>,
        /// Outputs found, in order.
        found: Vec<String>,
    },
    /// A field's text is not of its type.
    #[error("field `{field}` of the answer: {reason}")]
    Field {
        /// Name of the field.
        field: String,
        /// What was wrong.
        reason: String,
    },
}

/// A prompt format.
pub trait Adapter: Send + Sync + std::fmt::Debug {
    /// The whole conversation for one query; demos that the format cannot show are left out.
    ///
    /// # Errors
    /// When an input is missing (where the dialect minds) or cannot be written.
    fn format(
        &self,
        signature: &Signature,
        demos: &[Demo],
        inputs: &Fields,
    ) -> Result<Vec<Message>, FormatError>;

    /// The assistant's turn that gives these outputs, as training data show it.
    ///
    /// # Errors
    /// When an output is missing or cannot be written.
    fn format_assistant(
        &self,
        signature: &Signature,
        outputs: &Fields,
    ) -> Result<String, FormatError>;

    /// The outputs that an answer gives.
    ///
    /// # Errors
    /// When outputs are missing or of the wrong type.
    fn parse(&self, signature: &Signature, text: &str) -> Result<Fields, ParseError>;

    /// How to restrict the *last* output to the given texts.
    fn choices(&self, signature: &Signature, values: Vec<String>) -> Choices;

    /// The format to ask again in when an answer cannot be read.
    fn fallback(&self) -> Option<&dyn Adapter> {
        None
    }

    /// Whether demos are labelled rows in the data's own columns: an input that a demo lacks is
    /// then taken from the column that the program maps to it.
    fn maps_columns(&self) -> bool {
        false
    }
}

fn message(role: Role, content: String) -> Message {
    Message { role, content }
}

fn output_names(signature: &Signature) -> Vec<String> {
    signature
        .outputs
        .iter()
        .map(|field| field.name.clone())
        .collect()
}
