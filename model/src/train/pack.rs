//! Several rows laid out as one matrix of tokens, without padding.
//!
//! Rows that start alike share those tokens: the common prefix is laid out once, before the
//! rest of each row. It is exact, also for the gradients, because a token's state depends on
//! the tokens before it alone. Knows no weights. Invariant: a row keeps at least one prompt
//! token of its own, so every predicted token has its own matrix row.

use super::attention::Span;
use super::past::Past;
use super::row::TrainRow;

/// A shared prefix below this many tokens costs more than it saves.
const MIN_PREFIX: usize = 4;

/// The matrix rows of a pass.
#[derive(Debug, Clone, Default)]
pub(super) struct Pack {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// How matrix rows belong together; the shared prefix, if any, comes first.
    pub(super) spans: Vec<Span>,
    /// Matrix row and the token that it predicts.
    pub(super) targets: Vec<(usize, u32)>,
    /// What spans see that was computed before.
    pub(super) past: Vec<Vec<Past>>,
}

impl Pack {
    /// Lays out `rows`.
    pub(super) fn new(rows: &[&TrainRow], share_prefix: bool) -> Self {
        let prefix = if share_prefix { common_prefix(rows) } else { 0 };
        let mut pack = Self::default();
        if let Some(first) = rows.first().filter(|_| prefix > 0) {
            pack.push(first.tokens().take(prefix), 0, 0);
        }
        for row in rows {
            let start = pack.push(row.tokens().skip(prefix), prefix, prefix);
            let first = start + row.prompt.len() - 1 - prefix;
            pack.aim(first, &row.target);
        }
        pack
    }

    /// Lays out `rows` from the places `starts` on, each after what it has in `pasts`.
    pub(super) fn activated(
        rows: &[&TrainRow],
        starts: impl Iterator<Item = usize>,
        pasts: impl Iterator<Item = Vec<Past>>,
    ) -> Self {
        let mut pack = Self::default();
        for ((row, from), past) in rows.iter().zip(starts).zip(pasts) {
            let start = pack.push(row.tokens().skip(from), from, 0);
            pack.see(past);
            pack.aim(start + row.prompt.len() - 1 - from, &row.target);
        }
        pack
    }

    /// Lays out stretches of tokens that predict nothing, with their first positions and what
    /// comes before them; empty ones are left out.
    pub(super) fn of_parts<'a>(
        parts: impl IntoIterator<Item = (&'a [u32], usize, Vec<Past>)>,
    ) -> Self {
        let mut pack = Self::default();
        for (tokens, position, past) in parts {
            if !tokens.is_empty() {
                pack.push(tokens.iter().copied(), position, 0);
                pack.see(past);
            }
        }
        pack
    }

    /// The last span sees `past`.
    fn see(&mut self, past: Vec<Past>) {
        if let Some(span) = self.spans.last_mut() {
            span.past = Some(self.past.len());
            span.past_len = past.iter().map(Past::len).sum();
            self.past.push(past);
        }
    }

    /// The matrix rows from `first` on predict `target`.
    fn aim(&mut self, first: usize, target: &[u32]) {
        let targets = target.iter().enumerate();
        self.targets
            .extend(targets.map(|(i, token)| (first + i, *token)));
    }

    /// Splits `rows` into passes of about `max_tokens` matrix rows, at least one row each.
    pub(super) fn split(rows: &[&TrainRow], share_prefix: bool, max_tokens: usize) -> Vec<Self> {
        let prefix = if share_prefix { common_prefix(rows) } else { 0 };
        let mut packs = Vec::new();
        let mut start = 0;
        while start < rows.len() {
            let mut size = prefix;
            let fits = |row: &&&TrainRow| {
                size += row.len() - prefix;
                size <= max_tokens
            };
            let count = rows[start..].iter().take_while(fits).count().max(1);
            packs.push(Self::new(&rows[start..start + count], share_prefix));
            start += count;
        }
        packs
    }

    fn push(&mut self, tokens: impl Iterator<Item = u32>, position: usize, prefix: usize) -> usize {
        let start = self.tokens.len();
        self.tokens.extend(tokens);
        let len = self.tokens.len() - start;
        self.positions
            .extend((position..position + len).map(|p| p as u32));
        self.spans.push(Span {
            start,
            len,
            prefix,
            past: None,
            past_len: 0,
        });
        start
    }
}

/// Number of leading tokens that all rows share; none for a single row.
fn common_prefix(rows: &[&TrainRow]) -> usize {
    let [first, rest @ ..] = rows else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    let shortest = rows
        .iter()
        .map(|row| row.prompt.len() - 1)
        .min()
        .unwrap_or(0);
    let same = |row: &&TrainRow| {
        let pairs = first.prompt.iter().zip(&row.prompt);
        pairs.take_while(|(a, b)| a == b).count()
    };
    let prefix = rest.iter().map(same).min().unwrap_or(0).min(shortest);
    if prefix < MIN_PREFIX { 0 } else { prefix }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &[u32], target: &[u32]) -> TrainRow {
        TrainRow {
            prompt: prompt.to_vec(),
            target: target.to_vec(),
        }
    }

    #[test]
    fn rows_share_what_they_start_with() {
        let rows = [
            row(&[1, 2, 3, 4, 5, 6], &[7, 9]),
            row(&[1, 2, 3, 4, 5], &[8, 9]),
        ];
        let rows: Vec<&TrainRow> = rows.iter().collect();
        let pack = Pack::new(&rows, true);
        assert_eq!(pack.tokens, [1, 2, 3, 4, 5, 6, 7, 5, 8]);
        assert_eq!(pack.positions, [0, 1, 2, 3, 4, 5, 6, 4, 5]);
        assert_eq!(pack.targets, [(5, 7), (6, 9), (7, 8), (8, 9)]);
        let span = |start, len, prefix| Span {
            start,
            len,
            prefix,
            past: None,
            past_len: 0,
        };
        assert_eq!(pack.spans, [span(0, 4, 0), span(4, 3, 4), span(7, 2, 4)]);
        let plain = Pack::new(&rows, false);
        assert_eq!(plain.tokens, [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 8]);
        assert_eq!(plain.spans, [span(0, 7, 0), span(7, 6, 0)]);
    }

    #[test]
    fn large_batches_are_split() {
        let rows: Vec<TrainRow> = (0..7).map(|i| row(&[1, 2, 3, 4, 5, i], &[7, 9])).collect();
        let rows: Vec<&TrainRow> = rows.iter().collect();
        let packs = Pack::split(&rows, true, 12);
        // Five shared tokens and two for each row.
        let sizes: Vec<usize> = packs.iter().map(|p| p.spans.len() - 1).collect();
        assert_eq!(sizes, [3, 3, 0]);
        let targets: usize = packs.iter().map(|p| p.targets.len()).sum();
        assert_eq!(targets, 14);
    }
}
