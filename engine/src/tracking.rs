//! [`Tracking`]: what programs of others are told of a run. Knows none of them: the command
//! line tells them. Invariant: nothing of it is in an action key.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What programs of others are told of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tracking {
    /// What an MLflow server is told.
    pub mlflow: MlflowTracking,
    /// What is written for TensorBoard.
    #[serde(default)]
    pub tensorboard: Option<TensorBoardTracking>,
}

/// What is written for TensorBoard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorBoardTracking {
    /// Where each run gets a folder; relative to the project root.
    pub folder: PathBuf,
}

/// What an MLflow server is told, besides params and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlflowTracking {
    /// Name of the experiment.
    pub experiment: Option<String>,
    /// Outputs that are sent as artifacts.
    pub artifacts: Vec<TrackedOutput>,
    /// An output that becomes a version of a registered model.
    pub register: Option<RegisteredModel>,
}

/// An output of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrackedOutput {
    /// The step's name.
    pub step: String,
    /// Its output port.
    pub output: String,
}

/// An output that becomes a version of a registered model, when the run ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisteredModel {
    /// The model's name.
    pub name: String,
    /// The output.
    pub output: TrackedOutput,
}
