//! [`Classifier`]: fitted from texts or vectors, predicts label and confidence, saved with serde.
//!
//! Knows no embedding model and no files. Invariant: the stored numbers have the shapes that
//! `labels` and `width` say; a saved classifier that breaks this is refused when it is read.

use std::collections::BTreeMap;

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::logistic::{Linear, Rows};
use super::neighbours::{Centroids, Neighbours};
use super::self_training::{self, most_likely};
use super::spec::{ClassShares, ClassifierSpec, Method};
use super::{ClassifierError, Embedder};

/// Version of the saved form.
const VERSION: u32 = 1;

/// A fitted classifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Saved", into = "Saved")]
pub struct Classifier {
    labels: Vec<String>,
    width: usize,
    model: Model,
}

/// What was fitted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Model {
    Linear(Linear),
    Centroids(Centroids),
    Neighbours(Neighbours),
}

/// The saved form.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    labels: Vec<String>,
    /// Length of the vectors.
    width: usize,
    model: Model,
}

/// A label with how sure the classifier is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassPrediction {
    /// The most likely label.
    pub label: String,
    /// Its probability.
    pub confidence: f32,
    /// Probability of each label, in the order of [`Classifier::labels`]; sums to 1.
    pub probs: Vec<f32>,
}

/// Rows to fit on, already embedded.
#[derive(Debug, Clone, Copy)]
pub struct TrainingVectors<'a> {
    /// The classes; at least two, none twice.
    pub labels: &'a [String],
    /// Vectors of the labels' names, one per label; empty to go without.
    pub names: &'a [Vec<f32>],
    /// Vectors of the labelled rows.
    pub labelled: &'a [Vec<f32>],
    /// Position in `labels` of each labelled row's label.
    pub classes: &'a [usize],
    /// Vectors of the rows without a label; only self-training uses them.
    pub unlabelled: &'a [Vec<f32>],
}

/// Embeds and fits. `labelled` holds (text, label).
///
/// # Errors
/// When a setting, a label or a vector cannot be used, or the embedder fails.
pub fn fit(
    spec: &ClassifierSpec,
    embedder: &dyn Embedder,
    labels: &[String],
    labelled: &[(&str, &str)],
    unlabelled: &[&str],
) -> Result<Classifier, ClassifierError> {
    spec.check()?;
    check_labels(labels)?;
    let classes = positions(labels, labelled)?;
    let names: Vec<String> = labels.iter().map(|label| spoken(label)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let texts: Vec<&str> = labelled.iter().map(|(text, _)| *text).collect();
    let names = if spec.label_names {
        embed(embedder, &names)?
    } else {
        Vec::new()
    };
    let unlabelled = if spec.method == Method::SelfTraining {
        embed(embedder, unlabelled)?
    } else {
        Vec::new()
    };
    let vectors = TrainingVectors {
        labels,
        names: &names,
        labelled: &embed(embedder, &texts)?,
        classes: &classes,
        unlabelled: &unlabelled,
    };
    fit_vectors(spec, vectors)
}

/// Fits on vectors. `spec.embedder` is not looked at; nor is `spec.label_names`: names count when
/// they are given.
///
/// # Errors
/// When a setting, a label or a vector cannot be used.
pub fn fit_vectors(
    spec: &ClassifierSpec,
    rows: TrainingVectors<'_>,
) -> Result<Classifier, ClassifierError> {
    spec.check()?;
    check_labels(rows.labels)?;
    check_classes(&rows)?;
    let count = rows.labels.len();
    let width = rows
        .names
        .first()
        .or(rows.labelled.first())
        .map_or(0, Vec::len);
    let labelled: Vec<&Vec<f32>> = rows.labelled.iter().chain(rows.names).collect();
    let y: Vec<usize> = rows
        .classes
        .iter()
        .copied()
        .chain(0..rows.names.len())
        .collect();
    let x = matrix("a labelled row or label name", &labelled, width)?;
    let x = x.view();
    let model = match spec.method {
        Method::SelfTraining => {
            let pool: Vec<&Vec<f32>> = rows.unlabelled.iter().collect();
            let pool = matrix("a row without a label", &pool, width)?;
            let shares = shares(spec.class_shares, rows.classes, count);
            Model::Linear(self_training::fit(spec, x, &y, pool.view(), &shares))
        }
        Method::LogisticRegression => {
            let rows = Rows {
                x,
                y: &y,
                weights: &vec![1.0; y.len()],
                classes: count,
            };
            Model::Linear(Linear::fit(&rows, spec.c, None))
        }
        Method::Centroid => Model::Centroids(Centroids::fit(&x, &y, count)),
        Method::Knn => Model::Neighbours(Neighbours::fit(&x, &y, spec.k)),
    };
    Ok(Classifier {
        labels: rows.labels.to_vec(),
        width,
        model,
    })
}

impl Classifier {
    /// The classes, in the order of [`ClassPrediction::probs`].
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Length of the vectors it was fitted on.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One prediction per text, in order.
    ///
    /// # Errors
    /// When the embedder fails or its vectors are not of the length that was fitted.
    pub fn predict(
        &self,
        embedder: &dyn Embedder,
        texts: &[&str],
    ) -> Result<Vec<ClassPrediction>, ClassifierError> {
        self.predict_vectors(&embed(embedder, texts)?)
    }

    /// One prediction per vector, in order.
    ///
    /// # Errors
    /// When a vector is not of the length that was fitted.
    pub(crate) fn predict_vectors(
        &self,
        vectors: &[Vec<f32>],
    ) -> Result<Vec<ClassPrediction>, ClassifierError> {
        let rows: Vec<&Vec<f32>> = vectors.iter().collect();
        let x = matrix("a row to predict", &rows, self.width)?;
        let probabilities = self.probabilities(&x.view());
        Ok(probabilities
            .outer_iter()
            .map(|row| self.prediction(row.to_vec()))
            .collect())
    }

    fn prediction(&self, probs: Vec<f32>) -> ClassPrediction {
        let (class, confidence) = most_likely(probs.iter().copied());
        ClassPrediction {
            label: self.labels[class].clone(),
            confidence,
            probs,
        }
    }

    fn probabilities(&self, x: &ArrayView2<'_, f32>) -> Array2<f32> {
        match &self.model {
            Model::Linear(linear) => linear.probabilities(x),
            Model::Centroids(centroids) => centroids.probabilities(x),
            Model::Neighbours(neighbours) => neighbours.probabilities(x, self.labels.len()),
        }
    }
}

impl From<Classifier> for Saved {
    fn from(
        Classifier {
            labels,
            width,
            model,
        }: Classifier,
    ) -> Self {
        Self {
            version: VERSION,
            labels,
            width,
            model,
        }
    }
}

impl TryFrom<Saved> for Classifier {
    type Error = ClassifierError;

    fn try_from(saved: Saved) -> Result<Self, ClassifierError> {
        let Saved {
            version,
            labels,
            width,
            model,
        } = saved;
        if version != VERSION {
            let found = format!("it has version {version}, this program reads {VERSION}");
            return Err(ClassifierError::Saved(found));
        }
        check_labels(&labels)?;
        let fits = match &model {
            Model::Linear(linear) => linear.fits(labels.len(), width),
            Model::Centroids(centroids) => centroids.fits(labels.len(), width),
            Model::Neighbours(neighbours) => neighbours.fits(labels.len(), width),
        };
        if !fits {
            return Err(ClassifierError::Saved(
                "its numbers do not fit its labels".to_owned(),
            ));
        }
        Ok(Self {
            labels,
            width,
            model,
        })
    }
}

/// A label's name as people would say it.
fn spoken(label: &str) -> String {
    label.replace('_', " ")
}

/// Expected share of each class among the rows without a label; they sum to 1.
fn shares(shares: ClassShares, labelled: &[usize], classes: usize) -> Vec<f64> {
    let mut counts = vec![1.0; classes];
    if shares == ClassShares::Labelled {
        labelled.iter().for_each(|class| counts[*class] += 1.0);
    }
    let total: f64 = counts.iter().sum();
    counts.into_iter().map(|count| count / total).collect()
}

fn check_labels(labels: &[String]) -> Result<(), ClassifierError> {
    if labels.len() < 2 {
        let found = format!(
            "a classifier needs at least two labels, there are {}",
            labels.len()
        );
        return Err(ClassifierError::Labels(found));
    }
    let mut seen = std::collections::BTreeSet::new();
    match labels.iter().find(|label| !seen.insert(label.as_str())) {
        Some(twice) => Err(ClassifierError::Labels(format!(
            "the label `{twice}` is in the list twice"
        ))),
        None => Ok(()),
    }
}

fn positions(labels: &[String], rows: &[(&str, &str)]) -> Result<Vec<usize>, ClassifierError> {
    let known: BTreeMap<&str, usize> = labels
        .iter()
        .enumerate()
        .map(|(i, label)| (label.as_str(), i))
        .collect();
    let position = |(row, (_, label)): (usize, &(&str, &str))| {
        known
            .get(label)
            .copied()
            .ok_or_else(|| ClassifierError::UnknownLabel {
                row,
                label: (*label).to_owned(),
                known: labels.len(),
            })
    };
    rows.iter().enumerate().map(position).collect()
}

/// Every labelled row has one known class, and every class has a row or a name.
fn check_classes(rows: &TrainingVectors<'_>) -> Result<(), ClassifierError> {
    let vectors = |what: &str, found: usize, expected: usize| ClassifierError::Vectors {
        what: what.to_owned(),
        found: format!("{found} vectors"),
        expected: format!("{expected}"),
    };
    let count = rows.labels.len();
    if rows.labelled.len() != rows.classes.len() {
        return Err(vectors(
            "the labelled set",
            rows.labelled.len(),
            rows.classes.len(),
        ));
    }
    if !rows.names.is_empty() && rows.names.len() != count {
        return Err(vectors("the list of label names", rows.names.len(), count));
    }
    if let Some(row) = rows.classes.iter().position(|class| *class >= count) {
        let label = format!("number {}", rows.classes[row]);
        return Err(ClassifierError::UnknownLabel {
            row,
            label,
            known: count,
        });
    }
    if rows.names.is_empty()
        && let Some(empty) = (0..count).find(|class| !rows.classes.contains(class))
    {
        return Err(ClassifierError::EmptyClass {
            label: rows.labels[empty].clone(),
        });
    }
    Ok(())
}

fn embed(embedder: &dyn Embedder, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClassifierError> {
    if texts.is_empty() {
        return Ok(Vec::new());
    }
    let vectors = embedder.embed(texts).map_err(ClassifierError::Embed)?;
    if vectors.len() != texts.len() {
        return Err(ClassifierError::Vectors {
            what: "the embedder's answer".to_owned(),
            found: format!("{} vectors", vectors.len()),
            expected: format!("one for each of {} texts", texts.len()),
        });
    }
    Ok(vectors)
}

/// The vectors as rows of `width` finite numbers. `what` names one of them in an error.
fn matrix(what: &str, rows: &[&Vec<f32>], width: usize) -> Result<Array2<f32>, ClassifierError> {
    let wrong = |row: usize, found: String| ClassifierError::Vectors {
        what: format!("{what} (number {row})"),
        found,
        expected: format!("{width} finite numbers"),
    };
    let mut flat = Vec::with_capacity(rows.len() * width);
    for (i, row) in rows.iter().enumerate() {
        if row.len() != width {
            return Err(wrong(i, format!("{} numbers", row.len())));
        }
        if !row.iter().all(|v| v.is_finite()) {
            return Err(wrong(i, "a number that is not finite".to_owned()));
        }
        flat.extend_from_slice(row);
    }
    Ok(Array2::from_shape_vec((rows.len(), width), flat).expect("every row was just checked"))
}
