//! The page as a whole.

use sha2::Digest as _;

use super::{HOSTILE, clean, sample};
use crate::report::{Report, TEMPLATE, render_html, svg};
use crate::scores::{Leakage, ProgramKind};

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
