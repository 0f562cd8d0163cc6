//! [`Scores`]: the `scores` artifact: how a model did on a set of rows, row by row.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How one model did, with one or two programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Data set that the rows are from; says `stand-in` where it is one.
    pub dataset: String,
    /// Model id.
    pub model: String,
    /// One per program.
    pub programs: Vec<ProgramScore>,
}

/// How a model did with one program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProgramScore {
    /// Which program.
    pub program: ProgramKind,
    /// Why it was tested; none on the devset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Rows asked.
    pub n: usize,
    /// Rows answered with the expected label.
    pub correct: usize,
    /// `correct / n`.
    pub accuracy: f64,
    /// Answers that could not be read; they count as not correct.
    pub parse_failures: usize,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// What these tokens cost, in US dollars, where prices are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    /// Row by row.
    pub rows: Vec<ScoredRow>,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoredRow {
    /// Row id.
    pub id: String,
    /// The query.
    pub text: String,
    /// Expected label.
    pub gold: String,
    /// Given label; none when the answer could not be read.
    pub predicted: Option<String>,
    /// Whether they are equal, by the metric.
    pub correct: bool,
    /// How sure the model was of `predicted`, where it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f32>,
    /// The answer as it came, where it could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<String>,
}

/// Which prompt a model ran with.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ProgramKind {
    /// The program as it was written.
    #[default]
    Plain,
    /// The program after prompt optimisation.
    Optimised,
}

impl ProgramKind {
    /// The word that `report.json` and the page use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Optimised => "optimised",
        }
    }
}

/// Why a model is in the test-set table.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Won on the devset.
    #[default]
    Best,
    /// The student before fine-tuning.
    Base,
    /// The teacher.
    Oracle,
    /// A cheap method without a language model.
    Baseline,
}

impl Role {
    /// The word that `report.json` and the page use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Best => "best",
            Self::Base => "base",
            Self::Oracle => "oracle",
            Self::Baseline => "baseline",
        }
    }
}
