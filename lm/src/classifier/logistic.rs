//! [`Linear`]: multinomial logistic regression with an L2 penalty.
//!
//! Minimises `C · Σᵢ wᵢ · −log p(yᵢ | xᵢ) + ½ ‖W‖²` (scikit-learn's convention for `C`; intercepts
//! are not penalised), divided by `C · Σᵢ wᵢ` so that one tolerance suits every size. Knows no text
//! and no label names. Invariant: equal input gives an equal fit on the same kind of machine.

use ndarray::{Array1, Array2, ArrayView2, Axis, azip, s};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::lbfgs::{Limits, minimise};

/// The largest component of the mean gradient. A hundredth of scikit-learn's `tol`: with that, a
/// round of self-training that starts from the last one ends before it has learnt from its new
/// rows (a point and more of accuracy).
const TOLERANCE: f64 = 1e-6;
/// Steps at most; a fit that needs more is as good as converged.
const STEPS: usize = 2000;

/// A fitted linear classifier: `softmax(W x + b)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Linear {
    /// One row of weights per class.
    weights: Vec<Vec<f32>>,
    /// One intercept per class.
    intercepts: Vec<f32>,
}

/// Rows to fit on.
pub(super) struct Rows<'a> {
    /// One row per example.
    pub(super) x: ArrayView2<'a, f32>,
    /// Class of each row, below `classes`.
    pub(super) y: &'a [usize],
    /// Weight of each row, above 0.
    pub(super) weights: &'a [f32],
    /// Number of classes.
    pub(super) classes: usize,
}

impl Linear {
    /// Fits on at least one row. `c` > 0 is the inverse strength of the penalty; `start` is an
    /// earlier fit of the same shape to go on from.
    pub(super) fn fit(rows: &Rows<'_>, c: f64, start: Option<&Linear>) -> Linear {
        let (width, classes) = (rows.x.ncols(), rows.classes);
        let total: f64 = rows.weights.iter().copied().map(f64::from).sum();
        let penalty = 1.0 / (c * total);
        let start = match start {
            Some(earlier) => earlier.to_parameters(),
            None => vec![0.0; classes * (width + 1)],
        };
        let limits = Limits {
            steps: STEPS,
            gradient: TOLERANCE,
        };
        let found = minimise(start, limits, |at, gradient| {
            loss(rows, total, penalty, at, gradient)
        });
        if !found.converged {
            tracing::debug!("logistic regression stopped before its gradient was small");
        }
        Linear::from_parameters(&found.x, width, classes)
    }

    /// Probability of each class (columns) for each row of `x`; rows sum to 1.
    pub(super) fn probabilities(&self, x: &ArrayView2<'_, f32>) -> Array2<f32> {
        let (classes, width) = (self.weights.len(), x.ncols());
        let flat: Vec<f32> = self.weights.iter().flatten().copied().collect();
        let weights = Array2::from_shape_vec((classes, width), flat)
            .expect("every class has a weight per input, checked when the classifier was made");
        let mut scores = x.dot(&weights.t()) + Array1::from(self.intercepts.clone());
        softmax_rows(&mut scores);
        scores
    }

    /// Every class has `width` finite weights and an intercept.
    pub(super) fn fits(&self, classes: usize, width: usize) -> bool {
        self.weights.len() == classes
            && self.intercepts.len() == classes
            && self.weights.iter().all(|w| w.len() == width)
            && self
                .weights
                .iter()
                .flatten()
                .chain(&self.intercepts)
                .all(|v| v.is_finite())
    }

    fn to_parameters(&self) -> Vec<f64> {
        self.weights
            .iter()
            .flatten()
            .chain(&self.intercepts)
            .map(|v| f64::from(*v))
            .collect()
    }

    fn from_parameters(parameters: &[f64], width: usize, classes: usize) -> Self {
        let (weights, intercepts) = parameters.split_at(classes * width);
        Self {
            weights: weights
                .chunks(width.max(1))
                .map(|row| row.iter().map(|v| *v as f32).collect())
                .collect(),
            intercepts: intercepts.iter().map(|v| *v as f32).collect(),
        }
    }
}

/// Rows whose loss is computed at once. The sums are over these chunks in order, so that they are the same for
/// any number of threads.
const CHUNK: usize = 256;

/// What the rows of a chunk add to the loss and to its gradient.
struct Part {
    value: f64,
    /// By the weights: classes × width.
    weights: Array2<f32>,
    /// By the intercepts.
    intercepts: Vec<f64>,
}

/// The penalised mean loss at `at` (weights class by class, then intercepts) and its gradient.
fn loss(rows: &Rows<'_>, total: f64, penalty: f64, at: &[f64], gradient: &mut [f64]) -> f64 {
    let (width, classes) = (rows.x.ncols(), rows.classes);
    let (weights, intercepts) = at.split_at(classes * width);
    let w = Array2::from_shape_fn((classes, width), |(k, j)| weights[k * width + j] as f32);
    let b = Array1::from_iter(intercepts.iter().map(|v| *v as f32));
    let starts: Vec<usize> = (0..rows.y.len()).step_by(CHUNK).collect();
    let parts: Vec<Part> = starts
        .par_iter()
        .map(|start| part(rows, *start, &w, &b))
        .collect();
    let (grad_w, grad_b) = gradient.split_at_mut(classes * width);
    for (g, w) in grad_w.iter_mut().zip(weights) {
        *g = penalty * w;
    }
    grad_b.fill(0.0);
    let mut value = 0.0;
    for part in &parts {
        value += part.value;
        for (g, s) in grad_w.iter_mut().zip(&part.weights) {
            *g += f64::from(*s) / total;
        }
        for (g, s) in grad_b.iter_mut().zip(&part.intercepts) {
            *g += s / total;
        }
    }
    value / total + 0.5 * penalty * weights.iter().map(|w| w * w).sum::<f64>()
}

/// The chunk of rows that begins at `start`.
fn part(rows: &Rows<'_>, start: usize, w: &Array2<f32>, b: &Array1<f32>) -> Part {
    let end = (start + CHUNK).min(rows.y.len());
    let x = rows.x.slice(s![start..end, ..]);
    // Scores, then probabilities, then the residual of each row, in one buffer.
    let mut residual = x.dot(&w.t()) + b;
    let mut value = 0.0;
    let given = rows.y[start..end].iter().zip(&rows.weights[start..end]);
    for (mut row, (&y, &weight)) in residual.axis_iter_mut(Axis(0)).zip(given) {
        let top = row.iter().fold(f32::NEG_INFINITY, |m, v| v.max(m));
        let own = row[y] - top;
        row.mapv_inplace(|v| (v - top).exp());
        let sum = row.sum();
        let scale = weight / sum;
        row.mapv_inplace(|v| v * scale);
        row[y] -= weight;
        value += f64::from(weight) * (f64::from(sum).ln() - f64::from(own));
    }
    let intercepts = residual
        .axis_iter(Axis(1))
        .map(|column| column.iter().map(|v| f64::from(*v)).sum())
        .collect();
    Part {
        value,
        weights: residual.t().dot(&x),
        intercepts,
    }
}

/// Turns each row of scores into probabilities.
pub(super) fn softmax_rows(scores: &mut Array2<f32>) {
    for mut row in scores.axis_iter_mut(Axis(0)) {
        let top = row.iter().fold(f32::NEG_INFINITY, |m, v| v.max(m));
        row.mapv_inplace(|v| (v - top).exp());
        let sum = row.sum();
        azip!((v in &mut row) *v /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(x: &Array2<f32>, y: &[usize], weights: &[f32], classes: usize, c: f64) -> Linear {
        Linear::fit(
            &Rows {
                x: x.view(),
                y,
                weights,
                classes,
            },
            c,
            None,
        )
    }

    /// `LogisticRegression(C=10, tol=1e-8).fit(x, y, sample_weight=[1, 1, 1, 1, 1, 3])` of
    /// scikit-learn, `predict_proba` of the same rows.
    const SCIKIT_LEARN: [[f32; 3]; 6] = [
        [0.92022, 0.05573, 0.02405],
        [0.84319, 0.12800, 0.02881],
        [0.03821, 0.93486, 0.02692],
        [0.14691, 0.81685, 0.03624],
        [0.00827, 0.00574, 0.98599],
        [0.01440, 0.01960, 0.96600],
    ];

    #[test]
    fn agrees_with_scikit_learn() {
        let x = [
            0.0, 1.0, 0.2, 0.9, 1.0, 0.0, 0.8, 0.3, -1.0, -1.0, -0.7, -0.9,
        ];
        let x = Array2::from_shape_vec((6, 2), x.to_vec()).expect("6 × 2");
        let linear = fit(
            &x,
            &[0, 0, 1, 1, 2, 2],
            &[1.0, 1.0, 1.0, 1.0, 1.0, 3.0],
            3,
            10.0,
        );
        let found = linear.probabilities(&x.view());
        for (f, e) in found.iter().zip(SCIKIT_LEARN.iter().flatten()) {
            assert!((f - e).abs() < 2e-3, "{found:?}");
        }
    }

    #[test]
    fn a_weight_of_two_is_a_row_twice() {
        let x = Array2::from_shape_vec((3, 1), vec![0.0, 1.0, 0.6]).expect("3 × 1");
        let twice = Array2::from_shape_vec((4, 1), vec![0.0, 1.0, 0.6, 0.6]).expect("4 × 1");
        let a = fit(&x, &[0, 1, 0], &[1.0, 1.0, 2.0], 2, 5.0);
        let b = fit(&twice, &[0, 1, 0, 0], &[1.0; 4], 2, 5.0);
        let (pa, pb) = (a.probabilities(&x.view()), b.probabilities(&x.view()));
        assert!(pa.iter().zip(&pb).all(|(a, b)| (a - b).abs() < 2e-3));
    }

    #[test]
    fn the_gradient_is_the_slope() {
        let x = Array2::from_shape_fn((5, 3), |(i, j)| ((i * 3 + j) as f32 * 0.7).sin());
        let (y, weights) = ([0, 1, 2, 1, 0], [1.0, 2.0, 0.5, 1.0, 3.0]);
        let rows = Rows {
            x: x.view(),
            y: &y,
            weights: &weights,
            classes: 3,
        };
        let at: Vec<f64> = (0..12).map(|i| (f64::from(i) * 1.3).cos()).collect();
        let mut gradient = vec![0.0; 12];
        loss(&rows, 7.5, 0.05, &at, &mut gradient);
        for i in 0..12 {
            let value = |h: f64| {
                let mut moved = at.clone();
                moved[i] += h;
                loss(&rows, 7.5, 0.05, &moved, &mut [0.0; 12])
            };
            let slope = (value(1e-2) - value(-1e-2)) / 2e-2;
            assert!(
                (slope - gradient[i]).abs() < 1e-3,
                "{i}: {slope} {}",
                gradient[i]
            );
        }
    }
}
