//! [`Optimizer`]: finds better demos for a program. Knows metrics and models only
//! through [`Session`]; the same seed draws the same demos as in DSPy.

mod bootstrap_few_shot;
mod instruction_search;
mod kept;
mod knn_few_shot;
mod labeled_few_shot;
mod random_search;

pub use bootstrap_few_shot::BootstrapFewShot;
pub use instruction_search::{InstructionSearch, InstructionSettings, Proposed};
pub use kept::KeptResults;
pub use knn_few_shot::KnnFewShot;
pub use labeled_few_shot::LabeledFewShot;
pub use random_search::RandomSearch;

use crate::evaluate::EvaluateError;
use crate::example::{Demo, Example};
use crate::lm::{Lm, Sampling};
use crate::metric::Metric;
use crate::program::{Program, RowErrorKind, Tokens};
use serde::{Deserialize, Serialize};

/// What an optimizer works with.
pub struct Session<'a> {
    /// Answers for the student.
    pub lm: &'a dyn Lm,
    /// How the student draws tokens.
    pub sampling: &'a Sampling,
    /// What is to be improved.
    pub metric: &'a Metric<'a>,
    /// Column and field of the label, for the rows of results.
    pub label: &'a str,
    /// Makes the demos; the student itself when `None`.
    pub teacher: Option<Teacher<'a>>,
    /// Rows per call of the model; 1 asks in DSPy's order with one thread. Demos and scores are
    /// the same for every value as long as the model's answers do not depend on their order.
    pub batch: usize,
    /// Hears how it goes.
    pub on_progress: Option<&'a OnProgress<'a>>,
    /// Where what was worked out is kept, so that a search goes on where it was cut short.
    pub kept: Option<&'a KeptResults>,
}

impl Session<'_> {
    fn tell(&self, progress: Progress) {
        if let Some(on_progress) = self.on_progress {
            on_progress(progress);
        }
    }
}

/// A program that works out demos for another one.
#[derive(Clone, Copy)]
pub struct Teacher<'a> {
    /// The program; predictors pair with the student's by position.
    pub program: &'a Program,
    /// Answers for it.
    pub lm: &'a dyn Lm,
}

/// Hears [`Progress`], from any thread.
pub type OnProgress<'a> = dyn Fn(Progress) + Sync + 'a;

/// A moment of an optimisation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "what")]
pub enum Progress {
    /// A candidate program is about to be made.
    Candidate {
        /// Its seed.
        seed: i64,
        /// Candidates before it.
        done: usize,
        /// Candidates in all.
        total: usize,
    },
    /// Training rows were tried as demos.
    Bootstrapping {
        /// Rows tried so far in this round.
        tried: usize,
        /// Demos found so far.
        found: usize,
    },
    /// A candidate is being scored.
    Evaluating {
        /// Rows answered.
        rows: usize,
        /// Rows in all.
        total: usize,
    },
    /// It is known what became of a proposal of instructions.
    Proposed {
        /// The seed of the candidate that it would be.
        seed: i64,
        /// What became of it.
        became: Proposed,
    },
    /// A candidate has a score.
    Scored {
        /// Its seed.
        seed: i64,
        /// Its score in percent.
        score: f64,
        /// The best score so far.
        best: f64,
    },
}

/// One program that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// −3 no demos, −2 labelled rows, −1 bootstrapped in order, from 0 on shuffled.
    pub seed: i64,
    /// Percent.
    pub score: f64,
    /// What the metric gave for each row of the validation set.
    pub subscores: Vec<f64>,
    /// Rows whose answer could not be read.
    pub parse_failures: usize,
    /// Its demos by predictor.
    pub demos: Vec<(String, Vec<Demo>)>,
    /// Its instructions by predictor, where they are not the student's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instructions: Vec<(String, String)>,
    /// Rows after which it could not win any more and was left; `score` is then what it could
    /// still have reached, and `subscores` is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_after: Option<usize>,
    /// Key of the action that its score is kept under, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// What an optimizer found.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// The student with its demos.
    pub program: Program,
    /// All candidates in the order tried; empty for optimizers that score nothing.
    pub candidates: Vec<Candidate>,
    /// Position of the winner among the candidates.
    pub best: Option<usize>,
    /// What it cost.
    pub tokens: Tokens,
}

impl Compiled {
    fn unscored(program: Program, tokens: Tokens) -> Self {
        Self {
            program,
            candidates: Vec::new(),
            best: None,
            tokens,
        }
    }

    /// The candidates by score, best first; of equal scores the one tried first.
    pub fn ranked(&self) -> Vec<&Candidate> {
        let mut ranked: Vec<&Candidate> = self.candidates.iter().collect();
        ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
        ranked
    }
}

/// Why there is no better program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptimizeError {
    /// A candidate cannot be scored.
    #[error("candidate {seed}: {source}")]
    Evaluate {
        /// Its seed.
        seed: i64,
        /// Why.
        source: EvaluateError,
    },
    /// Too many rows failed while demos were made.
    #[error("{errors} rows failed while bootstrapping (`max_errors` is {max}); the last: {last}")]
    TooManyErrors {
        /// Rows failed.
        errors: usize,
        /// The limit.
        max: usize,
        /// The kind of the last failure.
        kind: RowErrorKind,
        /// Why the last one failed.
        last: String,
    },
    /// Nothing was tried.
    #[error("no candidate was tried; `restrict` must name seeds from -3 to {0}")]
    NoCandidates(i64),
    /// Shuffled candidates need demos to draw.
    #[error("`max_bootstrapped_demos` must be at least 1 for candidates with a shuffled train set")]
    NoDemos,
    /// The model that proposes instructions gave no answer.
    #[error("the model that proposes instructions: {0}")]
    Proposer(String),
    /// The sentence encoder failed.
    #[error("rows could not be embedded: {0}")]
    Embed(String),
    /// The run was asked to stop.
    #[error("stopped")]
    Cancelled,
}

/// A way to find better demos.
pub trait Optimizer {
    /// The student with better demos. `valset` scores candidates; the train set does when it is
    /// `None`.
    ///
    /// # Errors
    /// When too many rows fail or the run is asked to stop.
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        valset: Option<&[Example]>,
        session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError>;
}

#[cfg(test)]
mod tests;
