//! The page's sentences, worked out from a [`Report`]; the rows of its tables are in `tables`.
//!
//! Knows no HTML: the template escapes and lays out what is made here. Invariant: every score in
//! a view carries the stand-in mark when the report is one.

mod tables;

use serde::Serialize;

use self::tables::{
    CalibrationView, ComparisonRow, Errors, LabelRow, ScoreRow, StepRow, calibration,
    comparison_rows, cost_rows, label_rows, score_rows, step_rows, totals,
};
use super::data::{CostRow, ErrorRow, Report, Score};
use super::words::{dollars, percent, points_from, short_name, thousands};
use super::{chart, heat_map};
use crate::scores::Role;

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
            dev: score_rows(&report.dev),
            test: score_rows(&report.test),
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
        .filter(|score| score.role != Some(Role::Best))
        .map(|score| {
            let by = points_from(best.accuracy, score.accuracy);
            let name = short_name(&score.model, names);
            let role = score.role_name();
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

fn price(report: &Report, best: &Score) -> String {
    let Some(row) = cost_of(report, best) else {
        return "What a query costs was not measured.".to_owned();
    };
    let time = row.ms_per_query;
    let time = time.map_or(String::new(), |ms| format!(" and {ms:.0} ms"));
    let effort = format!("a query takes {:.0} tokens{time}", row.tokens_per_query);
    let Some(usd) = row.usd_per_1000 else {
        return format!("No price is known for this model; {effort}.");
    };
    let oracle = report
        .test
        .iter()
        .find(|score| score.role == Some(Role::Oracle));
    let oracle = oracle.and_then(|score| cost_of(report, score)?.usd_per_1000);
    let instead = oracle.map_or(String::new(), |o| format!(" instead of {}", dollars(o)));
    format!("1,000 queries cost {}{instead}; {effort}.", dollars(usd))
}

/// What a tested model costs, with the program that it was tested with.
fn cost_of<'a>(report: &'a Report, score: &Score) -> Option<&'a CostRow> {
    let is = |row: &&CostRow| row.model == score.model && row.program == score.program;
    report.cost.iter().find(is)
}

fn card(report: &Report, score: &Score, names: &[&str]) -> Card {
    let base = report
        .test
        .iter()
        .find(|other| other.role == Some(Role::Base));
    let against = base
        .filter(|_| score.role != Some(Role::Base))
        .map(|base| format!("{} the base", points_from(score.accuracy, base.accuracy)));
    let cost = cost_of(report, score);
    let cost = match cost.map(|row| (row.usd_per_1000, row.tokens_per_query)) {
        Some((Some(usd), _)) => format!("{} per 1,000 queries", dollars(usd)),
        Some((None, tokens)) => format!("{tokens:.0} tokens a query, no price known"),
        None => "cost not measured".to_owned(),
    };
    Card {
        role: score.role_name(),
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
