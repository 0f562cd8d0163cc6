//! [`Scores`]: the `scores` artifact: how a model did on a set of rows, row by row.

use std::collections::BTreeMap;

use flowrun_engine::step::StepOutcome;
use flowrun_lm::calibration::Calibration;
use flowrun_lm::stats::{LabelScore, mcnemar};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::format_version::FormatVersion;

/// How one model did, with one or two programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Version of this format.
    #[serde(default, skip_serializing_if = "FormatVersion::is_first")]
    pub version: FormatVersion<1>,
    /// Data set that the rows are from; says `stand-in` where it is one.
    pub dataset: String,
    /// Model id.
    pub model: String,
    /// One per program.
    pub programs: Vec<ProgramScore>,
    /// McNemar's test of the plain program against the optimised one, where both were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<PairedTest>,
}

impl Scores {
    /// What a table shows of them.
    pub(crate) fn outcome(&self) -> StepOutcome {
        let mut outcome = StepOutcome::default()
            .metric("model", self.model.as_str())
            .metric("dataset", self.dataset.as_str());
        for program in &self.programs {
            let [accuracy, ece] = match (program.program, self.programs.len()) {
                (ProgramKind::Optimised, 2..) => ["accuracy_optimised", "ece_optimised"],
                _ => ["accuracy", "ece"],
            };
            outcome = outcome.metric(accuracy, program.accuracy);
            if let Some(found) = &program.calibration {
                outcome = outcome.metric(ece, found.ece);
            }
        }
        if let Some(first) = self.programs.first() {
            outcome = outcome
                .metric("n", first.n)
                .metric("program", first.program.as_str());
            if let Some(role) = first.role {
                outcome = outcome.metric("role", role.as_str());
            }
        }
        outcome
    }
}

/// McNemar's exact test of two programs on the same rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairedTest {
    /// Rows that only the first program got right.
    pub only_first: usize,
    /// Rows that only the second program got right.
    pub only_second: usize,
    /// Two-sided p-value; the difference is taken to be real below 0.05.
    pub p_value: f64,
}

impl PairedTest {
    /// Of two programs; of fewer or more there is none.
    pub(crate) fn of(programs: &[ProgramScore]) -> Option<Self> {
        let [first, second] = programs else {
            return None;
        };
        let pairs = first.rows.iter().zip(&second.rows);
        let found = mcnemar(pairs.map(|(a, b)| (a.correct, b.correct)));
        Some(Self {
            only_first: found.only_a,
            only_second: found.only_b,
            p_value: found.p,
        })
    }
}

/// Whether the rows that made a score had a part in what was scored.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leakage {
    /// Whether it is known which rows trained and selected the program and its checkpoint.
    pub known: bool,
    /// Rows that it was trained on.
    pub trained: usize,
    /// Rows that it was selected by, and not trained on.
    pub selected: usize,
    /// Rows that a teacher of it came from, and that neither trained nor selected it.
    #[serde(default)]
    pub taught: usize,
    /// Rows whose text had one of these parts, under another id.
    pub same_text: usize,
    /// Rows that are none of these …
    pub clean_rows: usize,
    /// … and of them, answered with the expected label.
    pub clean_correct: usize,
}

impl Leakage {
    /// Whether no row is known, and none can be unknown, to have had a part.
    #[must_use]
    pub(crate) fn is_clean(&self) -> bool {
        self.known && self.trained + self.selected + self.taught + self.same_text == 0
    }
}

/// How a model did with one program.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
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
    /// The 95 % Wilson interval of `accuracy`.
    #[serde(default)]
    pub interval: (f64, f64),
    /// Answers that could not be read, and prompts that were too long; they count as not correct.
    pub parse_failures: usize,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// What these tokens cost, in US dollars, where prices are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    /// Precision, recall and F1 of every label.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub per_label: Vec<LabelScore>,
    /// Mean F1 over the labels that rows have.
    #[serde(default)]
    pub macro_f1: f64,
    /// Whether the model is right as often as it says, where it gives probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Whether the rows had a part in what they score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leakage: Option<Leakage>,
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
    /// What the program was given, by the names of its inputs, where that is not the text alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<BTreeMap<String, Value>>,
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
    /// Why there is no answer: the prompt is longer than the model's context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl ScoredRow {
    /// The row as a server is asked.
    #[must_use]
    pub fn question(&self) -> Value {
        question(&self.text, self.inputs.as_ref())
    }
}

/// What a server is asked: the program's inputs, or the short form for a text alone.
#[must_use]
pub fn question(text: &str, inputs: Option<&BTreeMap<String, Value>>) -> Value {
    match inputs {
        Some(inputs) => json!(inputs),
        None => json!({ "text": text }),
    }
}

/// Mean F1 over the labels that rows have.
pub(crate) fn macro_f1(per_label: &[LabelScore]) -> f64 {
    let seen = per_label.iter().filter(|label| label.n > 0);
    let seen: Vec<f64> = seen.map(|label| label.f1).collect();
    seen.iter().sum::<f64>() / seen.len().max(1) as f64
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
