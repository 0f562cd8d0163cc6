//! Chats as tokens. Training and answering share this, so that a model is asked as it was taught.
//!
//! Knows no generation. Invariant: what a message says never becomes a special token: a user who
//! writes `<|im_end|>` does not end the turn. Nor does what the template is told besides, which
//! may not spell one.

use serde_json::Value;

use crate::base_model::BaseModel;
use crate::chat_template::{ChatMessage, TemplateArguments};
use crate::error::ModelError;

/// Private-use characters around a message's number, where its text must not be read as special.
const OPEN: char = '\u{E000}';
const CLOSE: char = '\u{E001}';

impl BaseModel {
    /// The tokens of a conversation up to where the assistant answers.
    ///
    /// # Errors
    /// [`ModelError::Template`] when the chat template refuses the messages;
    /// [`ModelError::Tokenizer`] when the vocabulary cannot express them.
    pub fn prompt_tokens(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, ModelError> {
        self.prompt_tokens_with(messages, &TemplateArguments::new())
    }

    /// The same, with what else the chat template is told.
    ///
    /// # Errors
    /// As [`BaseModel::prompt_tokens`]; and where `arguments` spell a special token.
    pub fn prompt_tokens_with(
        &self,
        messages: &[ChatMessage],
        arguments: &TemplateArguments,
    ) -> Result<Vec<u32>, ModelError> {
        for (name, value) in arguments {
            for text in texts(value) {
                if self.spells_special(text)? {
                    return Err(ModelError::Template(format!(
                        "`{name}` of `chat_template_kwargs` spells a special token; leave it out"
                    )));
                }
            }
        }
        for message in messages {
            if self.spells_special(&message.content)? {
                return self.guarded_tokens(messages, arguments);
            }
        }
        let rendered = self.chat.render_with(messages, true, arguments)?;
        self.tokenizer.encode(&rendered, true)
    }

    /// The tokens of an assistant's whole answer, with the one that ends the turn.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the vocabulary cannot express it.
    pub fn answer_tokens(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = self.tokenizer.encode(text, false)?;
        tokens.extend(self.tokenizer.eos().first());
        Ok(tokens)
    }

    fn spells_special(&self, text: &str) -> Result<bool, ModelError> {
        Ok(self.tokenizer.encode(text, true)? != self.tokenizer.encode(text, false)?)
    }

    /// Renders placeholders, and puts each message's text in their place as plain characters.
    fn guarded_tokens(
        &self,
        messages: &[ChatMessage],
        arguments: &TemplateArguments,
    ) -> Result<Vec<u32>, ModelError> {
        let said = messages.iter().map(|m| m.content.as_str());
        let told = arguments.values().flat_map(texts);
        if said.chain(told).any(|text| text.contains([OPEN, CLOSE])) {
            return Err(ModelError::Tokenizer(
                "a message spells a special token, and one of the messages or of \
                 `chat_template_kwargs` has the characters U+E000 or U+E001; remove one of them"
                    .to_owned(),
            ));
        }
        let marked: Vec<ChatMessage> = messages
            .iter()
            .enumerate()
            .map(|(i, m)| ChatMessage::new(m.role.clone(), format!("{OPEN}{i}{CLOSE}")))
            .collect();
        let rendered = self.chat.render_with(&marked, true, arguments)?;
        let mut tokens = Vec::new();
        let mut rest = rendered.as_str();
        while let Some((before, marker)) = rest.split_once(OPEN) {
            tokens.extend(self.tokenizer.encode(before, true)?);
            let (number, after) = marker.split_once(CLOSE).unwrap_or((marker, ""));
            let message = number.parse().ok().and_then(|i: usize| messages.get(i));
            let text = message.map_or("", |m| &m.content);
            tokens.extend(self.tokenizer.encode(text, false)?);
            rest = after;
        }
        tokens.extend(self.tokenizer.encode(rest, true)?);
        Ok(tokens)
    }
}

/// Every text in a value, the names of its entries too.
fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text.as_str()],
        Value::Array(items) => items.iter().flat_map(texts).collect(),
        Value::Object(entries) => {
            let inside = entries.values().flat_map(texts);
            entries.keys().map(String::as_str).chain(inside).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}

/// How many tokens all rows begin with; at least one token of each row is left over.
pub(super) fn common_start<'a>(mut rows: impl Iterator<Item = &'a [u32]>) -> usize {
    let Some(first) = rows.next() else { return 0 };
    let all = first.len().saturating_sub(1);
    rows.fold(all, |common, row| {
        let most = common.min(row.len().saturating_sub(1));
        (0..most).find(|i| row[*i] != first[*i]).unwrap_or(most)
    })
}
