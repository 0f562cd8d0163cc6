//! `split`: keeps a few gold labels and deletes the others.

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::python_random::PythonRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{Row, read_rows, write_jsonl, write_rows};
use crate::schema_of;

/// The step kind.
pub struct Split;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// How many rows keep their gold label: the last ones after shuffling. All that have one
    /// when left out.
    #[serde(default)]
    labelled: Option<usize>,
    /// Seed of the shuffle; the order is that of Python's `random.Random(seed).shuffle`.
    #[serde(default)]
    seed: i64,
}

/// A gold label kept aside: only an audit may read it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gold {
    /// Row id.
    pub id: String,
    /// Gold label.
    pub label: String,
}

impl Step for Split {
    fn kind(&self) -> &'static str {
        "split"
    }
    fn version(&self) -> u32 {
        4
    }
    fn about(&self) -> &'static str {
        "Shuffles rows; the last `labelled` with a label keep it, from the rest it is deleted."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new("rows", "examples", "Labelled rows.")]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("labelled", "examples", "Rows with their gold label."),
            Port::new(
                "unlabelled",
                "examples",
                "Rows without a label, in shuffled order.",
            ),
            Port::new(
                "gold",
                "gold",
                "The deleted labels, to audit the teacher with.",
            ),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let mut rows = read_rows(&ctx.input("rows")?.path)?;
        let there = rows.iter().filter(|row| row.label.is_some()).count();
        let wanted = params.labelled.unwrap_or(there);
        if wanted > there {
            return Err(StepError::invalid(format!(
                "`labelled` is {wanted} but there are only {there} rows with a label"
            )));
        }
        PythonRandom::new(params.seed).shuffle(&mut rows);
        let (labelled, mut rows) = last_labelled(rows, there - wanted);
        let gold: Vec<Gold> = rows.iter_mut().filter_map(hide_label).collect();
        write_rows(&ctx.output("labelled"), &labelled)?;
        write_rows(&ctx.output("unlabelled"), &rows)?;
        write_jsonl(&ctx.output("gold"), &gold)?;
        Ok(StepOutcome::default()
            .metric("labelled", labelled.len())
            .metric("unlabelled", rows.len()))
    }
}

/// The rows that have a label, less the first `skip` of them; and the others.
fn last_labelled(rows: Vec<Row>, skip: usize) -> (Vec<Row>, Vec<Row>) {
    let mut seen = 0;
    rows.into_iter().partition(|row| {
        let has_label = row.label.is_some();
        seen += usize::from(has_label);
        has_label && seen > skip
    })
}

/// Takes the label, and all but the text with it: a teacher's spelling, its reason or further columns
/// may say the label once more.
fn hide_label(row: &mut Row) -> Option<Gold> {
    let bare = Row::new(row.id.clone(), row.text.clone(), None);
    let Row { id, label, .. } = std::mem::replace(row, bare);
    label.map(|label| Gold { id, label })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rows_with_a_label_keep_it() {
        let label = |i: usize| (i % 3 == 1 || i % 3 == 2).then(|| "l".to_owned());
        let rows = (0..6).map(|i| Row::new(i.to_string(), "t".into(), label(i)));
        let (labelled, others) = last_labelled(rows.collect(), 2);
        let ids = |rows: &[Row]| rows.iter().map(|r| r.id.clone()).collect::<String>();
        assert_eq!((ids(&labelled), ids(&others)), ("45".into(), "0123".into()));
    }

    #[test]
    fn nothing_that_spells_the_label_stays() {
        let mut row = Row::new("1".into(), "t".into(), Some("pin".into()));
        row.raw_label = Some("PIN".into());
        row.sanitised_label = Some("pin".into());
        row.reasoning = Some("it asks for a pin".into());
        row.confidence = Some(0.9);
        row.extra.insert("intent".into(), "pin".into());
        let gold = hide_label(&mut row).map(|gold| (gold.id, gold.label));
        assert_eq!(gold, Some(("1".into(), "pin".into())));
        assert_eq!(row, Row::new("1".into(), "t".into(), None));
    }
}
