//! Tests of the page as a whole. The sample's figures are made up and mean nothing.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use flowrun_lm::stats::LabelScore;
use serde_json::{Value, json};
use sha2::Digest as _;

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

fn test_score(role: Role, model: &str, correct: u64, parse_failures: u64) -> TestScore {
    let accuracy = correct as f64 / 1000.0;
    let program = if role == Role::Best {
        ProgramKind::Optimised
    } else {
        ProgramKind::Plain
    };
    TestScore {
        role,
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

pub(super) fn sample(stand_in: bool) -> Report {
    let base = "made-up/Small-0B";
    let checkpoint = |e: u32| format!("{base}:epochs-{e}-total-trained-steps-{}", 32 * (e + 1));
    let models: Vec<String> = [base.to_owned()]
        .into_iter()
        .chain((0..6).map(checkpoint))
        .collect();
    let dev = models.iter().enumerate().flat_map(|(index, model)| {
        [ProgramKind::Plain, ProgramKind::Optimised].map(|program| {
            let correct = 111 + 107 * index as u64 + 37 * (program as u64);
            DevScore {
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

/// Checks that every element is closed in order, and that attributes are quoted.
fn assert_well_formed(html: &str) {
    const VOID: [&str; 3] = ["meta", "wbr", "!doctype"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let end = rest
            .find('>')
            .unwrap_or_else(|| panic!("unclosed tag: {rest:.60}"));
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        assert_eq!(tag.matches('"').count() % 2, 0, "odd quotes in <{tag}>");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed in the wrong order");
            continue;
        }
        let name = tag.split([' ', '/']).next().unwrap();
        if VOID.contains(&name) || tag.ends_with('/') {
            continue;
        }
        if name == "style" || name == "script" {
            let close = format!("</{name}>");
            rest = &rest[rest.find(&close).unwrap() + close.len()..];
            continue;
        }
        open.push(name);
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

#[test]
fn the_page_is_well_formed_and_self_contained() {
    for report in [sample(false), sample(true), Report::default()] {
        let html = render_html(&report).unwrap();
        assert_well_formed(&html);
        assert!(!html.contains("http:") && !html.contains("https:") && !html.contains("url("));
        assert!(!html.split_once("<script>").unwrap().0.contains("NaN"));
    }
}

#[test]
fn stand_in_data_is_announced_and_marks_every_score() {
    let real = render_html(&sample(false)).unwrap();
    assert!(!real.contains("stand-in") && !real.contains("STAND-IN"));

    let report = sample(true);
    let html = render_html(&report).unwrap();
    assert_eq!(html.matches("class=\"banner\"").count(), 1);
    assert!(html.contains("<title>[stand-in data] "));
    let tags = html.matches("class=\"tag\"").count();
    let cards_and_rows = 2 * report.test.len() + report.dev.len();
    assert!(
        tags >= cards_and_rows,
        "{tags} marks for {cards_and_rows} scores"
    );
    assert!(html.contains("81.2 % (stand-in), 95 % interval"));
    assert!(html.contains(">81.2 % (stand-in)</text>"));
}

#[test]
fn scores_that_are_not_clean_say_so() {
    let mut report = sample(false);
    report.test[0].leakage = Some(Leakage {
        trained: 3,
        same_text: 1,
        ..clean(996, 498)
    });
    let html = render_html(&report).unwrap();
    let said = "not clean: 3 trained on, 1 of a known text; 50.0 % on the 996 clean rows";
    assert!(html.contains(said));
    assert!(html.contains("<td>clean</td>") && html.contains("<td>not known</td>"));
}

#[test]
fn confidences_are_compared_with_what_was_right() {
    let mut report = sample(false);
    report.calibration = flowrun_lm::calibration::calibration([(0.95, true), (0.95, false)]);
    let html = render_html(&report).unwrap();
    assert!(html.contains("Expected calibration error 45.0 % over 2 answers"));
    assert!(html.contains("<td>90.0 to 100.0 %</td>"));
}

#[test]
fn stand_in_data_is_announced_when_only_the_name_says_so() {
    let report = Report {
        dataset: "stand-in".into(),
        stand_in: false,
        ..sample(false)
    };
    assert!(render_html(&report).unwrap().contains("class=\"banner\""));
}

#[test]
fn texts_are_escaped_wherever_they_come_from() {
    let mut report = sample(true);
    report.title = HOSTILE.into();
    report.about = Some(HOSTILE.into());
    report.data.labels[0] = HOSTILE.into();
    report.per_label[0].label = HOSTILE.into();
    report.notes.push(HOSTILE.into());
    report.steps[0].step = HOSTILE.into();
    report.dev[0].model = HOSTILE.into();
    report.test[0].model = HOSTILE.into();
    report.comparisons[0].a = HOSTILE.into();
    report.cost[0].model = HOSTILE.into();
    report.confusion.as_mut().unwrap().labels[0] = HOSTILE.into();
    report.oracle.as_mut().unwrap().model = HOSTILE.into();
    let html = render_html(&report).unwrap();
    assert_well_formed(&html);
    assert_eq!(
        html.matches("<script").count(),
        1,
        "only the page's own script"
    );
    assert!(!html.contains("alert('x')"));
    assert!(
        html.contains("{{ 7 * 7 }}"),
        "data is never read as a template"
    );
}

#[test]
fn the_policy_names_the_script_that_is_on_the_page() {
    let (_, script) = TEMPLATE.split_once("<script>").unwrap();
    let (script, _) = script.split_once("</script>").unwrap();
    let hash = base64(&sha2::Sha256::digest(script.as_bytes()));
    assert!(
        TEMPLATE.contains(&format!("'sha256-{hash}'")),
        "the page needs 'sha256-{hash}'"
    );
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| {
        let word = chunk
            .iter()
            .fold(0usize, |word, b| word << 8 | usize::from(*b));
        let word = word << (8 * (3 - chunk.len()));
        let letter = move |i: usize| match i <= chunk.len() {
            true => char::from(LETTERS[word >> (18 - 6 * i) & 63]),
            false => '=',
        };
        (0..4).map(letter).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

#[test]
fn the_headline_says_who_won_by_how_much_and_at_what_price() {
    let html = render_html(&sample(false)).unwrap();
    for line in [
        "The winner on the devset (epoch 5, optimised program) answers 812 of 1,000 test queries \
         right: 81.2 %, 95 % interval 79.2 to 83.0 %.",
        "That is 66.4 points above the base, 3.1 points below the oracle (Big-0B), 11.1 points \
         above the baseline (nearest centroid).",
        "1,000 queries cost $0.0123 instead of $0.63; a query takes 96 tokens and 41 ms.",
        "Highest on the devset: epoch 5, optimised program, 79.0 %.",
    ] {
        assert!(html.contains(line), "{line}");
    }
}

/// All values of an attribute on elements that start as given.
fn attributes(html: &str, element: &str, name: &str) -> Vec<f64> {
    let value = |tail: &str| {
        let (_, tail) = tail.split_once(&format!(" {name}=\"")).unwrap();
        tail.split_once('"').unwrap().0.parse().unwrap()
    };
    html.split(element).skip(1).map(value).collect()
}

#[test]
fn bar_heights_come_from_the_data() {
    let mut report = sample(false);
    for (score, accuracy) in report.dev.iter_mut().zip([0.0, 1.0, 0.5, 0.25]) {
        score.accuracy = accuracy;
    }
    report.dev.truncate(4);
    let drawn = chart::dev_bars(&report.dev, "");
    // The last of each class is its square in the legend.
    let plain = attributes(&drawn, "<rect class=\"plain\"", "height");
    let optimised = attributes(&drawn, "<rect class=\"optimised\"", "height");
    assert_eq!(plain, [0.0, 105.0, 12.0]);
    assert_eq!(optimised, [210.0, 52.5, 12.0]);
    assert!(drawn.contains(">25.0</text>") && drawn.contains(">epoch 0</text>"));
}

#[test]
fn right_wrong_and_unread_fill_a_test_bar_and_the_whisker_is_the_interval() {
    let drawn = chart::test_bars(&[test_score(Role::Base, "m", 148, 221)], "");
    let whole = 510.0;
    let width = |class: &str| attributes(&drawn, &format!("<rect class=\"{class}\""), "width")[0];
    for (class, share) in [("base", 0.148), ("wrong", 0.631), ("unread", 0.221)] {
        assert!((width(class) - whole * share).abs() < 0.06, "{class}");
    }
    let whisker = "<line class=\"whisker\"";
    let (x1, x2) = (
        attributes(&drawn, whisker, "x1")[0],
        attributes(&drawn, whisker, "x2")[0],
    );
    assert!((x1 - (4.0 + whole * 0.128)).abs() < 0.06 && (x2 - (4.0 + whole * 0.166)).abs() < 0.06);
    assert!(drawn.contains("m: 631 with a wrong label"));
}

#[test]
fn every_confusion_count_is_in_the_heat_map() {
    let confusion = sample(false).confusion.unwrap();
    let drawn = heat_map::heat_map(&confusion, "");
    assert_eq!(drawn.matches("<rect").count(), 25 * 26);
    for (gold, row) in confusion.matrix.iter().enumerate() {
        let total: u64 = row.iter().sum();
        for (column, count) in row.iter().enumerate() {
            let given = confusion
                .labels
                .get(column)
                .map_or("not read as a label", String::as_str);
            let tip = format!(
                "<title>{} read as {given}: {count} of {total}</",
                confusion.labels[gold]
            );
            assert!(drawn.contains(&tip), "{tip}");
        }
    }
}

#[test]
fn unread_answers_stand_apart_from_wrong_labels() {
    let html = render_html(&sample(false)).unwrap();
    let (wrong, unread) = html
        .split_once("<h3>Answer not read as a label (7)</h3>")
        .unwrap();
    assert!(wrong.contains("<h3>Wrong label (53), worst first</h3>"));
    assert!(wrong.contains("13 more are in"));
    assert!(!wrong.contains("no label 5") && unread.contains("no label 5"));
}

#[test]
fn labels_are_listed_hardest_first() {
    let html = render_html(&sample(false)).unwrap();
    let (_, table) = html.split_once("Label by label").unwrap();
    let table = table.replace("<wbr>", "");
    let at = |label: &str| {
        table
            .find(&format!("<td class=\"label\">{label}</td>"))
            .unwrap()
    };
    let mut order: Vec<_> = sample(false).per_label;
    order.sort_by(|a, b| a.f1.total_cmp(&b.f1));
    assert!(
        order
            .windows(2)
            .all(|pair| at(&pair[0].label) < at(&pair[1].label))
    );
}

/// The names and kinds of a value, without its figures; a list is told by its first entry.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), shape(v))).collect(),
        Value::Array(list) => list.iter().take(1).map(shape).collect(),
        Value::String(_) => json!("text"),
        Value::Number(n) if n.is_f64() => json!("share"),
        Value::Number(_) => json!("count"),
        Value::Bool(_) => json!("bool"),
        Value::Null => json!("none"),
    }
}

#[test]
fn the_shape_of_report_json_is_kept() {
    let score = |role: bool| {
        let mut score = json!({
            "model": "text", "program": "text", "n": "count", "correct": "count",
            "accuracy": "share", "parse_failures": "count", "low": "share", "high": "share",
            "leakage": "none",
        });
        if role {
            score["role"] = json!("text");
            score["leakage"] = json!({
                "known": "bool", "trained": "count", "selected": "count", "taught": "count", "same_text": "count",
                "clean_rows": "count", "clean_correct": "count",
            });
        }
        json!([score])
    };
    let expected = json!({
        "version": "count", "title": "text", "about": "text", "pipeline": "text",
        "generated_at": "text", "dataset": "text", "stand_in": "bool",
        "data": {
            "train_rows": "count", "test_rows": "count", "labels": ["text"],
            "labelled_rows": "count", "unlabelled_rows": "count", "source": "text",
        },
        "oracle": {
            "model": "text", "labelled": "count", "kept": "count",
            "dropped": { "label outside the set": "count" },
            "audited": "count", "audit_accuracy": "share", "kept_accuracy": "share",
        },
        "training": [{ "step": "count", "epoch": "count", "loss": "share" }],
        "dev": score(false),
        "test": score(true),
        "comparisons": [{
            "a": "text", "a_program": "text", "b": "text", "b_program": "text", "b_only": "count", "a_only": "count", "p_value": "share",
        }],
        "confusion": { "labels": ["text"], "matrix": [["count"]] },
        "per_label": [{
            "label": "text", "n": "count", "precision": "share", "recall": "share", "f1": "share",
        }],
        "calibration": "none",
        "errors": [{
            "id": "text", "text": "text", "gold": "text", "predicted": "text",
            "confidence": "share", "raw": "none",
        }],
        "steps": [{
            "step": "text", "kind": "text", "took_ms": "count", "tokens": "count",
            "cost_usd": "none", "status": "text",
        }],
        "cost": [{
            "model": "text", "program": "text", "queries": "count", "tokens_per_query": "share",
            "ms_per_query": "share", "usd_per_1000": "share",
        }],
        "notes": ["text"],
    });
    assert_eq!(
        shape(&serde_json::to_value(sample(true)).unwrap()),
        expected
    );
}

#[test]
fn report_json_uses_the_words_that_readers_rely_on_and_comes_back_equal() {
    let report = sample(true);
    let text = serde_json::to_string(&report).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["dataset"], "stand-in");
    assert_eq!(value["dev"][0]["program"], "plain");
    assert_eq!(value["dev"][1]["program"], "optimised");
    let roles: Vec<_> = value["test"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["role"])
        .collect();
    assert_eq!(roles, ["best", "base", "oracle", "baseline"]);
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
}

#[test]
fn programs_of_one_model_are_told_apart_where_their_cost_is_listed() {
    let mut report = sample(false);
    let times = |report: &Report, program: &str| {
        let name = svg::escape(&format!("{} ({program})", report.cost[0].model));
        render_html(report).unwrap().matches(&name).count()
    };
    let before = ["plain", "optimised"].map(|program| times(&report, program));
    let mut other = report.cost[0].clone();
    other.program = match other.program {
        ProgramKind::Plain => ProgramKind::Optimised,
        ProgramKind::Optimised => ProgramKind::Plain,
    };
    report.cost.push(other);
    let after = ["plain", "optimised"].map(|program| times(&report, program));
    assert_eq!(after, before.map(|times| times + 1));
}
