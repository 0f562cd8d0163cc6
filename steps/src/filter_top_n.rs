//! `filter-top-n`: keeps the rows of the most frequent labels.

use std::collections::{BTreeMap, BTreeSet};

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{JsonlReader, JsonlWriter, Row, write_json};
use crate::schema_of;

/// The step kind.
pub(crate) struct FilterTopN;

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
        let rows = |port: &str| -> Result<_, StepError> {
            let rows = JsonlReader::<Row>::open(&ctx.input(port)?.path)?;
            Ok(rows.map(move |row| {
                let mut row = row?;
                if params.normalise {
                    row.label = row.label.take().map(|l| normalise(&l));
                }
                Ok::<_, StepError>(row)
            }))
        };
        let labels = top_labels(rows("train")?, params.n)?;
        let kept: BTreeSet<&str> = labels.iter().map(String::as_str).collect();
        let keep = |row: &Row| row.label.as_deref().is_some_and(|l| kept.contains(l));
        let mut train = JsonlWriter::create(&ctx.output("train"))?;
        for row in rows("train")? {
            let row = row?;
            let full = params.max_train.is_some_and(|max| train.written() >= max);
            if full {
                break;
            }
            if row.label.is_none() || keep(&row) {
                train.write(&row)?;
            }
        }
        let mut test = JsonlWriter::create(&ctx.output("test"))?;
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for row in rows("test")? {
            let row = row?;
            if !keep(&row) {
                continue;
            }
            let n = seen
                .entry(row.label.clone().unwrap_or_default())
                .or_default();
            *n += 1;
            if params.max_test_per_label.is_none_or(|max| *n <= max) {
                test.write(&row)?;
            }
        }
        write_json(&ctx.output("labels"), &labels)?;
        Ok(StepOutcome::default()
            .metric("train_rows", train.finish()?)
            .metric("test_rows", test.finish()?)
            .metric("labels", labels.len()))
    }
}

fn normalise(label: &str) -> String {
    label.to_lowercase().replace('?', "")
}

/// The `n` most frequent labels, by count then name.
fn top_labels(
    rows: impl Iterator<Item = Result<Row, StepError>>,
    n: usize,
) -> Result<Vec<String>, StepError> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for row in rows {
        if let Some(label) = row?.label {
            *counts.entry(label).or_default() += 1;
        }
    }
    if counts.len() < n {
        return Err(StepError::invalid(format!(
            "the training rows have {} labels, {n} were asked for",
            counts.len()
        ))
        .help(format!("set `n` to {} or less", counts.len())));
    }
    let mut order: Vec<(String, usize)> = counts.into_iter().collect();
    order.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    Ok(order.into_iter().take(n).map(|(label, _)| label).collect())
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
        let rows = || {
            let labels = ["b", "a", "c", "c"].into_iter().enumerate();
            labels.map(|(i, label)| Ok(row(i, label)))
        };
        assert_eq!(top_labels(rows(), 2).unwrap(), ["c", "a"]);
        assert!(
            top_labels(rows(), 4)
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
