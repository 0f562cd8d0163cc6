//! What trackers make of a step: its name as theirs, and the points of its curves.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// Bytes of a curve that is read.
const CURVE: u64 = 64 << 20;

/// A step's name, and its item.
pub(super) fn parts(step: &str) -> (&str, Option<&str>) {
    match step.split_once('[') {
        Some((name, item)) => (name, Some(item.strip_suffix(']').unwrap_or(item))),
        None => (step, None),
    }
}

/// A name that MLflow takes, and TensorBoard groups: `evaluate[epoch 2]` becomes
/// `evaluate/epoch 2`. Letters, digits, `_`,
/// `-`, `.`, spaces and `/`; a path without empty or dotted parts.
pub(super) fn valid(name: &str) -> String {
    let (name, item) = parts(name);
    let whole = match item {
        Some(item) => format!("{name}/{}", item.replace('/', "_")),
        None => name.to_owned(),
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-. /".contains(c);
    let whole: String = whole
        .chars()
        .map(|c| if allowed(c) { c } else { '_' })
        .collect();
    let segments = whole.split('/').map(|part| match part {
        "" | "." | ".." => "_",
        part => part,
    });
    segments.collect::<Vec<_>>().join("/")
}

/// The points of a curve: name, value, step.
pub(super) fn curve(file: &Path) -> Vec<(String, f64, u64)> {
    let small = std::fs::metadata(file).is_ok_and(|meta| meta.len() <= CURVE);
    let bytes = match small {
        true => std::fs::read(file).unwrap_or_default(),
        false => Vec::new(),
    };
    let points: Vec<BTreeMap<String, Value>> = serde_json::from_slice(&bytes).unwrap_or_default();
    let mut all = Vec::new();
    for point in points {
        let Some(step) = point.get("step").and_then(Value::as_u64) else {
            continue;
        };
        let values = point.iter().filter(|(name, _)| *name != "step");
        all.extend(values.filter_map(|(name, value)| Some((valid(name), value.as_f64()?, step))));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_mlflow_takes() {
        for (name, expected) in [
            ("load", "load"),
            ("evaluate[epoch-2]", "evaluate/epoch-2"),
            ("frequent/rank", "frequent/rank"),
            ("a[x/../y: ü]", "a/x_.._y_ _"),
            ("../a//b", "_/a/_/b"),
        ] {
            assert_eq!(valid(name), expected);
        }
    }

    #[test]
    fn a_curve_has_a_point_for_each_number_of_a_step() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("loss");
        std::fs::write(
            &file,
            r#"[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "x": "y"}, {}]"#,
        )?;
        let expected = [("loss".to_owned(), 2.5, 1), ("loss".to_owned(), 1.5, 2)];
        assert_eq!(curve(&file), expected);
        std::fs::write(&file, "nonsense")?;
        assert!(curve(&file).is_empty() && curve(folder.path()).is_empty());
        Ok(())
    }
}
