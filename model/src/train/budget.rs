//! [`Budget`]: how much a training may compute at once.
//!
//! The room that `max_tokens` tokens take with all that is kept of them, in tokens of which less is
//! kept. Knows no rows.

use super::params::Layout;
use super::tape::{Keep, Tape};
use crate::config::LlamaConfig;

/// Numbers of tokens that take the same room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// Of which everything is kept that the backward pass reads.
    pub(super) whole: usize,
    /// Of which the layers' inputs are kept; no fewer than `whole`.
    pub(super) inputs: usize,
    /// Of which keys and values are kept.
    pub(super) past: usize,
}

impl Budget {
    pub(super) fn new(model: &LlamaConfig, layout: &Layout, max_tokens: usize) -> Self {
        let floats = |keep| Tape::token_floats(model, layout, keep) as f64;
        let room = max_tokens as f64 * floats(Keep::Everything);
        let past = (2 * model.layers * model.kv_width()) as f64;
        Self {
            whole: max_tokens,
            inputs: ((room / floats(Keep::Inputs)) as usize).max(max_tokens),
            past: (room / past) as usize,
        }
    }

    /// Whether there is room for `tokens` tokens with all that is kept of them, and beside them for
    /// keys and values of `past` others.
    pub(super) fn fits(&self, tokens: usize, past: usize) -> bool {
        let share = |tokens: usize, of: usize| tokens as f64 / of.max(1) as f64;
        share(tokens, self.whole) + share(past, self.past) <= 1.0
    }

    /// What is kept of a pass over `tokens` tokens.
    pub(super) fn keep(&self, tokens: usize) -> Keep {
        match tokens > self.whole {
            true => Keep::Inputs,
            false => Keep::Everything,
        }
    }

    /// What such a pass computes, in forward passes over a token: a backward pass is about one,
    /// since frozen weights get no gradient.
    pub(super) fn work(&self, tokens: usize) -> usize {
        match self.keep(tokens) {
            Keep::Inputs => 3 * tokens,
            Keep::Everything | Keep::Nothing => 2 * tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tiny;
    use super::*;
    use crate::lora::LoraConfig;

    #[test]
    fn less_that_is_kept_is_room_for_more_tokens() -> Result<(), crate::error::ModelError> {
        let mut model = tiny::config();
        model.layers = 20;
        let layout = Layout::new(&LoraConfig::default(), &model)?;
        let budget = Budget::new(&model, &layout, 100);
        assert_eq!(budget.whole, 100);
        assert!(
            budget.inputs > 300 && budget.past > budget.inputs,
            "{budget:?}"
        );
        assert!(budget.fits(100, 0) && !budget.fits(101, 0) && !budget.fits(100, 1));
        assert!(budget.fits(50, budget.past / 2) && !budget.fits(51, budget.past / 2 + 1));
        let all = Budget::new(&model, &layout, usize::MAX);
        assert!(all.fits(1 << 40, 1 << 40));
        Ok(())
    }
}
