//! How sure a score is: intervals, paired tests, and counts of gold against predicted labels.
//!
//! Knows no model. Everything is exact but for rounding, and draws no random numbers.

use serde::{Deserialize, Serialize};

/// The normal quantile of a two-sided 95 % interval.
const Z95: f64 = 1.959_963_984_540_054;

/// The 95 % score interval (Wilson 1927) of a share of which `correct` of `n` were seen: its ends,
/// from 0 to 1. Without rows it is everything.
pub fn wilson95(correct: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, z2) = (n as f64, Z95 * Z95);
    let share = correct as f64 / n;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

/// McNemar's exact test of two models on the same rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct McNemar {
    /// Rows that only the first got right.
    pub only_a: usize,
    /// Rows that only the second got right.
    pub only_b: usize,
    /// Two-sided p-value: how likely a split at least this uneven is if both are equally good.
    pub p: f64,
}

/// McNemar's exact test (a binomial test of the rows on which the two differ; McNemar 1947) on
/// pairs of "the first is right", "the second is right".
pub fn mcnemar(pairs: impl IntoIterator<Item = (bool, bool)>) -> McNemar {
    let (mut only_a, mut only_b) = (0, 0);
    for (a, b) in pairs {
        only_a += usize::from(a && !b);
        only_b += usize::from(b && !a);
    }
    let n = only_a + only_b;
    // Terms of the binomial distribution at one half, in logarithms so that none underflows.
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=only_a.min(only_b) {
        tail += log_term.exp();
        log_term += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
    }
    McNemar {
        only_a,
        only_b,
        p: (2.0 * tail).min(1.0),
    }
}

/// Counts of gold label against predicted label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    /// The labels, in the order of the counts.
    pub labels: Vec<String>,
    /// `counts[gold][predicted]`; the last column is for answers that are none of the labels.
    pub counts: Vec<Vec<u64>>,
}

/// How well one label was told from the others; shares from 0 to 1, 0 where nothing was to divide.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelScore {
    /// The label.
    pub label: String,
    /// Rows that have it.
    pub n: u64,
    /// Of the rows given it, the share that has it.
    pub precision: f64,
    /// Of the rows that have it, the share that was given it.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
}

impl Confusion {
    /// Counts (gold, predicted). Rows whose gold label is not in `labels` are left out.
    pub fn new<'a>(
        labels: &[String],
        pairs: impl IntoIterator<Item = (&'a str, Option<&'a str>)>,
    ) -> Self {
        let place = |label: &str| labels.iter().position(|known| known == label);
        let mut counts = vec![vec![0; labels.len() + 1]; labels.len()];
        for (gold, predicted) in pairs {
            if let Some(gold) = place(gold) {
                counts[gold][predicted.and_then(place).unwrap_or(labels.len())] += 1;
            }
        }
        Self {
            labels: labels.to_vec(),
            counts,
        }
    }

    /// Precision, recall and f1 of every label.
    pub fn per_label(&self) -> Vec<LabelScore> {
        let share = |part: u64, whole: u64| match whole {
            0 => 0.0,
            _ => part as f64 / whole as f64,
        };
        let score = |(index, label): (usize, &String)| {
            let hits = self.counts[index][index];
            let n = self.counts[index].iter().sum();
            let given = self.counts.iter().map(|row| row[index]).sum();
            let (precision, recall) = (share(hits, given), share(hits, n));
            LabelScore {
                label: label.clone(),
                n,
                precision,
                recall,
                f1: share(2 * hits, n + given),
            }
        };
        self.labels.iter().enumerate().map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-4
    }

    #[test]
    fn wilson_equals_the_published_example() {
        // Newcombe 1998, table I: 81 of 263 and 0 of 20, 95 % score intervals.
        let (low, high) = wilson95(81, 263);
        assert!(near(low, 0.2553) && near(high, 0.3662), "{low} {high}");
        let (low, high) = wilson95(0, 20);
        assert!(low == 0.0 && near(high, 0.1611), "{low} {high}");
        assert_eq!(wilson95(0, 0), (0.0, 1.0));
    }

    #[test]
    fn mcnemar_is_the_binomial_test_of_the_differing_rows() {
        let pairs = |a: usize, b: usize| {
            let both = [(true, true); 7].into_iter();
            let a = std::iter::repeat_n((true, false), a);
            both.chain(a).chain(std::iter::repeat_n((false, true), b))
        };
        // By hand: 2 * (1 + 10 + 45) / 1024.
        let found = mcnemar(pairs(2, 8));
        assert_eq!((found.only_a, found.only_b), (2, 8));
        assert!(near(found.p, 0.109_375));
        assert!(near(mcnemar(pairs(5, 5)).p, 1.0));
        assert!(near(mcnemar(pairs(0, 0)).p, 1.0));
        assert!(mcnemar(pairs(3000, 10)).p < 1e-100);
    }

    #[test]
    fn confusion_counts_answers_that_are_no_label_apart() {
        let labels = ["a", "b"].map(str::to_owned);
        let pairs = [
            ("a", Some("a")),
            ("a", Some("b")),
            ("b", Some("b")),
            ("b", None),
            ("b", Some("x")),
            ("z", Some("a")),
        ];
        let confusion = Confusion::new(&labels, pairs);
        assert_eq!(confusion.counts, [[1, 1, 0], [0, 1, 2]]);
        let scores = confusion.per_label();
        assert_eq!((scores[1].n, scores[1].precision), (3, 0.5));
        assert!(near(scores[1].recall, 1.0 / 3.0) && near(scores[1].f1, 0.4));
    }
}
