//! A report to draw. The sample's figures are made up and mean nothing.
#![allow(clippy::unwrap_used, clippy::panic)]

mod charts;
mod json;
mod page;

use std::collections::BTreeMap;

use flowrun_lm::stats::LabelScore;

use super::*;
use crate::scores::{Leakage, ProgramKind, Role};

const HOSTILE: &str = "<script>alert('x')</script> & \"quoted\" </svg> {{ 7 * 7 }}";

/// Labels as long and as many as the real ones.
fn labels() -> Vec<String> {
    (1..=25)
        .map(|i| match i {
            1 => "made_up_label_that_is_as_long_as_the_longest_one".to_owned(),
            _ => format!("made_up_label_{i:02}"),
        })
        .collect()
}

fn clean(rows: u64, correct: u64) -> Leakage {
    Leakage {
        known: true,
        clean_rows: rows as usize,
        clean_correct: correct as usize,
        ..Leakage::default()
    }
}

fn test_score(role: Role, model: &str, correct: u64, parse_failures: u64) -> Score {
    let accuracy = correct as f64 / 1000.0;
    let program = if role == Role::Best {
        ProgramKind::Optimised
    } else {
        ProgramKind::Plain
    };
    Score {
        role: Some(role),
        model: model.into(),
        program,
        n: 1000,
        correct,
        accuracy,
        parse_failures,
        low: accuracy - 0.02,
        high: accuracy + 0.018,
        leakage: Some(clean(1000, correct)),
    }
}

fn sample(stand_in: bool) -> Report {
    let base = "made-up/Small-0B";
    let checkpoint = |e: u32| format!("{base}:epochs-{e}-total-trained-steps-{}", 32 * (e + 1));
    let models: Vec<String> = [base.to_owned()]
        .into_iter()
        .chain((0..6).map(checkpoint))
        .collect();
    let dev = models.iter().enumerate().flat_map(|(index, model)| {
        [ProgramKind::Plain, ProgramKind::Optimised].map(|program| {
            let correct = 111 + 107 * index as u64 + 37 * (program as u64);
            Score {
                role: None,
                model: model.clone(),
                program,
                n: 1000,
                correct,
                accuracy: correct as f64 / 1000.0,
                parse_failures: 60 / (index as u64 + 1),
                low: correct as f64 / 1000.0 - 0.03,
                high: correct as f64 / 1000.0 + 0.03,
                leakage: None,
            }
        })
    });
    let labels = labels();
    let matrix = (0..25u64)
        .map(|gold| {
            let cell = |column: u64| match column {
                c if c == gold => 25 + gold % 7 * 2,
                25 => gold % 4,
                c => u64::from((gold * 7 + c * 3) % 11 == 0) * ((gold + c) % 5),
            };
            (0..26).map(cell).collect()
        })
        .collect();
    let error = |i: usize| ErrorRow {
        id: format!("test-{i}"),
        text: if i == 0 {
            HOSTILE.into()
        } else {
            format!("made-up query number {i}, of no bank")
        },
        gold: labels[i % 25].clone(),
        predicted: if i % 9 == 5 {
            String::new()
        } else {
            labels[(i + 3) % 25].clone()
        },
        confidence: i.is_multiple_of(2).then_some(0.97 - i as f64 / 100.0),
        raw: (i % 9 == 5).then(|| format!("{HOSTILE}\nno label {i}")),
    };
    let step = |step: &str, kind: &str, took_ms, tokens, status: &str| StepCost {
        step: step.into(),
        kind: kind.into(),
        took_ms,
        tokens,
        cost_usd: (tokens > 0).then_some(tokens as f64 / 1e6),
        status: status.into(),
    };
    let cost = |model: &str, tokens, ms, usd| CostRow {
        model: model.into(),
        program: if model.contains("epochs-") {
            ProgramKind::Optimised
        } else {
            ProgramKind::Plain
        },
        queries: 1000,
        tokens_per_query: tokens,
        ms_per_query: Some(ms),
        usd_per_1000: usd,
    };
    let losses = (1..=192u32).map(|step| LossPoint {
        step: step.into(),
        epoch: (step - 1) / 32,
        loss: 0.12 + 2.1 / f64::from(step).sqrt() + 0.05 * f64::from(step * 37 % 10) / 10.0,
        validation: None,
    });
    Report {
        version: Report::VERSION,
        title: "Sample report (made-up figures)".into(),
        about: Some("Figures of a test, invented to be looked at; nothing was measured.".into()),
        pipeline: "sample".into(),
        generated_at: "2000-01-01T00:00:00Z".into(),
        dataset: if stand_in { "stand-in" } else { "made-up" }.into(),
        stand_in,
        data: DataSummary {
            train_rows: 4171,
            test_rows: 1000,
            labels: labels.clone(),
            labelled_rows: 100,
            unlabelled_rows: 4071,
            source: "nowhere".into(),
        },
        oracle: Some(OracleAudit {
            model: "made-up/Big-0B".into(),
            labelled: 4071,
            kept: 4065,
            dropped: BTreeMap::from([("label outside the set".into(), 6)]),
            audited: 4071,
            audit_accuracy: Some(0.7777),
            kept_accuracy: Some(0.7788),
        }),
        training: losses.collect(),
        dev: dev.collect(),
        test: vec![
            test_score(Role::Best, &models[6], 812, 3),
            test_score(Role::Base, base, 148, 221),
            test_score(Role::Oracle, "made-up/Big-0B", 843, 1),
            test_score(Role::Baseline, "nearest centroid", 701, 0),
        ],
        comparisons: vec![
            Comparison {
                a: base.into(),
                a_program: ProgramKind::Plain,
                b: models[6].clone(),
                b_program: ProgramKind::Optimised,
                b_only: 690,
                a_only: 26,
                p_value: 1e-90,
            },
            Comparison {
                a: "made-up/Big-0B".into(),
                a_program: ProgramKind::Plain,
                b: models[6].clone(),
                b_program: ProgramKind::Optimised,
                b_only: 50,
                a_only: 81,
                p_value: 0.0912,
            },
        ],
        confusion: Some(Confusion {
            labels: labels.clone(),
            matrix,
        }),
        per_label: labels
            .iter()
            .enumerate()
            .map(|(i, label)| LabelScore {
                label: label.clone(),
                n: 40,
                precision: 0.5 + (i * 7 % 25) as f64 / 50.0,
                recall: 0.48 + (i * 7 % 25) as f64 / 50.0,
                f1: 0.49 + (i * 7 % 25) as f64 / 50.0,
            })
            .collect(),
        calibration: None,
        errors: (0..60).map(error).collect(),
        steps: vec![
            step("load", "load", 820, 0, "cached"),
            step("bootstrap", "bootstrap", 754_000, 5_214_000, "ran"),
            step("finetune", "finetune", 4_610_000, 0, "ran"),
            step(
                "evaluate[epochs-5-total-trained-steps-192]",
                "evaluate",
                61_300,
                812_345,
                "ran",
            ),
        ],
        cost: vec![
            cost(&models[6], 96.4, 41.0, Some(0.0123)),
            cost(base, 640.0, 130.0, None),
            cost("made-up/Big-0B", 702.0, 900.0, Some(0.6312)),
        ],
        notes: vec!["Every figure here was made up for a test.".into()],
    }
}
