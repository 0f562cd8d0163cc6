//! `holdout`: sets rows aside for choosing between models, before any training.

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{Row, read_rows, write_rows};
use crate::schema_of;

/// The step kind.
pub(crate) struct Holdout;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Rows of the devset: the first ones.
    dev: usize,
    /// Rows of the optimizer's valset: the next ones.
    val: usize,
    /// Keep dev and val rows out of `finetune`. `false` trains on them too, as
    /// the notebook does: dev scores are then training-set scores.
    #[serde(default = "yes")]
    disjoint: bool,
    /// Keep only training rows whose teacher was at least this sure.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    min_confidence: f64,
    /// Train on at most this many rows (the surest of each label, evenly over
    /// the labels); all when absent.
    #[serde(default)]
    max_train: Option<usize>,
}

fn yes() -> bool {
    true
}

impl Step for Holdout {
    fn kind(&self) -> &'static str {
        "holdout"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Sets aside the devset and the optimizer's sets from labelled rows, before training."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new(
            "rows",
            "examples",
            "Rows labelled by the teacher.",
        )]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("dev", "examples", "The devset: scores every checkpoint."),
            Port::new(
                "val",
                "examples",
                "The optimizer's valset: scores candidate programs.",
            ),
            Port::new(
                "train",
                "examples",
                "The optimizer's trainset: where demos come from.",
            ),
            Port::new("finetune", "examples", "The rows to fine-tune on."),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let rows = read_rows(&ctx.input("rows")?.path)?;
        let held = params.dev + params.val;
        if rows.len() <= held {
            return Err(StepError::invalid(format!(
                "`dev` + `val` is {held} but there are only {} labelled rows",
                rows.len()
            ))
            .help("lower `dev` or `val`, or label more rows"));
        }
        let (dev, rest) = rows.split_at(params.dev);
        let (val, train) = rest.split_at(params.val);
        let pool = if params.disjoint { train } else { &rows };
        let finetune = training_rows(pool, params.min_confidence, params.max_train);
        write_rows(&ctx.output("dev"), dev)?;
        write_rows(&ctx.output("val"), val)?;
        write_rows(&ctx.output("train"), train)?;
        write_rows(&ctx.output("finetune"), finetune.iter().copied())?;
        Ok(StepOutcome::default()
            .metric("dev", dev.len())
            .metric("val", val.len())
            .metric("train", train.len())
            .metric("finetune", finetune.len()))
    }
}

/// Rows that are sure enough, at most `max` of them: each label gives its surest
/// in turn. Input order is kept in the result.
fn training_rows(pool: &[Row], min_confidence: f64, max: Option<usize>) -> Vec<&Row> {
    let sure = |r: &Row| r.confidence.unwrap_or(1.0);
    let mut kept: Vec<usize> = (0..pool.len())
        .filter(|&i| sure(&pool[i]) >= min_confidence)
        .collect();
    if let Some(max) = max.filter(|&m| m < kept.len()) {
        kept.sort_by(|&a, &b| sure(&pool[b]).total_cmp(&sure(&pool[a])).then(a.cmp(&b)));
        let mut rank = std::collections::BTreeMap::<Option<&str>, usize>::new();
        let mut ranked: Vec<(usize, usize)> = kept
            .iter()
            .map(|&i| {
                let place = rank.entry(pool[i].label.as_deref()).or_default();
                *place += 1;
                (*place, i)
            })
            .collect();
        ranked.sort_unstable();
        kept = ranked.into_iter().take(max).map(|(_, i)| i).collect();
        kept.sort_unstable();
    }
    kept.into_iter().map(|i| &pool[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(i: usize, label: &str, confidence: f64) -> Row {
        let mut row = Row::new(format!("d:train:{i}"), "t".into(), Some(label.into()));
        row.confidence = Some(confidence);
        row
    }

    #[test]
    fn the_surest_rows_of_each_label_are_kept_in_order() {
        let rows = [
            row(0, "a", 0.5),
            row(1, "a", 0.9),
            row(2, "a", 0.8),
            row(3, "b", 0.6),
            row(4, "b", 0.1),
        ];
        let ids = |v: Vec<&Row>| v.iter().map(|r| r.id.clone()).collect::<Vec<_>>();
        assert_eq!(
            ids(training_rows(&rows, 0.0, Some(3))),
            ["d:train:1", "d:train:2", "d:train:3"]
        );
        assert_eq!(
            ids(training_rows(&rows, 0.6, None)),
            ["d:train:1", "d:train:2", "d:train:3"]
        );
    }
}
