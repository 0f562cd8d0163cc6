//! The rows of the page's tables.

use std::cmp::Ordering;

use flowrun_lm::calibration::ReliabilityBin;
use flowrun_lm::stats::LabelScore;
use serde::Serialize;

use super::super::data::{Comparison, CostRow, ErrorRow, Report, Score, StepCost};
use super::super::words::{dollars, duration, p_value, percent, plural, short_name, thousands};
use super::interval;
use crate::scores::Leakage;

/// Rows shown of each table of errors; all of them are in `report.json`.
const SHOWN_ERRORS: usize = 40;

#[derive(Serialize)]
pub(super) struct ScoreRow {
    role: &'static str,
    model: String,
    program: &'static str,
    n: String,
    right: String,
    wrong: String,
    unread: String,
    accuracy: String,
    interval: String,
    clean: String,
    sort: f64,
}

#[derive(Serialize)]
pub(super) struct ComparisonRow {
    a: String,
    b: String,
    a_only: String,
    b_only: String,
    p: String,
    verdict: String,
}

#[derive(Serialize)]
pub(super) struct LabelRow {
    label: String,
    n: u64,
    precision: String,
    recall: String,
    f1: String,
    width: String,
    sort: [f64; 3],
}

#[derive(Serialize)]
pub(super) struct CalibrationView {
    summary: String,
    /// Confidences, rows, mean confidence, share right.
    bins: Vec<[String; 4]>,
}

#[derive(Serialize)]
pub(super) struct Errors {
    total: String,
    hidden: usize,
    rows: Vec<WrongRow>,
}

#[derive(Serialize)]
struct WrongRow {
    id: String,
    text: String,
    gold: String,
    predicted: String,
    confidence: String,
    raw: Option<String>,
}

#[derive(Serialize)]
pub(super) struct StepRow {
    step: String,
    kind: String,
    status: String,
    took: String,
    took_ms: u64,
    width: String,
    tokens: String,
    tokens_raw: u64,
    cost: String,
}

pub(super) fn score_rows(scores: &[Score]) -> Vec<ScoreRow> {
    let row = |score: &Score| ScoreRow {
        role: score.role_name(),
        model: score.model.clone(),
        program: score.program.as_str(),
        n: thousands(score.n),
        right: thousands(score.correct),
        wrong: thousands(score.n.saturating_sub(score.correct + score.parse_failures)),
        unread: thousands(score.parse_failures),
        accuracy: percent(score.accuracy),
        interval: interval(score.low, score.high),
        clean: clean(score.leakage.as_ref()),
        sort: score.accuracy,
    };
    scores.iter().map(row).collect()
}

pub(super) fn comparison_rows(report: &Report, names: &[&str], mark: &str) -> Vec<ComparisonRow> {
    let row = |c: &Comparison| {
        let (mut a, mut b) = (short_name(&c.a, names), short_name(&c.b, names));
        if a == b {
            a = format!("{a}, {}", c.a_program.as_str());
            b = format!("{b}, {}", c.b_program.as_str());
        }
        let verdict = match c.a_only.cmp(&c.b_only) {
            Ordering::Greater if c.p_value < 0.05 => format!("{a} is better{mark}"),
            Ordering::Less if c.p_value < 0.05 => format!("{b} is better{mark}"),
            _ => format!("no clear difference{mark}"),
        };
        ComparisonRow {
            a,
            b,
            a_only: thousands(c.a_only),
            b_only: thousands(c.b_only),
            p: p_value(c.p_value),
            verdict,
        }
    };
    report.comparisons.iter().map(row).collect()
}

pub(super) fn label_rows(report: &Report) -> Vec<LabelRow> {
    let mut labels: Vec<_> = report.per_label.iter().collect();
    labels.sort_by(|a, b| a.f1.total_cmp(&b.f1).then_with(|| a.label.cmp(&b.label)));
    let row = |score: &LabelScore| LabelRow {
        label: score.label.clone(),
        n: score.n,
        precision: percent(score.precision),
        recall: percent(score.recall),
        f1: percent(score.f1),
        width: width(score.f1),
        sort: [score.precision, score.recall, score.f1],
    };
    labels.into_iter().map(row).collect()
}

/// Whether a number can be trusted to be of rows that took no part in it.
fn clean(leakage: Option<&Leakage>) -> String {
    let Some(leakage) = leakage.filter(|leakage| leakage.known) else {
        return "not known".to_owned();
    };
    if leakage.is_clean() {
        return "clean".to_owned();
    }
    let parts = [
        (leakage.trained, "trained on"),
        (leakage.selected, "selected by"),
        (leakage.taught, "known to its teacher"),
        (leakage.same_text, "of a known text"),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, what)| format!("{} {what}", thousands(*n as u64)))
        .collect();
    let rest = match leakage.clean_rows {
        0 => "no row is clean".to_owned(),
        n => format!(
            "{} on the {} clean rows",
            percent(leakage.clean_correct as f64 / n as f64),
            thousands(n as u64)
        ),
    };
    format!("not clean: {}; {rest}", parts.join(", "))
}

pub(super) fn calibration(report: &Report, mark: &str) -> Option<CalibrationView> {
    let found = report.calibration.as_ref()?;
    let bin = |bin: &ReliabilityBin| {
        [
            interval(bin.low, bin.high),
            thousands(bin.n as u64),
            percent(bin.confidence),
            percent(bin.accuracy),
        ]
    };
    Some(CalibrationView {
        summary: format!(
            "Expected calibration error {}{mark} over {} answers with a probability: how far, on \
             average, a confidence is from the share of such answers that is right.",
            percent(found.ece),
            thousands(found.n as u64)
        ),
        bins: found.bins.iter().map(bin).collect(),
    })
}

/// A share as the width of a bar in a table cell.
fn width(share: f64) -> String {
    format!(
        "{:.1}",
        if share.is_finite() {
            share.clamp(0.0, 1.0) * 100.0
        } else {
            0.0
        }
    )
}

impl Errors {
    pub(super) fn new(rows: &[&ErrorRow]) -> Self {
        let row = |error: &&ErrorRow| WrongRow {
            id: error.id.clone(),
            text: error.text.clone(),
            gold: error.gold.clone(),
            predicted: error.predicted.clone(),
            confidence: error.confidence.map_or(String::new(), percent),
            raw: error.raw.clone(),
        };
        Self {
            total: thousands(rows.len() as u64),
            hidden: rows.len().saturating_sub(SHOWN_ERRORS),
            rows: rows.iter().take(SHOWN_ERRORS).map(row).collect(),
        }
    }
}

pub(super) fn cost_rows(report: &Report) -> Vec<[String; 5]> {
    let row = |row: &CostRow| {
        let of_this = report.cost.iter().filter(|other| other.model == row.model);
        let name = match of_this.count() {
            1 => row.model.clone(),
            _ => format!("{} ({})", row.model, row.program.as_str()),
        };
        [
            name,
            thousands(row.queries),
            format!("{:.0}", row.tokens_per_query),
            row.ms_per_query
                .map_or("not measured".to_owned(), |ms| format!("{ms:.0}")),
            row.usd_per_1000
                .map_or("no price known".to_owned(), dollars),
        ]
    };
    report.cost.iter().map(row).collect()
}

pub(super) fn step_rows(report: &Report) -> Vec<StepRow> {
    let longest = report
        .steps
        .iter()
        .map(|step| step.took_ms)
        .max()
        .unwrap_or(0)
        .max(1);
    let row = |step: &StepCost| StepRow {
        step: step.step.clone(),
        kind: step.kind.clone(),
        status: step.status.clone(),
        took: duration(step.took_ms),
        took_ms: step.took_ms,
        width: width(step.took_ms as f64 / longest as f64),
        tokens: thousands(step.tokens),
        tokens_raw: step.tokens,
        cost: step.cost_usd.map_or("–".to_owned(), dollars),
    };
    report.steps.iter().map(row).collect()
}

/// Time, tokens and money of all steps.
pub(super) fn totals(report: &Report) -> [String; 3] {
    let steps = &report.steps;
    let priced = steps.iter().filter_map(|step| step.cost_usd);
    let unpriced = steps
        .iter()
        .filter(|s| s.tokens > 0 && s.cost_usd.is_none())
        .count() as u64;
    let mut cost = dollars(priced.sum());
    if unpriced > 0 {
        cost = format!(
            "{cost} and {}",
            plural(unpriced, "unpriced step", "unpriced steps")
        );
    }
    let took = steps
        .iter()
        .map(|step| step.took_ms)
        .fold(0, u64::saturating_add);
    let tokens = steps
        .iter()
        .map(|step| step.tokens)
        .fold(0, u64::saturating_add);
    [duration(took), thousands(tokens), cost]
}
