//! [`Calibration`]: whether a model is right as often as it says. Knows no model; draws no
//! random numbers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Bins of a reliability diagram, as in Guo et al. 2017, *On Calibration of Modern Neural
/// Networks*.
const BINS: usize = 10;

/// How well confidences match what was right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Rows with a confidence.
    pub n: usize,
    /// Expected calibration error, 0 to 1: the mean over rows of the distance between a bin's
    /// mean confidence and its share of right rows.
    pub ece: f64,
    /// The bins that hold rows, least sure first.
    pub bins: Vec<ReliabilityBin>,
}

/// Rows of like confidence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReliabilityBin {
    /// Confidences above this (or equal, in the first bin) …
    pub low: f64,
    /// … up to this.
    pub high: f64,
    /// Rows in it.
    pub n: usize,
    /// Their mean confidence.
    pub confidence: f64,
    /// The share of them that is right.
    pub accuracy: f64,
}

/// Sorts (confidence, right) into ten bins of equal width; `None` without rows. Confidences
/// outside 0..=1 count as the nearer end.
pub fn calibration(rows: impl IntoIterator<Item = (f64, bool)>) -> Option<Calibration> {
    let mut sums = [(0usize, 0.0f64, 0usize); BINS];
    for (confidence, right) in rows {
        let confidence = confidence.clamp(0.0, 1.0);
        let bin = ((confidence * BINS as f64).ceil() as usize).saturating_sub(1);
        let (n, sum, hits) = &mut sums[bin.min(BINS - 1)];
        *n += 1;
        *sum += confidence;
        *hits += usize::from(right);
    }
    let total: usize = sums.iter().map(|(n, ..)| n).sum();
    let bin = |(at, (n, sum, hits)): (usize, &(usize, f64, usize))| ReliabilityBin {
        low: at as f64 / BINS as f64,
        high: (at + 1) as f64 / BINS as f64,
        n: *n,
        confidence: sum / *n as f64,
        accuracy: *hits as f64 / *n as f64,
    };
    let filled = sums.iter().enumerate().filter(|(_, (n, ..))| *n > 0);
    let bins: Vec<ReliabilityBin> = filled.map(bin).collect();
    let gap =
        |bin: &ReliabilityBin| bin.n as f64 / total as f64 * (bin.accuracy - bin.confidence).abs();
    (total > 0).then(|| Calibration {
        n: total,
        ece: bins.iter().map(gap).sum(),
        bins,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_mean_gap_of_the_bins() {
        // By hand: bin (0.7, 0.8]: 4 rows of 0.75, 2 right, gap 0.25; bin (0.9, 1]: 1 row of 1, right.
        let rows = [
            (0.75, true),
            (0.75, false),
            (0.75, true),
            (0.75, false),
            (1.0, true),
        ];
        let found = calibration(rows).unwrap();
        assert_eq!(found.n, 5);
        assert!((found.ece - 0.2).abs() < 1e-12, "{}", found.ece);
        let shape: Vec<(f64, usize, f64)> = (found.bins.iter())
            .map(|bin| (bin.high, bin.n, bin.accuracy))
            .collect();
        assert_eq!(shape, [(0.8, 4, 0.5), (1.0, 1, 1.0)]);
    }

    #[test]
    fn ends_belong_to_the_lower_bin_and_nothing_is_no_calibration() {
        assert_eq!(calibration([]), None);
        let found = calibration([(0.0, false), (0.1, false), (-1.0, false)]).unwrap();
        assert_eq!((found.bins.len(), found.bins[0].n), (1, 3));
    }
}
