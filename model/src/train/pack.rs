//! Several rows laid out as one matrix of tokens, without padding.
//!
//! Rows that start alike share those tokens: the common prefix is laid out once, before the
//! rest of each row. It is exact, also for the gradients, because a token's state depends on
//! the tokens before it alone. Knows no weights. Invariant: a row keeps at least the token before the
//! first that it learns, so every predicted token has its own matrix row.

use super::attention::Span;
use super::budget::Budget;
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
            for answer in &row.earlier {
                let first = start + answer.start - 1 - prefix;
                pack.aim(first, &row.prompt[answer.clone()]);
            }
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

/// Cuts `rows` into those of each pass, at least one.
///
/// A pass that keeps everything is computed once, one that keeps the layers' inputs half as often
/// again, but holds more rows, so that what all of them begin with is computed for fewer passes.
/// What computes less is taken.
pub(super) fn groups<'r, 't>(
    rows: &'r [&'t TrainRow],
    share_prefix: bool,
    budget: &Budget,
) -> Vec<&'r [&'t TrainRow]> {
    let prefix = if share_prefix { common_prefix(rows) } else { 0 };
    let up_to = |most: usize| {
        let rest = |row: &TrainRow| (row.len() - prefix, 0);
        cut(rows, rest, |tokens, _| prefix + tokens <= most)
    };
    let work = |groups: &[&[&TrainRow]]| {
        let tokens = groups.iter().map(|rows| {
            let rest = rows.iter().map(|row| row.len() - prefix);
            prefix + rest.sum::<usize>()
        });
        tokens.map(|tokens| budget.work(tokens)).sum::<usize>()
    };
    let (whole, inputs) = (up_to(budget.whole), up_to(budget.inputs));
    match work(&inputs) < work(&whole) {
        true => inputs,
        false => whole,
    }
}

/// Cuts `rows` into neighbouring ones for which there is room, at least one each. `size` tells the
/// tokens of a row and those of its past, `fits` whether there is room for so many.
pub(super) fn cut<'r, 't>(
    rows: &'r [&'t TrainRow],
    size: impl Fn(&TrainRow) -> (usize, usize),
    fits: impl Fn(usize, usize) -> bool,
) -> Vec<&'r [&'t TrainRow]> {
    let (mut groups, mut rest) = (Vec::new(), rows);
    while !rest.is_empty() {
        let (mut tokens, mut past) = (0, 0);
        let has_room = |row: &&&TrainRow| {
            let (more, before) = size(row);
            tokens += more;
            past += before;
            fits(tokens, past)
        };
        let count = rest.iter().take_while(has_room).count().max(1);
        let (group, later) = rest.split_at(count);
        groups.push(group);
        rest = later;
    }
    groups
}

/// Number of leading tokens that all rows share; none for a single row.
fn common_prefix(rows: &[&TrainRow]) -> usize {
    let [first, rest @ ..] = rows else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    let shortest = rows
        .iter()
        .map(|row| row.first_target() - 1)
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
            earlier: Vec::new(),
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
    #[allow(clippy::single_range_in_vec_init)]
    fn earlier_answers_are_learnt_and_not_shared() {
        let mut rows = [
            row(&[1, 2, 3, 4, 5, 6, 7, 8], &[7, 9]),
            row(&[1, 2, 3, 4, 5, 6, 7, 9], &[8, 9]),
        ];
        rows[0].earlier = vec![5..7];
        let rows: Vec<&TrainRow> = rows.iter().collect();
        let pack = Pack::new(&rows, true);
        // The first row needs its token 5, after which it answers.
        assert_eq!(pack.tokens, [1, 2, 3, 4, 5, 6, 7, 8, 7, 5, 6, 7, 9, 8]);
        let targets = [(4, 6), (5, 7), (7, 7), (8, 9), (12, 8), (13, 9)];
        assert_eq!(pack.targets, targets);
        for (place, token) in [(4, 6), (5, 7)] {
            assert_eq!(pack.tokens[place + 1], token);
        }
    }

    #[test]
    fn large_batches_are_split() {
        let rows: Vec<TrainRow> = (0..7).map(|i| row(&[1, 2, 3, 4, 5, i], &[7, 9])).collect();
        let rows: Vec<&TrainRow> = rows.iter().collect();
        let groups = groups(&rows, true, &budget(12, 12));
        let packs: Vec<Pack> = groups.iter().map(|rows| Pack::new(rows, true)).collect();
        // Five shared tokens and two for each row.
        let sizes: Vec<usize> = packs.iter().map(|p| p.spans.len() - 1).collect();
        assert_eq!(sizes, [3, 3, 0]);
        let targets: usize = packs.iter().map(|p| p.targets.len()).sum();
        assert_eq!(targets, 14);
    }

    fn budget(whole: usize, inputs: usize) -> Budget {
        let past = inputs;
        Budget {
            whole,
            inputs,
            past,
        }
    }

    /// How many rows of each pass there are, of rows with so many tokens in common and of their
    /// own.
    fn sizes(common: u32, own: u32, budget: &Budget) -> Vec<usize> {
        let prompt = |i: u32| -> Vec<u32> {
            let common = 0..common;
            common.chain((0..own).map(|at| 100 * i + at)).collect()
        };
        let rows: Vec<TrainRow> = (1..=7).map(|i| row(&prompt(i), &[7, 9])).collect();
        let rows: Vec<&TrainRow> = rows.iter().collect();
        let groups = groups(&rows, true, budget);
        groups.iter().map(|rows| rows.len()).collect()
    }

    #[test]
    fn a_start_that_leaves_no_room_is_computed_once_and_only_inputs_kept() {
        // Not even one row has room beside the start.
        assert_eq!(sizes(40, 2, &budget(12, 100)), [7]);
        assert_eq!(sizes(40, 2, &budget(12, 46)), [2, 2, 2, 1]);
        // One has, so that each pass would be the start once more.
        assert_eq!(sizes(40, 2, &budget(44, 100)), [7]);
        // A short start is cheaper to compute with each pass than all rows again.
        assert_eq!(sizes(4, 10, &budget(30, 300)), [2, 2, 2, 1]);
        // Nor does a start that is not shared count.
        assert_eq!(sizes(2, 10, &budget(30, 300)), [2, 2, 2, 1]);
    }
}
