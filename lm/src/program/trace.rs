//! [`RowResult`]: what became of one row: prediction or error, the steps taken,
//! tokens and confidence. Knows no gold label and no metric.

use crate::example::Prediction;
use crate::lm::LmError;
use crate::value::Fields;
use serde::{Deserialize, Serialize};

/// One predictor's part in a run: what it took and, unsanitised, what it gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceStep {
    /// Name of the predictor.
    pub predictor: String,
    /// Its inputs.
    pub inputs: Fields,
    /// Its outputs as the model wrote them.
    pub outputs: Fields,
}

/// Tokens and calls spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Tokens of prompts.
    pub prompt: u64,
    /// Tokens generated.
    pub completion: u64,
    /// Calls answered.
    pub calls: u64,
    /// Of them, answers taken from the completion cache.
    pub cached: u64,
}

impl std::ops::AddAssign for Tokens {
    fn add_assign(&mut self, other: Self) {
        // Counts are the word of servers.
        self.prompt = self.prompt.saturating_add(other.prompt);
        self.completion = self.completion.saturating_add(other.completion);
        self.calls += other.calls;
        self.cached += other.cached;
    }
}

impl std::iter::Sum for Tokens {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, tokens| {
            sum += tokens;
            sum
        })
    }
}

/// Why a row has no prediction.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowError {
    /// The model's answer cannot be read.
    #[error("{reason}")]
    Parse {
        /// What was wrong with it.
        reason: String,
        /// The answer.
        raw: String,
    },
    /// The model gave no answer.
    #[error("{0}")]
    Lm(LmError),
    /// The prompt could not be written, or the model broke its contract.
    #[error("{0}")]
    Other(String),
}

/// The kinds of [`RowError`], for counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowErrorKind {
    /// The answer cannot be read.
    Parse,
    /// No answer.
    Lm,
    /// Anything else, a failing metric included.
    Other,
}

impl RowError {
    /// Its kind.
    pub fn kind(&self) -> RowErrorKind {
        match self {
            Self::Parse { .. } => RowErrorKind::Parse,
            Self::Lm(_) => RowErrorKind::Lm,
            Self::Other(_) => RowErrorKind::Other,
        }
    }

    /// Whether the run was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Lm(LmError::Cancelled))
    }
}

/// What became of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowResult {
    /// The row's id.
    pub id: String,
    /// What the program answered, or why it did not.
    pub prediction: Result<Prediction, RowError>,
    /// The steps that gave outputs.
    pub trace: Vec<TraceStep>,
    /// The model's last answer as it came.
    pub raw: Option<String>,
    /// What the row cost.
    pub tokens: Tokens,
    /// For a constrained label: the probability of each label, in the order of the labels.
    pub probs: Option<Vec<f32>>,
    /// The one of `probs` that belongs to the label that was answered, or the share of votes.
    pub confidence: Option<f32>,
    /// An answer ended at `max_tokens` within a field, so that what was read of it may be a part.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut_off: bool,
}
