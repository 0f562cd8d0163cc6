//! The rows of an attention, cut so that no block's scores take much room, and that the windows of
//! a local layer's block have most of their columns in common.

use std::ops::Range;

/// Rows of a block where each row sees all before it.
pub(crate) const WHOLE: usize = 512;
/// Fewest and most rows of a block with a window: smaller products are slow, larger ones compute
/// what no window has.
const ROWS: (usize, usize) = (32, 256);

/// Blocks of `rows` rows, in order.
pub(crate) fn blocks(rows: usize, window: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    // Half a window: a block then computes at most half as much again as its windows have.
    let step = window.map_or(WHOLE, |window| (window / 2).clamp(ROWS.0, ROWS.1));
    let starts = (0..rows).step_by(step);
    starts.map(move |start| start..(start + step).min(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_rows_once_and_follow_the_window() {
        let all = |rows, window| blocks(rows, window).collect::<Vec<_>>();
        assert_eq!(all(1000, None), vec![0..512, 512..1000]);
        assert_eq!(all(100, Some(3)), vec![0..32, 32..64, 64..96, 96..100]);
        assert_eq!(all(200, Some(160)), vec![0..80, 80..160, 160..200]);
        assert_eq!(all(300, Some(4096)), vec![0..256, 256..300]);
        assert!(all(0, None).is_empty());
    }
}
