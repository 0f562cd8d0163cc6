//! Conversion to fine-tuning messages: rows through the program's own adapter, so
//! that a model is trained on the very prompts that it will be asked with.

use crate::adapter::FormatError;
use crate::example::Example;
use crate::lm::{Message, Role};
use crate::program::{Predictor, Program, TraceStep};
use crate::value::Fields;
use serde::{Deserialize, Serialize};

/// One training conversation in OpenAI's chat format; the assistant's messages are the targets, one
/// of which is the last. [`ChatRow::answers`] says which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatRow {
    /// The conversation.
    pub messages: Vec<Message>,
}

impl ChatRow {
    /// Where the assistant's messages to learn are: those that come after a message of the user,
    /// and the last one. A greeting that begins a chat answers nothing.
    pub fn answers(&self) -> impl Iterator<Item = usize> {
        let is = |role: Role| move |message: &Message| message.role == role;
        let asked = self.messages.iter().position(is(Role::User));
        let last = self.messages.iter().rposition(is(Role::Assistant));
        let messages = self.messages.iter().enumerate();
        messages.filter_map(move |(at, message)| {
            let is_answer = asked.is_some_and(|asked| asked < at) || last == Some(at);
            (message.role == Role::Assistant && is_answer).then_some(at)
        })
    }
}

/// How to convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageOptions {
    /// Whether to leave the predictors' demos out of the prompts.
    pub exclude_demos: bool,
}

impl Default for MessageOptions {
    /// No demos; targets as they are, which is DSPy's way.
    fn default() -> Self {
        Self {
            exclude_demos: true,
        }
    }
}

/// Why a row cannot be converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A field is missing or cannot be written.
    #[error("row `{id}`: {source}")]
    Row {
        /// The row.
        id: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A trace of another program.
    #[error("row `{id}`: the program has no predictor `{predictor}`")]
    Predictor {
        /// The row.
        id: String,
        /// The name in the trace.
        predictor: String,
    },
}

/// The conversations of a traced run: one per step.
///
/// # Errors
/// When a step is another program's or lacks fields.
pub fn trace_to_messages(
    program: &Program,
    id: &str,
    trace: &[TraceStep],
    options: MessageOptions,
) -> Result<Vec<ChatRow>, MessageError> {
    trace
        .iter()
        .map(|step| {
            let predictor = program
                .predictors
                .iter()
                .find(|predictor| predictor.name == step.predictor)
                .ok_or_else(|| MessageError::Predictor {
                    id: id.to_owned(),
                    predictor: step.predictor.clone(),
                })?;
            conversation(predictor, &step.inputs, &step.outputs, options).map_err(|source| {
                MessageError::Row {
                    id: id.to_owned(),
                    source,
                }
            })
        })
        .collect()
}

/// The conversations of a row that has every step's outputs among its columns (such as `text`,
/// `reasoning`, `label`): one per predictor.
///
/// # Errors
/// When a column is missing.
pub fn row_to_messages(
    program: &Program,
    row: &Example,
    options: MessageOptions,
) -> Result<Vec<ChatRow>, MessageError> {
    program
        .predictors
        .iter()
        .map(|predictor| {
            conversation(
                predictor,
                &predictor.inputs(&row.fields),
                &row.fields,
                options,
            )
            .map_err(|source| MessageError::Row {
                id: row.id.clone(),
                source,
            })
        })
        .collect()
}

fn conversation(
    predictor: &Predictor,
    inputs: &Fields,
    outputs: &Fields,
    options: MessageOptions,
) -> Result<ChatRow, FormatError> {
    let demos = if options.exclude_demos {
        Vec::new()
    } else {
        predictor.demos_but(None)
    };
    let (adapter, signature) = (&predictor.adapter, &predictor.signature);
    if let Some(missing) = signature
        .inputs
        .iter()
        .find(|field| !inputs.contains_key(&field.name))
    {
        return Err(FormatError::Missing {
            field: missing.name.clone(),
        });
    }
    let mut messages = adapter.format(signature, &demos, inputs)?;
    let content = adapter.format_assistant(signature, outputs)?;
    messages.push(Message {
        role: Role::Assistant,
        content,
    });
    Ok(ChatRow { messages })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::program::ProgramSpec;

    #[test]
    fn a_message_that_nobody_asked_for_is_learnt_where_it_is_the_last() {
        let (user, assistant) = (Role::User, Role::Assistant);
        let answers = |roles: &[Role]| -> Vec<usize> {
            let messages = roles.iter().map(|role| Message {
                role: *role,
                content: "a".to_owned(),
            });
            let messages = messages.collect();
            ChatRow { messages }.answers().collect()
        };
        assert_eq!(answers(&[user, assistant, user, assistant]), [1, 3]);
        assert_eq!(answers(&[assistant, user, assistant]), [2]);
        let system = Role::System;
        assert_eq!(answers(&[system, assistant, user, assistant]), [3]);
        assert_eq!(answers(&[system, assistant, assistant]), [2]);
        assert!(answers(&[user]).is_empty());
    }

    #[test]
    fn rows_become_conversations() {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"predict": {"adapter": "compact", "instructions": "Sort.",
                "inputs": [{"name": "intent", "from": "text"}],
                "outputs": [{"name": "label", "type": "label"}]}}"#,
        )
        .unwrap();
        let program = spec.build(&[]).unwrap();
        let row = Example::of_texts("7", [("text", "where?"), ("label", "Card Arrival")]);
        let options = MessageOptions::default();
        let converted = row_to_messages(&program, &row, options).unwrap();
        assert_eq!(
            serde_json::to_string(&converted[0]).unwrap(),
            r#"{"messages":[{"role":"system","content":"Sort."},{"role":"user","content":"where?"},{"role":"assistant","content":"Card Arrival"}]}"#
        );
        let error = row_to_messages(&program, &Example::of_texts("8", [("text", "x")]), options);
        assert_eq!(
            error.unwrap_err().to_string(),
            "row `8`: field `label` has no value; give the row such a column or map one with `from`"
        );
    }
}
