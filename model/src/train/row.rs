//! What is learnt from: one conversation as tokens.

use std::ops::Range;

use crate::config::LlamaConfig;
use crate::error::ModelError;

/// One training example. The loss is on `target`, and on what `earlier` names of the prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrainRow {
    /// The rendered conversation up to the assistant's answer.
    pub prompt: Vec<u32>,
    /// The answer, ending with the token that ends a turn.
    pub target: Vec<u32>,
    /// Where earlier answers stand in the prompt, in order; usually none. An activated adapter, which
    /// takes effect after them, cannot learn them.
    pub earlier: Vec<Range<usize>>,
}

impl TrainRow {
    /// Number of tokens that go through the model: the last target is only predicted.
    pub(super) fn len(&self) -> usize {
        self.prompt.len() + self.target.len() - 1
    }

    /// Number of tokens that are learnt.
    pub(super) fn targets(&self) -> usize {
        self.target.len() + self.earlier.iter().map(Range::len).sum::<usize>()
    }

    /// Where the first token stands that is learnt.
    pub(super) fn first_target(&self) -> usize {
        let first = self.earlier.first();
        first.map_or(self.prompt.len(), |answer| answer.start)
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
        let mut free = 1;
        for answer in &row.earlier {
            if answer.start < free || answer.is_empty() || answer.end > row.prompt.len() {
                return refuse(format!(
                    "the earlier answer at {answer:?} is not within the prompt, after its first token \
                     and the answers before"
                ));
            }
            free = answer.end;
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

#[cfg(test)]
mod tests {
    use super::super::tiny;
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn earlier_answers_are_within_the_prompt_and_in_order() {
        let row = |earlier: Vec<Range<usize>>| TrainRow {
            prompt: vec![1, 2, 3, 4, 5, 6],
            target: vec![7, 0],
            earlier,
        };
        let fits = |earlier| check(&[row(earlier)], &tiny::config());
        assert!(fits(vec![1..3, 3..4, 5..6]).is_ok());
        for bad in [vec![0..2], vec![5..7], vec![3..5, 2..3]] {
            let error = fits(bad.clone()).err();
            let error = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(
                error.contains("training row 1: the earlier answer"),
                "{bad:?}"
            );
        }
        let row = row(vec![2..4, 5..6]);
        assert_eq!((row.targets(), row.first_target()), (5, 2));
    }
}
