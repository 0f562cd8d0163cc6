//! Figures in drawings.

use super::{sample, test_score};
use crate::report::{chart, heat_map};
use crate::scores::Role;

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
