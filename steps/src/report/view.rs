//! The page's sentences and table rows, worked out from a [`Report`].
//!
//! Knows no HTML: the template escapes and lays out what is made here. Invariant: every score in
//! a view carries the stand-in mark when the report is one.

use std::cmp::Ordering;

use flowrun_lm::calibration::ReliabilityBin;
use flowrun_lm::stats::LabelScore;
use serde::Serialize;

use super::data::{CostRow, ErrorRow, Report, TestScore};
use super::words::{
    dollars, duration, p_value, percent, plural, points_from, short_name, thousands,
};
use super::{chart, heat_map};
use crate::scores::{Leakage, Role};

/// Rows shown of each table of errors; all of them are in `report.json`.
const SHOWN_ERRORS: usize = 40;

#[derive(Serialize)]
pub(super) struct View {
    stand_in: bool,
    verdict: Vec<String>,
    cards: Vec<Card>,
    facts: Vec<(String, String)>,
    dev_best: Option<String>,
    dev_chart: String,
    test_chart: String,
    loss_chart: String,
    heat_map: String,
    dev: Vec<ScoreRow>,
    test: Vec<ScoreRow>,
    comparisons: Vec<ComparisonRow>,
    labels: Vec<LabelRow>,
    calibration: Option<CalibrationView>,
    wrong: Errors,
    unread: Errors,
    oracle: Vec<(String, String)>,
    costs: Vec<[String; 5]>,
    steps: Vec<StepRow>,
    totals: [String; 3],
}

#[derive(Serialize)]
struct Card {
    role: &'static str,
    name: String,
    program: &'static str,
    accuracy: String,
    interval: String,
    against: Option<String>,
    cost: String,
}

#[derive(Serialize)]
struct ScoreRow {
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
struct ComparisonRow {
    a: String,
    b: String,
    a_only: String,
    b_only: String,
    p: String,
    verdict: String,
}

#[derive(Serialize)]
struct LabelRow {
    label: String,
    n: u64,
    precision: String,
    recall: String,
    f1: String,
    width: String,
    sort: [f64; 3],
}

#[derive(Serialize)]
struct CalibrationView {
    summary: String,
    /// Confidences, rows, mean confidence, share right.
    bins: Vec<[String; 4]>,
}

#[derive(Serialize)]
struct Errors {
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
struct StepRow {
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

impl View {
    pub(super) fn new(report: &Report) -> Self {
        let stand_in = report.is_stand_in();
        let mark = if stand_in { " (stand-in)" } else { "" };
        let names: Vec<&str> = report
            .test
            .iter()
            .map(|score| score.model.as_str())
            .collect();
        // A label outside the set is no label: such answers could not be read.
        let known = |error: &&ErrorRow| {
            !error.predicted.is_empty()
                && (report.data.labels.is_empty() || report.data.labels.contains(&error.predicted))
        };
        let (wrong, unread): (Vec<_>, Vec<_>) = report.errors.iter().partition(known);
        Self {
            stand_in,
            verdict: verdict(report, &names, mark),
            cards: report
                .test
                .iter()
                .map(|score| card(report, score, &names))
                .collect(),
            facts: facts(report),
            dev_best: dev_best(report, mark),
            dev_chart: chart::dev_bars(&report.dev, mark),
            test_chart: chart::test_bars(&report.test, mark),
            loss_chart: chart::loss_curve(&report.training),
            heat_map: report
                .confusion
                .as_ref()
                .map_or(String::new(), |c| heat_map::heat_map(c, mark)),
            dev: dev_rows(report),
            test: test_rows(report),
            comparisons: comparison_rows(report, &names, mark),
            labels: label_rows(report),
            calibration: calibration(report, mark),
            wrong: Errors::new(&wrong),
            unread: Errors::new(&unread),
            oracle: oracle_facts(report, mark),
            costs: cost_rows(report),
            steps: step_rows(report),
            totals: totals(report),
        }
    }
}

fn interval(low: f64, high: f64) -> String {
    format!(
        "{} to {}",
        percent(low).trim_end_matches(" %"),
        percent(high)
    )
}

/// What a manager reads first: who won, by how much, and at what price.
fn verdict(report: &Report, names: &[&str], mark: &str) -> Vec<String> {
    let Some(best) = report.best() else {
        return vec!["No model was scored on the test set.".to_owned()];
    };
    let mut lines = vec![format!(
        "The winner on the devset ({}, {} program) answers {} of {} test queries right: \
         {}{mark}, 95 % interval {}.",
        short_name(&best.model, names),
        best.program.as_str(),
        thousands(best.correct),
        thousands(best.n),
        percent(best.accuracy),
        interval(best.low, best.high),
    )];
    let others: Vec<String> = report
        .test
        .iter()
        .filter(|score| score.role != Role::Best)
        .map(|score| {
            let by = points_from(best.accuracy, score.accuracy);
            let name = short_name(&score.model, names);
            let role = score.role.as_str();
            let name = if name == role {
                String::new()
            } else {
                format!(" ({name})")
            };
            format!("{by} the {role}{name}")
        })
        .collect();
    if !others.is_empty() {
        lines.push(format!("That is {}{mark}.", others.join(", ")));
    }
    lines.push(price(report, best));
    lines
}

fn price(report: &Report, best: &TestScore) -> String {
    let Some(row) = cost_of(report, best) else {
        return "What a query costs was not measured.".to_owned();
    };
    let time = row.ms_per_query;
    let time = time.map_or(String::new(), |ms| format!(" and {ms:.0} ms"));
    let effort = format!("a query takes {:.0} tokens{time}", row.tokens_per_query);
    let Some(usd) = row.usd_per_1000 else {
        return format!("No price is known for this model; {effort}.");
    };
    let oracle = report.test.iter().find(|score| score.role == Role::Oracle);
    let oracle = oracle.and_then(|score| cost_of(report, score)?.usd_per_1000);
    let instead = oracle.map_or(String::new(), |o| format!(" instead of {}", dollars(o)));
    format!("1,000 queries cost {}{instead}; {effort}.", dollars(usd))
}

/// What a tested model costs, with the program that it was tested with.
fn cost_of<'a>(report: &'a Report, score: &TestScore) -> Option<&'a CostRow> {
    let is = |row: &&CostRow| row.model == score.model && row.program == score.program;
    report.cost.iter().find(is)
}

fn card(report: &Report, score: &TestScore, names: &[&str]) -> Card {
    let base = report.test.iter().find(|other| other.role == Role::Base);
    let against = base
        .filter(|_| score.role != Role::Base)
        .map(|base| format!("{} the base", points_from(score.accuracy, base.accuracy)));
    let cost = cost_of(report, score);
    let cost = match cost.map(|row| (row.usd_per_1000, row.tokens_per_query)) {
        Some((Some(usd), _)) => format!("{} per 1,000 queries", dollars(usd)),
        Some((None, tokens)) => format!("{tokens:.0} tokens a query, no price known"),
        None => "cost not measured".to_owned(),
    };
    Card {
        role: score.role.as_str(),
        name: short_name(&score.model, names),
        program: score.program.as_str(),
        accuracy: percent(score.accuracy),
        interval: interval(score.low, score.high),
        against,
        cost,
    }
}

fn facts(report: &Report) -> Vec<(String, String)> {
    let data = &report.data;
    [
        ("Data set", report.dataset.clone()),
        ("Source", data.source.clone()),
        ("Labels", thousands(data.labels.len() as u64)),
        ("Training rows", thousands(data.train_rows)),
        ("with their gold label", thousands(data.labelled_rows)),
        ("without a label", thousands(data.unlabelled_rows)),
        ("Test rows", thousands(data.test_rows)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

fn dev_best(report: &Report, mark: &str) -> Option<String> {
    let names: Vec<&str> = report
        .dev
        .iter()
        .map(|score| score.model.as_str())
        .collect();
    // The earlier of two equal scores is named.
    let best = report
        .dev
        .iter()
        .rev()
        .max_by(|a, b| a.accuracy.total_cmp(&b.accuracy))?;
    Some(format!(
        "Highest on the devset: {}, {} program, {}{mark}.",
        short_name(&best.model, &names),
        best.program.as_str(),
        percent(best.accuracy)
    ))
}

fn dev_rows(report: &Report) -> Vec<ScoreRow> {
    let row = |score: &super::data::DevScore| ScoreRow {
        role: "",
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
    report.dev.iter().map(row).collect()
}

fn test_rows(report: &Report) -> Vec<ScoreRow> {
    let row = |score: &TestScore| ScoreRow {
        role: score.role.as_str(),
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
    report.test.iter().map(row).collect()
}

fn comparison_rows(report: &Report, names: &[&str], mark: &str) -> Vec<ComparisonRow> {
    let row = |c: &super::data::Comparison| {
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

fn label_rows(report: &Report) -> Vec<LabelRow> {
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

fn calibration(report: &Report, mark: &str) -> Option<CalibrationView> {
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
    fn new(rows: &[&ErrorRow]) -> Self {
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

fn oracle_facts(report: &Report, mark: &str) -> Vec<(String, String)> {
    let Some(oracle) = &report.oracle else {
        return Vec::new();
    };
    let mut rows = vec![
        ("Oracle".to_owned(), oracle.model.clone()),
        ("Rows labelled".to_owned(), thousands(oracle.labelled)),
        ("Rows kept".to_owned(), thousands(oracle.kept)),
    ];
    let dropped = oracle.dropped.iter();
    rows.extend(dropped.map(|(reason, n)| (format!("Dropped: {reason}"), thousands(*n))));
    if oracle.audit_accuracy.is_some() && oracle.audited < oracle.labelled {
        let name = "Of these, with a known label".to_owned();
        rows.push((name, thousands(oracle.audited)));
    }
    let shares = [
        ("Right, of all labelled", oracle.audit_accuracy),
        ("Right, of those kept", oracle.kept_accuracy),
    ];
    for (name, share) in shares {
        rows.extend(share.map(|share| (name.to_owned(), format!("{}{mark}", percent(share)))));
    }
    rows
}

fn cost_rows(report: &Report) -> Vec<[String; 5]> {
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

fn step_rows(report: &Report) -> Vec<StepRow> {
    let longest = report
        .steps
        .iter()
        .map(|step| step.took_ms)
        .max()
        .unwrap_or(0)
        .max(1);
    let row = |step: &super::data::StepCost| StepRow {
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
fn totals(report: &Report) -> [String; 3] {
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
