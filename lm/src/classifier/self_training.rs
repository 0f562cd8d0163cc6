//! Class-balanced self-training: logistic regression that labels the unlabelled rows itself.
//!
//! Each round scores the unlabelled rows, scales the probabilities until the classes have their
//! expected shares (Sinkhorn & Knopp 1967, as the class-balanced self-training of Zou et al. 2018
//! does by thresholds), takes the surest rows of each class with the class they were given, and
//! fits again on these and the labelled rows. It assumes that the shares are about right: with
//! even shares and classes of very different size it pushes rows into the rare ones.
//!
//! Knows no text. Invariant: a labelled row keeps its label.

use ndarray::{Array2, ArrayView2, Axis, concatenate};

use super::logistic::{Linear, Rows};
use super::spec::ClassifierSpec;

/// The rounds never take more than this share of the unlabelled rows: the least sure ones are
/// mostly wrong.
const MOST: f64 = 0.95;

/// Fits on `labelled` (with `classes`, at least one row) and `unlabelled`. `shares` are the
/// expected shares of the classes among the unlabelled rows; they sum to 1.
pub(super) fn fit(
    spec: &ClassifierSpec,
    labelled: ArrayView2<'_, f32>,
    classes: &[usize],
    unlabelled: ArrayView2<'_, f32>,
    shares: &[f64],
) -> Linear {
    let gold = vec![spec.weight_labelled; classes.len()];
    let on_gold = |c: f64| {
        let rows = Rows {
            x: labelled,
            y: classes,
            weights: &gold,
            classes: shares.len(),
        };
        Linear::fit(&rows, c, None)
    };
    if unlabelled.nrows() == 0 || spec.keep.is_empty() {
        return on_gold(spec.final_c);
    }
    let mut linear = on_gold(spec.c);
    let factor = keep_factor(&spec.keep, unlabelled.nrows(), shares.len());
    for (round, keep) in spec.keep.iter().enumerate() {
        let mut probabilities = linear.probabilities(&unlabelled);
        balance(&mut probabilities, shares, spec.sinkhorn_steps);
        let taken = surest(&probabilities, shares, f64::from(*keep) * factor);
        let (rows, given): (Vec<usize>, Vec<usize>) = taken.into_iter().unzip();
        let x = concatenate(
            Axis(0),
            &[labelled, unlabelled.select(Axis(0), &rows).view()],
        )
        .expect("both have the embedder's width, checked before the fit");
        let y: Vec<usize> = classes.iter().chain(&given).copied().collect();
        let mut weights = gold.clone();
        weights.resize(y.len(), 1.0);
        let c = if round + 1 == spec.keep.len() {
            spec.final_c
        } else {
            spec.c
        };
        let rows = Rows {
            x: x.view(),
            y: &y,
            weights: &weights,
            classes: shares.len(),
        };
        linear = Linear::fit(&rows, c, Some(&linear));
    }
    linear
}

/// What the `keep` counts are multiplied by, so that they suit a small set of rows.
fn keep_factor(keep: &[u32], rows: usize, classes: usize) -> f64 {
    let most = keep.iter().max().copied().unwrap_or(1);
    (MOST * rows as f64 / (classes as f64 * f64::from(most))).min(1.0)
}

/// A column is scaled by this at most: finite, whatever it is multiplied with.
const MOST_SCALED: f64 = 1e30;

/// Scales rows and columns in turn: each column's sum becomes its share of the rows, each row's
/// sum 1 (exactly, as rows come last).
pub(super) fn balance(probabilities: &mut Array2<f32>, shares: &[f64], steps: u32) {
    let rows = probabilities.nrows() as f64;
    for _ in 0..steps {
        let sums = probabilities.sum_axis(Axis(0));
        let factors: Vec<f32> = sums
            .iter()
            .zip(shares)
            .map(|(sum, share)| share * rows / f64::from(sum.max(f32::MIN_POSITIVE)))
            // Of a class that no row has, nothing is left to scale: 0 must stay 0.
            .map(|factor| factor.min(MOST_SCALED) as f32)
            .collect();
        for mut row in probabilities.axis_iter_mut(Axis(0)) {
            row.iter_mut().zip(&factors).for_each(|(p, f)| *p *= f);
            let sum = row.sum();
            // A row that nothing is left of keeps what it has.
            if sum > 0.0 && sum.is_finite() {
                row.iter_mut().for_each(|p| *p /= sum);
            }
        }
    }
}

/// The surest rows of each class with that class, about `keep` for a class of average share, at
/// least one where any row has the class; ordered by row.
fn surest(probabilities: &Array2<f32>, shares: &[f64], keep: f64) -> Vec<(usize, usize)> {
    let mut by_class: Vec<Vec<(f32, usize)>> = vec![Vec::new(); shares.len()];
    for (row, values) in probabilities.axis_iter(Axis(0)).enumerate() {
        let (class, sure) = most_likely(values.iter().copied());
        by_class[class].push((sure, row));
    }
    let mut taken = Vec::new();
    for (class, mut rows) in by_class.into_iter().enumerate() {
        rows.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let count = (keep * shares[class] * shares.len() as f64)
            .round()
            .max(1.0) as usize;
        taken.extend(rows.into_iter().take(count).map(|(_, row)| (row, class)));
    }
    taken.sort_unstable();
    taken
}

/// The largest value and its position; the first of equal ones.
pub(super) fn most_likely(values: impl Iterator<Item = f32>) -> (usize, f32) {
    values.enumerate().fold(
        (0, f32::NEG_INFINITY),
        |best, v| if v.1 > best.1 { v } else { best },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_pools_scale_the_rounds_down() {
        assert_eq!(keep_factor(&[20, 150], 4071, 25), 1.0);
        let factor = keep_factor(&[20, 150], 250, 25);
        assert!((150.0 * factor - 9.5).abs() < 1e-9);
    }

    #[test]
    fn the_surest_are_taken_per_class_in_proportion_to_shares() {
        let p = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.4, 0.6, 0.45, 0.55];
        let p = Array2::from_shape_vec((5, 2), p.to_vec()).expect("5 × 2");
        assert_eq!(surest(&p, &[0.5, 0.5], 1.0), [(0, 0), (3, 1)]);
        assert_eq!(
            surest(&p, &[0.75, 0.25], 2.0),
            [(0, 0), (1, 0), (2, 0), (3, 1)]
        );
    }

    proptest! {
        #[test]
        fn balanced_rows_sum_to_one_and_columns_to_their_share(
            values in prop::collection::vec(0.01f32..1.0, 60),
            share in 0.1f64..0.6,
        ) {
            let mut p = Array2::from_shape_vec((20, 3), values).expect("20 × 3");
            let shares = [share, (1.0 - share) / 2.0, (1.0 - share) / 2.0];
            balance(&mut p, &shares, 200);
            prop_assert!(p.sum_axis(Axis(1)).iter().all(|s| (s - 1.0).abs() < 1e-4));
            for (sum, share) in p.sum_axis(Axis(0)).iter().zip(shares) {
                prop_assert!((f64::from(*sum) / 20.0 - share).abs() < 1e-2, "{} {}", sum, share);
            }
        }
    }
}
