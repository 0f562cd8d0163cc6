//! Packs of an activated adapter: of each row, the part from the invocation on.
//!
//! What comes before is the base model's alone. What all rows begin with is computed once for the
//! whole training, the rest of it once a step, forward only. Knows no loss.

use std::sync::Arc;

use super::pack::Pack;
use super::params::Layout;
use super::past::{Past, Stretch};
use super::row::TrainRow;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::lora::activation;

/// Computes tokens with the base model alone.
pub(super) type Plain<'a> = dyn FnMut(&Pack) -> Result<Stretch, ModelError> + 'a;

/// What the rows of an activated adapter have in common.
pub(super) struct Activated {
    invocation: Vec<u32>,
    /// Of a model without an adapter.
    pub(super) layout: Layout,
    /// Number of tokens that all rows begin with, all before the invocation.
    common: usize,
    shared: Option<Past>,
}

/// Checks that every row has the invocation.
///
/// # Errors
/// [`ModelError::Row`] naming the row.
pub(super) fn check(rows: &[TrainRow], invocation: &[u32]) -> Result<(), ModelError> {
    let lacking = rows
        .iter()
        .position(|row| activation(&row.prompt, invocation).is_none());
    match lacking {
        None => Ok(()),
        Some(index) => Err(ModelError::Row {
            index,
            reason: format!(
                "the prompt lacks the invocation tokens {invocation:?}, so the adapter would \
                 never take effect; take tokens that every prompt has"
            ),
        }),
    }
}

impl Activated {
    /// Finds what `rows` have in common; [`Activated::compute_shared`] computes it.
    pub(super) fn new<'r>(
        invocation: &[u32],
        model: &LlamaConfig,
        rows: impl Iterator<Item = &'r TrainRow> + Clone,
    ) -> Self {
        let mut this = Self {
            invocation: invocation.to_vec(),
            layout: Layout::none(model),
            common: 0,
            shared: None,
        };
        if let Some(first) = rows.clone().next() {
            let before = &first.prompt[..this.start(first)];
            let same = |row: &TrainRow| {
                let pairs = before.iter().zip(&row.prompt[..this.start(row)]);
                pairs.take_while(|(a, b)| a == b).count()
            };
            this.common = rows.map(same).min().unwrap_or(0);
        }
        this
    }

    /// Computes what all rows begin with; `row` is any of them.
    pub(super) fn compute_shared(
        &mut self,
        plain: &mut Plain<'_>,
        row: &TrainRow,
    ) -> Result<(), ModelError> {
        if self.common > 0 {
            let pack = Pack::of_parts([(&row.prompt[..self.common], 0, Vec::new())]);
            let stretch = Arc::new(plain(&pack)?);
            self.shared = Some(Past::new(&stretch, 0, self.common));
        }
        Ok(())
    }

    /// Packs of about `max_tokens` adapted tokens, at least one row each, ready for the adapted
    /// model; also the number of tokens that the base model computed for them.
    pub(super) fn packs(
        &self,
        plain: &mut Plain<'_>,
        rows: &[&TrainRow],
        max_tokens: usize,
    ) -> Result<(Vec<Pack>, usize), ModelError> {
        let (mut packs, mut computed, mut rest) = (Vec::new(), 0, rows);
        while !rest.is_empty() {
            let mut size = 0;
            let fits = |row: &&&TrainRow| {
                size += row.len() - self.start(row);
                size <= max_tokens
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            let (pack, tokens) = self.pack(plain, now)?;
            packs.push(pack);
            computed += tokens;
            rest = later;
        }
        Ok((packs, computed))
    }

    fn pack(&self, plain: &mut Plain<'_>, rows: &[&TrainRow]) -> Result<(Pack, usize), ModelError> {
        let shared = || self.shared.iter().cloned().collect::<Vec<_>>();
        let parts = rows.iter().map(|row| {
            let part = &row.prompt[self.common..self.start(row)];
            (part, self.common, shared())
        });
        let before = Pack::of_parts(parts);
        let tokens = before.tokens.len();
        let stretch = Arc::new(match tokens {
            0 => Stretch::default(),
            _ => plain(&before)?,
        });
        let mut at = 0;
        let pasts = rows.iter().map(|row| {
            let len = self.start(row) - self.common;
            let mut past = shared();
            if len > 0 {
                past.push(Past::new(&stretch, at, len));
            }
            at += len;
            past
        });
        let starts = rows.iter().map(|row| self.start(row));
        Ok((Pack::activated(rows, starts, pasts), tokens))
    }

    /// Where the adapter takes effect; [`check`] made sure that it does.
    fn start(&self, row: &TrainRow) -> usize {
        activation(&row.prompt, &self.invocation).unwrap_or(row.prompt.len() - 1)
    }
}
