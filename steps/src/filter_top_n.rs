//! `filter-top-n`: keeps the rows of the most frequent labels.

use std::collections::{BTreeMap, BTreeSet};

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{Row, read_rows, write_json, write_rows};
use crate::schema_of;

/// The step kind.
pub struct FilterTopN;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// How many labels to keep.
    #[schemars(range(min = 1))]
    n: usize,
    /// Lower-case labels and drop `?` first (`reverted_card_payment?`).
    #[serde(default = "yes")]
    normalise: bool,
    /// Keep only the first so many training rows after filtering; all when absent.
    #[serde(default)]
    max_train: Option<usize>,
    /// Keep only the first so many test rows of each label; all when absent.
    #[serde(default)]
    max_test_per_label: Option<usize>,
}

fn yes() -> bool {
    true
}

impl Step for FilterTopN {
    fn kind(&self) -> &'static str {
        "filter-top-n"
    }
    fn version(&self) -> u32 {
        2
    }
    fn about(&self) -> &'static str {
        "Keeps the rows of the n most frequent training labels (ties by name), and training rows without a label."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("train", "examples", "Labelled training rows."),
            Port::new("test", "examples", "Labelled test rows."),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new(
                "train",
                "examples",
                "Training rows of the kept labels or without one, in order.",
            ),
            Port::new(
                "test",
                "examples",
                "Test rows of the kept labels, in order.",
            ),
            Port::new("labels", "labels", "The kept labels, most frequent first."),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let mut train = read_rows(&ctx.input("train")?.path)?;
        let mut test = read_rows(&ctx.input("test")?.path)?;
        if params.normalise {
            for row in train.iter_mut().chain(test.iter_mut()) {
                row.label = row.label.take().map(|l| normalise(&l));
            }
        }
        let labels = top_labels(&train, params.n)?;
        let kept: BTreeSet<&str> = labels.iter().map(String::as_str).collect();
        let keep = |row: &Row| row.label.as_deref().is_some_and(|l| kept.contains(l));
        train.retain(|row| row.label.is_none() || keep(row));
        test.retain(keep);
        if let Some(max) = params.max_train {
            train.truncate(max);
        }
        if let Some(max) = params.max_test_per_label {
            let mut seen: BTreeMap<String, usize> = BTreeMap::new();
            test.retain(|row| {
                let n = seen
                    .entry(row.label.clone().unwrap_or_default())
                    .or_default();
                *n += 1;
                *n <= max
            });
        }
        write_rows(&ctx.output("train"), &train)?;
        write_rows(&ctx.output("test"), &test)?;
        write_json(&ctx.output("labels"), &labels)?;
        Ok(StepOutcome::default()
            .metric("train_rows", train.len())
            .metric("test_rows", test.len())
            .metric("labels", labels.len()))
    }
}

fn normalise(label: &str) -> String {
    label.to_lowercase().replace('?', "")
}

/// The `n` most frequent labels, by count then name.
fn top_labels(rows: &[Row], n: usize) -> Result<Vec<String>, StepError> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for label in rows.iter().filter_map(|r| r.label.as_deref()) {
        *counts.entry(label).or_default() += 1;
    }
    if counts.len() < n {
        return Err(StepError::invalid(format!(
            "the training rows have {} labels, {n} were asked for",
            counts.len()
        ))
        .help(format!("set `n` to {} or less", counts.len())));
    }
    let mut order: Vec<(&str, usize)> = counts.into_iter().collect();
    order.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    Ok(order
        .into_iter()
        .take(n)
        .map(|(label, _)| label.to_owned())
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn row(i: usize, label: &str) -> Row {
        Row::new(format!("d:train:{i}"), "t".into(), Some(label.into()))
    }

    #[test]
    fn ties_go_by_name() {
        let rows: Vec<Row> = ["b", "a", "c", "c"]
            .iter()
            .enumerate()
            .map(|(i, l)| row(i, l))
            .collect();
        assert_eq!(top_labels(&rows, 2).unwrap(), ["c", "a"]);
        assert!(
            top_labels(&rows, 4)
                .unwrap_err()
                .message
                .contains("3 labels")
        );
    }

    #[test]
    fn labels_are_normalised() {
        assert_eq!(normalise("Reverted_card_payment?"), "reverted_card_payment");
    }
}
