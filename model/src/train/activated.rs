//! Packs of an activated adapter: of each row, the part from the invocation on.
//!
//! What comes before is the base model's alone. What all rows begin with is computed once for the
//! whole training, the rest of it once a step, forward only and piece by piece. Knows no loss.

use std::ops::Range;
use std::sync::Arc;

use super::budget::Budget;
use super::pack::{self, Pack};
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
    /// Their keys and values.
    shared: Vec<Past>,
}

/// Checks that every row has the invocation, and learns nothing before it.
///
/// # Errors
/// [`ModelError::Row`] naming the row.
pub(super) fn check(rows: &[TrainRow], invocation: &[u32]) -> Result<(), ModelError> {
    let lacking = rows
        .iter()
        .position(|row| activation(&row.prompt, invocation).is_none());
    if let Some(index) = rows.iter().position(|row| !row.earlier.is_empty()) {
        let reason = "an activated adapter learns the last answer of a row alone; give earlier ones \
                      rows of their own";
        let reason = reason.to_owned();
        return Err(ModelError::Row { index, reason });
    }
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
            shared: Vec::new(),
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

    /// Computes what all rows begin with, about `most` tokens at once; `row` is any of them.
    pub(super) fn compute_shared(
        &mut self,
        plain: &mut Plain<'_>,
        row: &TrainRow,
        most: usize,
    ) -> Result<(), ModelError> {
        let whole = std::iter::once(0..self.common);
        let mut pasts = vec![Vec::new()];
        compute(plain, &[row], pieces(whole, most), &mut pasts)?;
        self.shared = pasts.swap_remove(0);
        Ok(())
    }

    /// Cuts `rows` into those of each pass, at least one. Beside its adapted tokens a pass needs
    /// room for the keys and values that were computed for its rows alone.
    pub(super) fn groups<'r, 't>(
        &self,
        rows: &'r [&'t TrainRow],
        budget: &Budget,
    ) -> Vec<&'r [&'t TrainRow]> {
        let size = |row: &TrainRow| {
            let start = self.start(row);
            (row.len() - start, start - self.common)
        };
        pack::cut(rows, size, |tokens, past| budget.fits(tokens, past))
    }

    /// The rows of a pass, ready for the adapted model; also the number of tokens that the base
    /// model computed for them, about `most` at once.
    pub(super) fn pack(
        &self,
        plain: &mut Plain<'_>,
        rows: &[&TrainRow],
        most: usize,
    ) -> Result<(Pack, usize), ModelError> {
        let before = rows.iter().map(|row| self.common..self.start(row));
        let mut pasts = vec![self.shared.clone(); rows.len()];
        let tokens = compute(plain, rows, pieces(before, most), &mut pasts)?;
        let starts = rows.iter().map(|row| self.start(row));
        Ok((Pack::activated(rows, starts, pasts.into_iter()), tokens))
    }

    /// Where the adapter takes effect; [`check`] made sure that it does.
    fn start(&self, row: &TrainRow) -> usize {
        activation(&row.prompt, &self.invocation).unwrap_or(row.prompt.len() - 1)
    }
}

/// A part of a row's prompt: the row and the places.
type Part = (usize, Range<usize>);

/// Cuts a stretch of each row into pieces of `most` tokens, of one or several rows.
fn pieces(stretches: impl Iterator<Item = Range<usize>>, most: usize) -> Vec<Vec<Part>> {
    let mut pieces: Vec<Vec<Part>> = Vec::new();
    let mut room = 0;
    for (row, Range { mut start, end }) in stretches.enumerate() {
        while start < end {
            if room == 0 {
                pieces.push(Vec::new());
                room = most.max(1);
            }
            let to = end.min(start.saturating_add(room));
            if let Some(piece) = pieces.last_mut() {
                piece.push((row, start..to));
            }
            room -= to - start;
            start = to;
        }
    }
    pieces
}

/// Computes pieces one after the other. Each sees what `pasts` has of its rows, and is added to
/// it. Gives the number of tokens.
fn compute(
    plain: &mut Plain<'_>,
    rows: &[&TrainRow],
    pieces: Vec<Vec<Part>>,
    pasts: &mut [Vec<Past>],
) -> Result<usize, ModelError> {
    let mut computed = 0;
    for piece in pieces {
        let parts = piece.iter().map(|(row, places)| {
            let tokens = &rows[*row].prompt[places.clone()];
            (tokens, places.start, pasts[*row].clone())
        });
        let pack = Pack::of_parts(parts);
        let stretch = Arc::new(plain(&pack)?);
        let mut at = 0;
        for (row, places) in piece {
            pasts[row].push(Past::new(&stretch, at, places.len()));
            at += places.len();
        }
        computed += at;
    }
    Ok(computed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tiny;
    use super::*;

    /// Rows that begin with 1, 2, 3, go on with so many tokens of their own, and end with the
    /// invocation 7 and a question.
    fn rows(own: &[usize]) -> Vec<TrainRow> {
        let row = |(at, own): (usize, &usize)| TrainRow {
            prompt: [&[1, 2, 3][..], &vec![10 + at as u32; *own], &[7, 8]].concat(),
            target: vec![9, 0],
            earlier: Vec::new(),
        };
        own.iter().enumerate().map(row).collect()
    }

    #[test]
    fn what_comes_before_is_computed_piece_by_piece_and_counts_as_room() {
        let rows = rows(&[25, 4, 6, 0, 31]);
        let mut activated = Activated::new(&[7], &tiny::config(), rows.iter());
        assert_eq!(activated.common, 3);
        let mut seen = Vec::new();
        let mut plain = |pack: &Pack| -> Result<Stretch, ModelError> {
            let spans = pack.spans.iter();
            seen.extend(spans.map(|span| (span.len, pack.positions[span.start], span.past_len)));
            assert!(pack.tokens.len() <= 10 && pack.targets.is_empty());
            Ok(Stretch::new(pack.tokens.len()))
        };
        activated.compute_shared(&mut plain, &rows[0], 2).unwrap();
        let refs: Vec<&TrainRow> = rows.iter().collect();
        let (pack, tokens) = activated.pack(&mut plain, &refs, 10).unwrap();
        assert_eq!(tokens, 25 + 4 + 6 + 31);
        let wanted = [
            // The common start.
            (2, 0, 0),
            (1, 2, 2),
            // The first row, then what is left of a piece is the second's.
            (10, 3, 3),
            (10, 13, 13),
            (5, 23, 23),
            (4, 3, 3),
            (1, 3, 3),
            (5, 4, 4),
            (5, 3, 3),
            (10, 8, 8),
            (10, 18, 18),
            (6, 28, 28),
        ];
        assert_eq!(seen, wanted);
        // Each row sees all that comes before its invocation.
        let pasts: Vec<usize> = pack.spans.iter().map(|span| span.past_len).collect();
        assert_eq!(pasts, [28, 7, 9, 3, 34]);

        let groups = |past| {
            let budget = Budget {
                whole: 1000,
                inputs: 1000,
                past,
            };
            let groups = activated.groups(&refs, &budget);
            groups.iter().map(|rows| rows.len()).collect::<Vec<_>>()
        };
        assert_eq!(groups(1_000_000), [5]);
        assert_eq!(groups(40), [4, 1]);
        assert_eq!(groups(20), [1, 3, 1]);
    }
}
