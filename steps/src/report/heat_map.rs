//! The confusion matrix as a heat map.
//!
//! Invariant: a cell's number is the count, its colour the share of its row; a matrix that does not
//! fit its labels is drawn as far as it goes.

use std::fmt::Write as _;

use super::data::Confusion;
use super::svg::{escape, open, ratio, text};

const CELL: f64 = 23.0;
/// About the width of a letter of the tick size, which fonts differ in.
const GLYPH: f64 = 6.3;

/// Gold labels down, predicted labels across; colour is the share of the row.
pub(super) fn heat_map(confusion: &Confusion, mark: &str) -> String {
    let labels = &confusion.labels;
    let longest = labels
        .iter()
        .map(|l| l.chars().count())
        .max()
        .unwrap_or(0)
        .max(10) as f64;
    let size = labels.len() as f64;
    let left = longest * GLYPH + 10.0;
    // The column names lean at 60°: they rise by sin 60° of their length and reach out by cos 60°.
    let top = longest * GLYPH * 0.87 + 14.0;
    let gap = 8.0;
    let width = left + (size + 1.0) * CELL + gap + longest * GLYPH * 0.5;
    let height = top + size * CELL + 8.0;
    let x_of = |column: usize| {
        left + CELL * column as f64 + if column == labels.len() { gap } else { 0.0 }
    };
    let mut out = String::new();
    open(
        &mut out,
        width,
        height,
        &format!("Confusion matrix{mark}"),
        width * 0.86,
    );
    let columns = labels
        .iter()
        .map(String::as_str)
        .chain(["not read as a label"]);
    for (index, label) in columns.enumerate() {
        let (x, y) = (x_of(index) + CELL / 2.0 + 3.0, top - 6.0);
        let label = escape(label);
        let _ = write!(
            out,
            "<text class=\"tick\" transform=\"translate({x:.1} {y:.1}) rotate(-60)\">{label}</text>"
        );
    }
    for (gold, row) in confusion.matrix.iter().enumerate().take(labels.len()) {
        let y = top + CELL * gold as f64;
        text(
            &mut out,
            "tick end",
            (left - 6.0, y + CELL / 2.0 + 4.0),
            &labels[gold],
        );
        let total: u64 = row.iter().sum();
        for (column, &count) in row.iter().enumerate().take(labels.len() + 1) {
            let given = labels
                .get(column)
                .map_or("not read as a label", String::as_str);
            let part = ratio(count, total);
            let class = match (count, column) {
                (0, _) => "cell none",
                (_, c) if c == gold => "cell hit",
                (_, c) if c == labels.len() => "cell lost",
                _ => "cell miss",
            };
            let (x, size) = (x_of(column) + 0.5, CELL - 1.0);
            let opacity = if count == 0 { 1.0 } else { 0.22 + 0.78 * part };
            let tip = escape(&format!(
                "{} read as {given}: {count} of {total}{mark}",
                labels[gold]
            ));
            let _ = write!(
                out,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{size}\" \
                 height=\"{size}\" fill-opacity=\"{opacity:.2}\"><title>{tip}</title></rect>",
                y + 0.5
            );
            if count > 0 {
                let class = if opacity > 0.6 { "count on" } else { "count" };
                let at = (x_of(column) + CELL / 2.0, y + CELL / 2.0 + 3.5);
                text(&mut out, class, at, &count.to_string());
            }
        }
    }
    out.push_str("</svg>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ragged_matrix_is_drawn_as_far_as_it_goes() {
        let confusion = Confusion {
            labels: vec!["a".into(), "b".into()],
            matrix: vec![vec![1, 2, 3, 4]],
        };
        assert_eq!(heat_map(&confusion, "").matches("<rect").count(), 3);
    }
}
