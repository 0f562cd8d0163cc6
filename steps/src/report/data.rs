//! Everything that the report shows, as plain data: `report.json` is this, serialised.
//!
//! Knows no HTML and computes no score: steps fill it in, [`super::render_html`] draws it.
//! Invariant: accuracies, precisions, recalls, f1 and interval ends are shares in 0..=1; money is
//! US dollars; times are milliseconds.

use std::collections::BTreeMap;

use flowrun_lm::calibration::Calibration;
use flowrun_lm::stats::LabelScore;
use serde::{Deserialize, Serialize};

use crate::scores::{Leakage, ProgramKind, Role};

/// One finished distillation, from data to test scores and what it cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Format version, [`Report::VERSION`] when written by this code.
    pub version: u32,
    /// The headline of the page.
    pub title: String,
    /// One or two sentences on what the pipeline is for.
    pub about: Option<String>,
    /// Name of the pipeline that made the report.
    pub pipeline: String,
    /// When it was made, as text (RFC 3339); the clock belongs to the caller.
    pub generated_at: String,
    /// `banking77`, `stand-in`, or the name of the user's own data.
    pub dataset: String,
    /// Whether the scores were measured on stand-in data and say nothing about the real task.
    pub stand_in: bool,
    /// Sizes, labels and origin of the data.
    pub data: DataSummary,
    /// How good the oracle's labels were; `None` when no oracle labelled anything.
    pub oracle: Option<OracleAudit>,
    /// The loss curve of fine-tuning, in the order of training.
    pub training: Vec<LossPoint>,
    /// Scores on the synthetic devset: base and every checkpoint, plain and optimised.
    pub dev: Vec<Score>,
    /// Scores on the true test set.
    pub test: Vec<Score>,
    /// McNemar's test between pairs of test-set entries.
    pub comparisons: Vec<Comparison>,
    /// Gold against predicted labels of the best model on the test set.
    pub confusion: Option<Confusion>,
    /// The best model's scores label by label, on the test set.
    pub per_label: Vec<LabelScore>,
    /// Whether the best model is right as often as it says, where it gives probabilities.
    #[serde(default)]
    pub calibration: Option<Calibration>,
    /// All test queries that the best model got wrong, worst first.
    pub errors: Vec<ErrorRow>,
    /// Time, tokens and money of each step of the run.
    pub steps: Vec<StepCost>,
    /// What a query costs with each model.
    pub cost: Vec<CostRow>,
    /// Remarks that a reader needs in order to judge the scores.
    pub notes: Vec<String>,
}

impl Report {
    /// The version of the format that this code writes.
    pub const VERSION: u32 = 1;

    /// Whether every score must be marked as measured on stand-in data.
    pub(crate) fn is_stand_in(&self) -> bool {
        self.stand_in || self.dataset == "stand-in"
    }

    /// The model that was chosen on the devset and then tested.
    pub fn best(&self) -> Option<&Score> {
        self.test
            .iter()
            .find(|score| score.role == Some(Role::Best))
    }
}

/// Sizes, labels and origin of the data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSummary {
    /// Training rows after filtering.
    pub train_rows: u64,
    /// Test rows after filtering.
    pub test_rows: u64,
    /// The labels in use.
    pub labels: Vec<String>,
    /// Training rows that kept their gold label.
    pub labelled_rows: u64,
    /// Training rows whose gold label was deleted.
    pub unlabelled_rows: u64,
    /// Where the rows came from.
    pub source: String,
}

/// What the oracle labelled, what was dropped and why, and how often it was right.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OracleAudit {
    /// The oracle's name.
    pub model: String,
    /// Rows that it answered.
    pub labelled: u64,
    /// Rows that were kept for training.
    pub kept: u64,
    /// Dropped rows by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Rows, kept and dropped, whose gold label is known: the shares are over these.
    #[serde(default)]
    pub audited: u64,
    /// Share of the audited answers that equal the gold label. Used for this audit only, never in
    /// training.
    pub audit_accuracy: Option<f64>,
    /// The same share over those that were kept.
    pub kept_accuracy: Option<f64>,
}

/// One reading of the training loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossPoint {
    /// Optimizer steps done, from 1.
    pub step: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Mean loss in nats per token of the assistant's text.
    pub loss: f64,
    /// The same on the chats to validate on, where there are any: at the last step of an epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<f64>,
}

/// One score, on the synthetic devset or on the test set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// Why the model is in the table of the test set; `None` on the devset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Model id, such as `base` or `base:epochs-4-total-trained-steps-160`.
    pub model: String,
    /// Which prompt it ran with.
    pub program: ProgramKind,
    /// Rows asked.
    pub n: u64,
    /// Rows answered with the expected label; on the test set that is the gold label.
    pub correct: u64,
    /// `correct / n`.
    pub accuracy: f64,
    /// Answers in which no label was found; they count as not correct.
    pub parse_failures: u64,
    /// Lower end of the 95 % Wilson interval of `accuracy`.
    pub low: f64,
    /// Upper end of the 95 % Wilson interval of `accuracy`.
    pub high: f64,
    /// Whether its rows had a part in what they score; `None` when nobody looked.
    #[serde(default)]
    pub leakage: Option<Leakage>,
}

impl Score {
    /// Its role in a word; none on the devset.
    pub(crate) fn role_name(&self) -> &'static str {
        self.role.map_or("", Role::as_str)
    }
}

/// McNemar's exact test of two models on the same test rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// The first model, as named in the test scores.
    pub a: String,
    /// Its program.
    pub a_program: ProgramKind,
    /// The second model.
    pub b: String,
    /// Its program.
    pub b_program: ProgramKind,
    /// Rows that only `b` got right.
    pub b_only: u64,
    /// Rows that only `a` got right.
    pub a_only: u64,
    /// Two-sided p-value of the difference.
    pub p_value: f64,
}

/// Counts of gold label against predicted label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confusion {
    /// Row names, and column names but for the last column.
    pub labels: Vec<String>,
    /// `matrix[gold][predicted]`: one row per label, one column per label and a last column for
    /// answers in which no label was found.
    pub matrix: Vec<Vec<u64>>,
}

/// One test query that the best model got wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorRow {
    /// Row id in the test set.
    pub id: String,
    /// The customer's text.
    pub text: String,
    /// The right label.
    pub gold: String,
    /// The label that was given; empty when no label was found in the answer.
    pub predicted: String,
    /// The model's confidence in `predicted`, 0..=1.
    pub confidence: Option<f64>,
    /// The model's answer as it came, kept where it could not be read.
    pub raw: Option<String>,
}

/// What one step of the run took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepCost {
    /// Step name in the pipeline.
    pub step: String,
    /// Step kind.
    pub kind: String,
    /// Wall time in milliseconds.
    pub took_ms: u64,
    /// Tokens read and written by language models in the attempt that finished; answers that were
    /// kept from an earlier one are not in it.
    pub tokens: u64,
    /// What these tokens cost, in US dollars; `None` when no price is known.
    pub cost_usd: Option<f64>,
    /// `ran`, `cached`, `failed` or `skipped`.
    pub status: String,
}

/// What it takes to answer queries with one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostRow {
    /// Model id, as in the test scores.
    pub model: String,
    /// Which prompt it ran with.
    pub program: ProgramKind,
    /// Queries measured.
    pub queries: u64,
    /// Mean tokens read and written for a query.
    pub tokens_per_query: f64,
    /// Mean wall time of a query, in milliseconds; `None` when no answer was computed in this run.
    pub ms_per_query: Option<f64>,
    /// US dollars for 1,000 queries; `None` when no price is known.
    pub usd_per_1000: Option<f64>,
}
