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
    /// How many rows keep their gold label: the last ones after shuffling.
    labelled: usize,
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
        2
    }
    fn about(&self) -> &'static str {
        "Shuffles rows; the last `labelled` keep their gold label, from the rest it is deleted."
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
        if params.labelled > rows.len() {
            return Err(StepError::invalid(format!(
                "`labelled` is {} but there are only {} rows",
                params.labelled,
                rows.len()
            )));
        }
        PythonRandom::new(params.seed).shuffle(&mut rows);
        let labelled = rows.split_off(rows.len() - params.labelled);
        let gold: Vec<Gold> = rows.iter_mut().filter_map(hide_label).collect();
        write_rows(&ctx.output("labelled"), &labelled)?;
        write_rows(&ctx.output("unlabelled"), &rows)?;
        write_jsonl(&ctx.output("gold"), &gold)?;
        Ok(StepOutcome::default()
            .metric("labelled", labelled.len())
            .metric("unlabelled", rows.len()))
    }
}

/// Takes the label, and further columns with it: some data sets spell the label there once more.
fn hide_label(row: &mut Row) -> Option<Gold> {
    row.extra.clear();
    row.label.take().map(|label| Gold {
        id: row.id.clone(),
        label,
    })
}
