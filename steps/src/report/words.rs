//! Figures and names as a reader sees them.
//!
//! Knows no HTML. Invariant: what is not a finite number is shown as a dash, never as a figure.

use std::collections::BTreeSet;

/// A share as a percentage with one decimal: `0.893` is `89.3 %`.
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() {
        format!("{:.1} %", share * 100.0)
    } else {
        "–".to_owned()
    }
}

/// A count with thousands separators: `4171` is `4,171`.
pub(super) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 row`, `2 rows`.
pub(super) fn plural(count: u64, one: &str, many: &str) -> String {
    format!(
        "{} {}",
        thousands(count),
        if count == 1 { one } else { many }
    )
}

/// Wall time in the unit that fits: `340 ms`, `12.5 s`, `3 min 05 s`, `1 h 02 min`.
pub(super) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", (ms / 100) as f64 / 10.0),
        60_000..3_600_000 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// US dollars, with enough decimals that a small sum is not shown as nothing.
pub fn dollars(sum: f64) -> String {
    match sum {
        s if !s.is_finite() => "–".to_owned(),
        0.0 => "$0.00".to_owned(),
        s if s.abs() < 0.0001 => "< $0.0001".to_owned(),
        s if s.abs() < 0.1 => format!("${s:.4}"),
        s => {
            let cents = (s * 100.0).round() as u64;
            format!("${}.{:02}", thousands(cents / 100), cents % 100)
        }
    }
}

/// A p-value: small ones are not worth their digits.
pub(super) fn p_value(p: f64) -> String {
    match p {
        p if !p.is_finite() => "–".to_owned(),
        p if p < 0.001 => "< 0.001".to_owned(),
        p => format!("{p:.3}"),
    }
}

/// The difference of two shares in percentage points, as words: `12.3 points above`.
pub(super) fn points_from(share: f64, other: f64) -> String {
    let points = (share - other) * 100.0;
    match points {
        p if !p.is_finite() => "not comparable with".to_owned(),
        p if p.abs() < 0.05 => "level with".to_owned(),
        p if p > 0.0 => format!("{p:.1} points above"),
        p => format!("{:.1} points below", -p),
    }
}

/// The base of a checkpoint's model id, and its epoch and steps where the name says them.
fn parts(model: &str) -> Option<(&str, Option<(&str, &str)>)> {
    let (base, checkpoint) = model.rsplit_once(':')?;
    let trained = checkpoint
        .strip_prefix("epochs-")
        .and_then(|rest| rest.split_once("-total-trained-steps-"));
    Some((base, trained))
}

/// What to call a model where there is little room: a checkpoint by its epoch, or by its steps
/// where `all` has several of one epoch; a base by that word when its checkpoints are among `all`,
/// anything else by the last part of its name.
pub(super) fn short_name(model: &str, all: &[&str]) -> String {
    if let Some((base, checkpoint)) = model.rsplit_once(':') {
        if let Some((_, Some((epoch, step)))) = parts(model) {
            let others = all.iter().filter_map(|other| parts(other));
            let trained: BTreeSet<(&str, &str)> = others
                .filter(|(of, _)| *of == base)
                .filter_map(|(_, trained)| trained)
                .collect();
            let epochs: BTreeSet<&str> = trained.iter().map(|(epoch, _)| *epoch).collect();
            return match epochs.len() < trained.len() {
                true => format!("step {step}"),
                false => format!("epoch {epoch}"),
            };
        }
        if all.contains(&base) {
            return checkpoint.to_owned();
        }
    }
    let is_base = |other: &&str| {
        other
            .strip_prefix(model)
            .is_some_and(|rest| rest.starts_with(':'))
    };
    if all.iter().any(is_base) {
        return "base".to_owned();
    }
    model.rsplit('/').next().unwrap_or(model).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(percent(0.8934), "89.3 %");
        assert_eq!(percent(f64::NAN), "–");
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [340, 12_540, 185_000, 3_720_000].map(duration),
            ["340 ms", "12.5 s", "3 min 05 s", "1 h 02 min"]
        );
        assert_eq!(
            [0.0, 0.00001, 0.0312, 1234.567].map(dollars),
            ["$0.00", "< $0.0001", "$0.0312", "$1,234.57"]
        );
        assert_eq!([0.0000001, 0.0456].map(p_value), ["< 0.001", "0.046"]);
        assert_eq!(plural(1, "row", "rows"), "1 row");
    }

    #[test]
    fn differences_are_named_by_their_side() {
        assert_eq!(points_from(0.9, 0.5), "40.0 points above");
        assert_eq!(points_from(0.5, 0.9), "40.0 points below");
        assert_eq!(points_from(0.5, 0.5), "level with");
    }

    #[test]
    fn names_are_shortened_but_told_apart() {
        let all = [
            "org/Small-1B",
            "org/Small-1B:epochs-4-total-trained-steps-160",
        ];
        assert_eq!(short_name(all[0], &all), "base");
        assert_eq!(short_name(all[1], &all), "epoch 4");
        assert_eq!(short_name("org/Big-70B", &all), "Big-70B");
        assert_eq!(
            short_name("embedding + logistic", &all),
            "embedding + logistic"
        );
        assert_eq!(short_name("org/Small-1B:final", &all), "final");
        assert_eq!(short_name("llama3:70b", &all), "llama3:70b");
        let of = |epoch, step| format!("s:epochs-{epoch}-total-trained-steps-{step}");
        let by_steps = [of(1, 4), of(1, 8), of(2, 12)];
        let by_steps: Vec<&str> = by_steps.iter().map(String::as_str).collect();
        let short = |model: &str| short_name(model, &by_steps);
        assert_eq!(
            [short(by_steps[0]), short(by_steps[2])],
            ["step 4", "step 12"]
        );
        // Twice the same, as with two programs, is one.
        let twice = [by_steps[0], by_steps[0], by_steps[2], all[0], all[1]];
        assert_eq!(short_name(by_steps[0], &twice), "epoch 1");
    }
}
