//! [`ClassifierSpec`]: how an embedding classifier is fitted, as a pipeline says it.
//!
//! Knows no vectors. Invariant: [`ClassifierSpec::check`] refuses every value that a fit cannot use.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ClassifierError;

/// How an embedding classifier is fitted. Every setting but `embedder` has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClassifierSpec {
    /// Name of the model in `models:` that turns texts into vectors.
    #[schemars(extend("x-flowrun-ref" = "models"))]
    pub embedder: serde_json::Value,
    /// How vectors become labels.
    #[serde(default)]
    pub method: Method,
    /// How common each class is among the rows without a label (`self_training` only).
    #[serde(default)]
    pub class_shares: ClassShares,
    /// Add each label's name, with `_` as spaces, as one more labelled row. Turn off where names
    /// say nothing (`class_7`).
    #[serde(default = "yes")]
    pub label_names: bool,
    /// `self_training`: rows without a label that each round takes per class, the surest first.
    /// Scaled down in proportion where the largest would take nearly all rows.
    #[serde(default = "default_keep")]
    pub keep: Vec<u32>,
    /// `self_training`: what a labelled row or name weighs beside a row that labelled itself.
    #[serde(default = "default_weight_labelled")]
    pub weight_labelled: f32,
    /// `self_training` and `logistic_regression`: inverse strength of the L2 penalty
    /// (scikit-learn's `C`).
    #[serde(default = "default_c")]
    pub c: f64,
    /// `self_training`: the same for the last fit; smaller gives milder probabilities.
    #[serde(default = "default_final_c")]
    pub final_c: f64,
    /// `self_training`: steps that scale the probabilities to the class shares; 0 leaves them
    /// as they are.
    #[serde(default = "default_sinkhorn_steps")]
    pub sinkhorn_steps: u32,
    /// `knn`: how many neighbours vote.
    #[serde(default = "default_k")]
    pub k: usize,
}

/// How vectors become labels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Logistic regression that labels the unlabelled rows itself, the surest first, in rounds.
    #[default]
    SelfTraining,
    /// The class with the most similar mean vector.
    Centroid,
    /// A vote of the most similar labelled rows.
    Knn,
    /// Logistic regression on the labelled rows alone.
    LogisticRegression,
}

/// How common each class is taken to be among the rows without a label.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassShares {
    /// All classes are about equally common.
    #[default]
    Even,
    /// As among the labelled rows, each class counted once more so that none has a share of 0.
    Labelled,
}

impl ClassifierSpec {
    /// The defaults, with `embedder` as the model.
    pub fn new(embedder: impl Into<serde_json::Value>) -> Self {
        Self {
            embedder: embedder.into(),
            method: Method::default(),
            class_shares: ClassShares::default(),
            label_names: true,
            keep: default_keep(),
            weight_labelled: default_weight_labelled(),
            c: default_c(),
            final_c: default_final_c(),
            sinkhorn_steps: default_sinkhorn_steps(),
            k: default_k(),
        }
    }

    /// # Errors
    /// When a number is outside what a fit can use; names the setting.
    pub fn check(&self) -> Result<(), ClassifierError> {
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let wrong = |setting, must| Err(ClassifierError::Setting { setting, must });
        if !positive(self.c) {
            return wrong("c", "a number above 0");
        }
        if !positive(self.final_c) {
            return wrong("final_c", "a number above 0");
        }
        if !positive(f64::from(self.weight_labelled)) {
            return wrong("weight_labelled", "a number above 0");
        }
        if self.k == 0 {
            return wrong("k", "at least 1");
        }
        if self.keep.contains(&0) {
            return wrong("keep", "a list of counts of at least 1");
        }
        Ok(())
    }
}

fn yes() -> bool {
    true
}

fn default_keep() -> Vec<u32> {
    vec![20, 50, 90, 130, 150]
}

fn default_weight_labelled() -> f32 {
    3.0
}

fn default_c() -> f64 {
    100.0
}

fn default_final_c() -> f64 {
    10.0
}

fn default_sinkhorn_steps() -> u32 {
    50
}

fn default_k() -> usize {
    5
}
