//! What is learnt from: one conversation as tokens.

use crate::config::LlamaConfig;
use crate::error::ModelError;

/// One training example. The loss is on `target` alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainRow {
    /// The rendered conversation up to the assistant's answer.
    pub prompt: Vec<u32>,
    /// The answer, ending with the token that ends a turn.
    pub target: Vec<u32>,
}

impl TrainRow {
    /// Number of tokens that go through the model: the last target is only predicted.
    pub(super) fn len(&self) -> usize {
        self.prompt.len() + self.target.len() - 1
    }

    /// The tokens that go through the model.
    pub(super) fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.prompt
            .iter()
            .chain(&self.target)
            .copied()
            .take(self.len())
    }
}

/// Checks that every row fits the model.
///
/// # Errors
/// [`ModelError::Row`] with the row's index, what is wrong and the remedy.
pub(super) fn check(rows: &[TrainRow], model: &LlamaConfig) -> Result<(), ModelError> {
    for (index, row) in rows.iter().enumerate() {
        let refuse = |reason: String| Err(ModelError::Row { index, reason });
        if row.prompt.is_empty() || row.target.is_empty() {
            return refuse("a training row needs a prompt and a target".to_owned());
        }
        let limit = model.context;
        if row.len() > limit {
            let length = row.len();
            return refuse(format!(
                "{length} tokens are more than the model's context of {limit}; shorten it or leave it out"
            ));
        }
        let mut tokens = row.prompt.iter().chain(&row.target);
        if let Some(token) = tokens.find(|token| **token as usize >= model.vocab) {
            let vocab = model.vocab;
            return refuse(format!(
                "token {token} is not one of the {vocab} of the model"
            ));
        }
    }
    Ok(())
}
