//! The report's bar charts and loss curve as inline SVG.
//!
//! Knows nothing of where the numbers come from; colours are classes that the page's style sheet
//! gives a light and a dark value. Invariant: every coordinate is finite, and an accuracy axis
//! always runs from 0 to 100 %.

use std::fmt::Write as _;

use super::data::{LossPoint, Score};
use super::svg::{clip, line, open, ratio, rect, share, text};
use super::words::{percent, plural, short_name, thousands};
use crate::scores::ProgramKind;

const WIDTH: f64 = 520.0;
/// More points than this cannot be told apart at the width of the chart.
const MAX_LOSS_POINTS: usize = 400;

/// Grouped bars, one group per model in the order given, plain beside optimised.
pub(super) fn dev_bars(scores: &[Score], mark: &str) -> String {
    let mut models: Vec<&str> = Vec::new();
    for score in scores {
        if !models.contains(&score.model.as_str()) {
            models.push(&score.model);
        }
    }
    let (left, top, height) = (38.0, 14.0, 210.0);
    let group = ((WIDTH - left - 6.0) / models.len().max(1) as f64).clamp(66.0, 130.0);
    let width = (left + 6.0 + group * models.len() as f64).max(WIDTH);
    let y_of = |value: f64| top + height * (1.0 - share(value));
    let mut out = String::new();
    open(
        &mut out,
        width,
        282.0,
        &format!("Devset accuracy by model{mark}"),
        width * 0.66,
    );
    for quarter in 0..=4 {
        let value = f64::from(quarter) / 4.0;
        line(
            &mut out,
            "grid",
            (left, y_of(value)),
            (width - 6.0, y_of(value)),
        );
        text(
            &mut out,
            "tick end",
            (left - 5.0, y_of(value) + 4.0),
            &format!("{}%", quarter * 25),
        );
    }
    let bar = ((group - 14.0) / 2.0).min(36.0);
    for (index, model) in models.iter().enumerate() {
        let middle = left + group * (index as f64 + 0.5);
        for score in scores.iter().filter(|score| score.model == *model) {
            let (class, x) = match score.program {
                ProgramKind::Plain => ("plain", middle - bar - 1.0),
                ProgramKind::Optimised => ("optimised", middle + 1.0),
            };
            let y = y_of(score.accuracy);
            let tip = format!(
                "{model}, {}: {} ({} of {} right, {}){mark}",
                score.program.as_str(),
                percent(score.accuracy),
                thousands(score.correct),
                thousands(score.n),
                plural(score.parse_failures, "answer not read", "answers not read"),
            );
            rect(&mut out, class, (x, y), (bar, top + height - y), &tip);
            let label = format!("{:.1}", share(score.accuracy) * 100.0);
            text(&mut out, "value mid", (x + bar / 2.0, y - 4.0), &label);
        }
        let name = clip(&short_name(model, &models), (group / 6.4) as usize);
        text(&mut out, "tick mid", (middle, top + height + 17.0), &name);
    }
    let y = top + height + 38.0;
    rect(&mut out, "plain", (left, y), (12.0, 12.0), "plain program");
    text(&mut out, "tick", (left + 18.0, y + 10.0), "plain program");
    rect(
        &mut out,
        "optimised",
        (left + 120.0, y),
        (12.0, 12.0),
        "optimised program",
    );
    text(
        &mut out,
        "tick",
        (left + 138.0, y + 10.0),
        "optimised program",
    );
    if !mark.is_empty() {
        text(
            &mut out,
            "mark end",
            (width - 6.0, y + 10.0),
            "stand-in data",
        );
    }
    out.push_str("</svg>");
    out
}

/// One bar per tested model: right, wrong and unread answers, and the 95 % interval as a whisker.
pub(super) fn test_bars(scores: &[Score], mark: &str) -> String {
    let models: Vec<&str> = scores.iter().map(|score| score.model.as_str()).collect();
    let (row, left, right) = (46.0, 4.0, 6.0);
    let span = WIDTH - left - right;
    let bottom = row * scores.len() as f64 + 8.0;
    let x_of = |value: f64| left + span * share(value);
    let mut out = String::new();
    open(
        &mut out,
        WIDTH,
        bottom + 50.0,
        &format!("Test accuracy by model{mark}"),
        0.0,
    );
    for quarter in 0..=4 {
        let value = f64::from(quarter) / 4.0;
        line(&mut out, "grid", (x_of(value), 6.0), (x_of(value), bottom));
        let anchor = ["tick", "tick mid", "tick mid", "tick mid", "tick end"][quarter as usize];
        text(
            &mut out,
            anchor,
            (x_of(value), bottom + 14.0),
            &format!("{}%", quarter * 25),
        );
    }
    for (index, score) in scores.iter().enumerate() {
        let y = row * index as f64 + 18.0;
        let name = clip(&short_name(&score.model, &models), 34);
        let name = format!("{}: {name}, {}", score.role_name(), score.program.as_str());
        text(&mut out, "name halo", (left, y), &name);
        let figure = format!("{}{mark}", percent(score.accuracy));
        text(&mut out, "name end halo", (WIDTH - right, y), &figure);
        let unread = ratio(score.parse_failures, score.n);
        let parts = [
            (
                score.role_name(),
                0.0,
                score.accuracy,
                score.correct,
                "right",
            ),
            (
                "wrong",
                score.accuracy,
                1.0 - score.accuracy - unread,
                score.n.saturating_sub(score.correct + score.parse_failures),
                "with a wrong label",
            ),
            (
                "unread",
                1.0 - unread,
                unread,
                score.parse_failures,
                "not read as a label",
            ),
        ];
        for (class, from, size, count, what) in parts {
            if share(size) > 0.0 {
                let tip = format!("{}: {} {what}", score.model, thousands(count));
                rect(
                    &mut out,
                    class,
                    (x_of(from), y + 6.0),
                    (span * share(size), 14.0),
                    &tip,
                );
            }
        }
        let (low, high, middle) = (x_of(score.low), x_of(score.high), y + 13.0);
        line(&mut out, "whisker", (low, middle), (high, middle));
        line(
            &mut out,
            "whisker",
            (low, middle - 5.0),
            (low, middle + 5.0),
        );
        line(
            &mut out,
            "whisker",
            (high, middle - 5.0),
            (high, middle + 5.0),
        );
    }
    let y = bottom + 28.0;
    let legend = [("best", 4.0, "right"), ("wrong", 70.0, "wrong label")];
    for (class, x, words) in legend
        .into_iter()
        .chain([("unread", 172.0, "answer not read")])
    {
        rect(&mut out, class, (x, y), (12.0, 12.0), words);
        text(&mut out, "tick", (x + 17.0, y + 10.0), words);
    }
    line(&mut out, "whisker", (300.0, y + 6.0), (322.0, y + 6.0));
    text(&mut out, "tick", (328.0, y + 10.0), "95 % interval");
    out.push_str("</svg>");
    out
}

/// The training loss over optimizer steps, with a dotted line where an epoch begins, and the loss on
/// the chats to validate on as squares.
pub(super) fn loss_curve(points: &[LossPoint]) -> String {
    let points: Vec<LossPoint> = points
        .iter()
        .copied()
        .filter(|p| p.loss.is_finite())
        .collect();
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return String::new();
    };
    let (left, top, height) = (38.0, 22.0, 200.0);
    let span = WIDTH - left - 8.0;
    let steps = last.step.saturating_sub(first.step).max(1) as f64;
    let validation = |point: &LossPoint| point.validation.filter(|loss| loss.is_finite());
    let validations = points.iter().filter_map(validation);
    let losses = points.iter().map(|point| point.loss);
    let highest = losses.chain(validations.clone()).fold(0.0, f64::max);
    let tick = nice_tick(highest / 4.0);
    let ceiling = (highest / tick).ceil().max(1.0) * tick;
    let x_of = |step: u64| left + span * step.saturating_sub(first.step) as f64 / steps;
    let y_of = |loss: f64| top + height * (1.0 - share(loss / ceiling));
    let mut out = String::new();
    open(&mut out, WIDTH, 262.0, "Training loss by step", 0.0);
    let decimals = if tick >= 1.0 {
        0
    } else {
        (-tick.log10()).ceil().clamp(0.0, 6.0) as usize
    };
    let mut value = 0.0;
    while value <= ceiling + tick / 2.0 {
        line(
            &mut out,
            "grid",
            (left, y_of(value)),
            (WIDTH - 8.0, y_of(value)),
        );
        text(
            &mut out,
            "tick end",
            (left - 5.0, y_of(value) + 4.0),
            &format!("{value:.decimals$}"),
        );
        value += tick;
    }
    let mut epoch = None;
    let mut labelled_to = f64::MIN;
    for point in &points {
        if epoch.replace(point.epoch) != Some(point.epoch) {
            let x = x_of(point.step);
            line(&mut out, "epoch", (x, top - 4.0), (x, top + height));
            if x >= labelled_to {
                text(
                    &mut out,
                    "tick",
                    (x + 3.0, top - 8.0),
                    &format!("epoch {}", point.epoch + 1),
                );
                labelled_to = x + 56.0;
            }
        }
    }
    out.push_str("<polyline class=\"curve\" points=\"");
    let stride = points.len().div_ceil(MAX_LOSS_POINTS);
    for chunk in points.chunks(stride) {
        let loss = chunk.iter().map(|p| p.loss).sum::<f64>() / chunk.len() as f64;
        let step = chunk.last().map_or(0, |p| p.step);
        let _ = write!(out, "{:.1},{:.1} ", x_of(step), y_of(loss));
    }
    out.push_str("\"/>");
    for point in &points {
        if let Some(loss) = validation(point) {
            let at = (x_of(point.step) - 3.0, y_of(loss) - 3.0);
            let epoch = point.epoch + 1;
            let tip = format!("{loss:.3} on the chats to validate on, after epoch {epoch}");
            rect(&mut out, "best", at, (6.0, 6.0), &tip);
        }
    }
    let unit = match validations.clone().next() {
        None => "nats per token",
        Some(_) => "nats per token; squares: chats to validate on",
    };
    let y = top + height + 17.0;
    text(
        &mut out,
        "tick",
        (left, y),
        &format!("step {}", thousands(first.step)),
    );
    text(
        &mut out,
        "tick end",
        (WIDTH - 8.0, y),
        &format!("step {}", thousands(last.step)),
    );
    text(&mut out, "tick mid", (left + span / 2.0, y), unit);
    out.push_str("</svg>");
    out
}

/// The step of an axis: 1, 2 or 5 times a power of ten, at least `rough`.
fn nice_tick(rough: f64) -> f64 {
    let rough = rough.max(1e-6);
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|t| *t >= rough)
        .unwrap_or(rough)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert!((nice_tick(0.6) - 1.0).abs() < 1e-9);
        assert!((nice_tick(0.13) - 0.2).abs() < 1e-9);
        assert!((nice_tick(31.0) - 50.0).abs() < 1e-9);
        assert!(nice_tick(0.0) > 0.0);
    }

    #[test]
    fn not_a_number_never_reaches_a_coordinate() {
        let dev = Score {
            model: "m".into(),
            accuracy: f64::NAN,
            n: 0,
            ..Score::default()
        };
        let test = Score {
            accuracy: f64::NAN,
            low: f64::INFINITY,
            ..Score::default()
        };
        let loss = LossPoint {
            step: 1,
            epoch: 0,
            loss: f64::NAN,
            validation: None,
        };
        let drawn = dev_bars(&[dev], "") + &test_bars(&[test], "") + &loss_curve(&[loss]);
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
    }

    #[test]
    fn epochs_are_counted_from_1_as_their_checkpoints_are() {
        let points = [0, 1].map(|epoch| LossPoint {
            step: u64::from(epoch) + 1,
            epoch,
            loss: 1.0,
            validation: None,
        });
        let drawn = loss_curve(&points);
        let named = |epoch: u32| drawn.contains(&format!(">epoch {epoch}<"));
        assert!(named(1) && !named(0), "{drawn}");
    }

    #[test]
    fn the_loss_on_other_chats_is_a_square_for_each_epoch() {
        let point = |step: u64, validation| LossPoint {
            step,
            epoch: (step as u32 - 1) / 2,
            loss: 1.0,
            validation,
        };
        let points = [
            point(1, None),
            point(2, Some(3.0)),
            point(3, None),
            point(4, Some(f64::NAN)),
        ];
        let drawn = loss_curve(&points);
        assert_eq!(drawn.matches("<rect class=\"best\"").count(), 1);
        assert!(drawn.contains("3.000 on the chats to validate on, after epoch 1"));
        // The axis reaches up to it.
        assert!(
            drawn.contains(">3<") && drawn.contains("; squares"),
            "{drawn}"
        );
        assert!(!loss_curve(&points[..1]).contains("squares"));
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_end() {
        let points: Vec<_> = (1..=5000)
            .map(|step| LossPoint {
                step,
                epoch: 0,
                loss: 1.0,
                validation: None,
            })
            .collect();
        let drawn = loss_curve(&points);
        assert!(drawn.len() < 12_000, "{}", drawn.len());
        assert!(drawn.contains("step 5,000") && drawn.contains("512.0,"));
    }
}
