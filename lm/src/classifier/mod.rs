//! Embedding classifiers: sentence vectors in, a label and its probability out. No language model
//! is called, so they are the embedded teacher and an honest baseline.
//!
//! | file | what |
//! |---|---|
//! | `spec` | the settings of a fit, as a pipeline says them |
//! | `fitted` | [`Classifier`]: fit, predict, save |
//! | `self_training` | class-balanced self-training on rows without a label (the default) |
//! | `logistic`, `lbfgs` | logistic regression and its solver |
//! | `neighbours` | nearest centroid and nearest neighbours |
//!
//! Knows no embedding model: vectors come through [`Embedder`]. Nothing here draws random numbers;
//! equal rows give an equal classifier.

mod fitted;
mod lbfgs;
mod logistic;
mod neighbours;
mod self_training;
mod spec;

pub use fitted::{ClassPrediction, Classifier, TrainingVectors, fit, fit_vectors};
pub use spec::{ClassShares, ClassifierSpec, Method};

/// Turns texts into sentence vectors.
pub trait Embedder {
    /// One vector per text, in order, all of one length, each of Euclidean length 1.
    ///
    /// # Errors
    /// A message that says what failed and what to do.
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String>;
}

/// Why a classifier cannot be fitted, used or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClassifierError {
    /// A setting is outside its range.
    #[error("`{setting}` must be {must}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// What it must be.
        must: &'static str,
    },
    /// There are fewer than two labels, or one is there twice.
    #[error("{0}")]
    Labels(String),
    /// A row has a label that is not in the list.
    #[error("labelled row {row} has the label `{label}`, which is not one of the {known} labels")]
    UnknownLabel {
        /// The row, from 0.
        row: usize,
        /// Its label.
        label: String,
        /// How many labels there are.
        known: usize,
    },
    /// A class has nothing to learn from.
    #[error("no row is labelled `{label}`; label at least one, or turn `label_names` on")]
    EmptyClass {
        /// The label.
        label: String,
    },
    /// The embedder failed.
    #[error("the texts could not be embedded: {0}")]
    Embed(String),
    /// Vectors are missing, of different lengths, or not finite.
    #[error("{what} has {found}, expected {expected}")]
    Vectors {
        /// Which vectors.
        what: String,
        /// What they are.
        found: String,
        /// What they must be.
        expected: String,
    },
    /// A saved classifier cannot be used.
    #[error("the saved classifier cannot be used: {0}; fit it again")]
    Saved(String),
}

#[cfg(test)]
mod tests;
