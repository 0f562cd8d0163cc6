//! [`Centroids`] and [`Neighbours`]: classes by cosine similarity to labelled rows.
//!
//! Both know no text. Invariant: stored vectors have length 1, so a dot product is a cosine.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::logistic::softmax_rows;

/// Similarities are divided by this before they become probabilities: sentence vectors of one
/// class differ by tenths.
const TEMPERATURE: f32 = 0.05;

/// The mean vector of each class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Centroids {
    /// One per class; all 0 for a class without rows.
    vectors: Vec<Vec<f32>>,
}

impl Centroids {
    /// Means over the rows of each class.
    pub(super) fn fit(x: &ArrayView2<'_, f32>, y: &[usize], classes: usize) -> Self {
        let mut sums = vec![Array1::<f32>::zeros(x.ncols()); classes];
        for (row, class) in x.axis_iter(Axis(0)).zip(y) {
            sums[*class] += &row;
        }
        Self {
            vectors: sums.into_iter().map(|sum| unit(sum.to_vec())).collect(),
        }
    }

    /// Probability of each class for each row.
    pub(super) fn probabilities(&self, x: &ArrayView2<'_, f32>) -> Array2<f32> {
        let mut scores = x.dot(&matrix(&self.vectors, x.ncols()).t()) / TEMPERATURE;
        softmax_rows(&mut scores);
        scores
    }

    /// One finite vector of `width` per class.
    pub(super) fn fits(&self, classes: usize, width: usize) -> bool {
        self.vectors.len() == classes && all_fit(&self.vectors, width)
    }
}

/// The labelled rows themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Neighbours {
    vectors: Vec<Vec<f32>>,
    classes: Vec<usize>,
    /// How many vote.
    k: usize,
}

impl Neighbours {
    /// Keeps the rows.
    pub(super) fn fit(x: &ArrayView2<'_, f32>, y: &[usize], k: usize) -> Self {
        let vectors = x.axis_iter(Axis(0)).map(|row| unit(row.to_vec())).collect();
        Self {
            vectors,
            classes: y.to_vec(),
            k,
        }
    }

    /// Probability of each of `classes` for each row: the `k` most similar rows vote, more similar
    /// ones count more.
    pub(super) fn probabilities(&self, x: &ArrayView2<'_, f32>, classes: usize) -> Array2<f32> {
        let similar = x.dot(&matrix(&self.vectors, x.ncols()).t());
        let mut votes = Array2::zeros((x.nrows(), classes));
        for (row, mut vote) in similar.axis_iter(Axis(0)).zip(votes.axis_iter_mut(Axis(0))) {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
            order.truncate(self.k);
            let top = order.first().map_or(0.0, |first| row[*first]);
            for neighbour in order {
                vote[self.classes[neighbour]] += ((row[neighbour] - top) / TEMPERATURE).exp();
            }
            let sum = vote.sum();
            vote.mapv_inplace(|v| v / sum);
        }
        votes
    }

    /// Rows are finite, of `width`, and of known classes; there is at least one.
    pub(super) fn fits(&self, classes: usize, width: usize) -> bool {
        !self.vectors.is_empty()
            && self.k > 0
            && self.vectors.len() == self.classes.len()
            && self.classes.iter().all(|class| *class < classes)
            && all_fit(&self.vectors, width)
    }
}

fn all_fit(vectors: &[Vec<f32>], width: usize) -> bool {
    vectors
        .iter()
        .all(|v| v.len() == width && v.iter().all(|x| x.is_finite()))
}

fn matrix(vectors: &[Vec<f32>], width: usize) -> Array2<f32> {
    let flat = vectors.iter().flatten().copied().collect();
    Array2::from_shape_vec((vectors.len(), width), flat)
        .expect("every stored vector has the embedder's width, checked when made and when read")
}

fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let norm = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|v| *v /= norm);
    }
    vector
}
