//! `explain`: a model writes the reason for each row's label, for a student that is to reason.

use std::collections::BTreeMap;

use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_lm::program::{OutputSpec, ProgramSpec, REASONING};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::{
    Answerer, Refusals, SamplingSpec, check_answered, check_fits, examples, with_usage,
};
use crate::estimate::{Calls, estimate, server};
use crate::models::{Host, ModelSpec, observe, settle};
use crate::program_file::ProgramFile;
use crate::rows::{read_rows, write_rows};
use crate::schema_of;

/// The step kind.
pub(crate) struct Explain;

/// Column of the label, which the program may take as an input.
const LABEL: &str = "label";

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// A prompt with the output `reasoning`; its inputs may come from the columns `text` and `label`.
    #[schemars(with = "String", extend("x-flowrun-ref" = "programs"))]
    program: ProgramSpec,
    /// The model that writes.
    #[schemars(with = "String", extend("x-flowrun-ref" = "models"))]
    model: ModelSpec,
    /// How the model draws tokens.
    #[serde(default)]
    sampling: SamplingSpec,
    /// Drop up to so many rows that the model's server refuses for good: it says no to that row
    /// alone (400), or has an error of its own (5xx) at every try. One more ends the step with an
    /// error.
    #[serde(default)]
    max_failed: usize,
}

impl Step for Explain {
    fn kind(&self) -> &'static str {
        "explain"
    }
    fn version(&self) -> u32 {
        2
    }
    fn about(&self) -> &'static str {
        "A model writes the reason for each row's label; a row whose reason cannot be read is dropped."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new("rows", "examples", "Rows with their label.")]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("rows", "examples", "The same rows with their reason."),
            Port::new(
                "dropped",
                "examples",
                "Rows that have no reason that could be read, each with why.",
            ),
        ]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn estimate(&self, given: &Foresight<'_>) -> Option<Estimate> {
        let params: Params = serde_json::from_value(given.params.clone()).ok()?;
        let spec = server(Some(&params.model))?;
        let file = ProgramFile::plain(&params.program, &[]).ok();
        let rows = given.input("rows");
        let calls = file.as_ref().zip(rows).map(|(file, rows)| Calls {
            file,
            sampling: params.sampling,
            rows,
            most: usize::MAX,
        });
        Some(estimate(spec, calls, given))
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        settle(ctx)?;
        let params: Params = ctx.params()?;
        let names_it = |spec: &ProgramSpec| {
            let outputs = spec.prompt().map(|prompt| prompt.outputs.as_slice());
            let named = |output: &OutputSpec| output.name == REASONING;
            spec.reasons() || outputs.unwrap_or_default().iter().any(named)
        };
        if !names_it(&params.program) {
            return Err(StepError::invalid(format!(
                "the program has no output `{REASONING}`"
            )));
        }
        let rows = read_rows(&ctx.input("rows")?.path)?;
        let file = ProgramFile::plain(&params.program, &[])?;
        let host = Host::from(ctx);
        let answerer = Answerer::open(&file, Some(&params.model), None, params.sampling, &host)?;
        let total = rows.len() as u64;
        let progress = |done: usize| {
            ctx.reporter
                .progress(done as u64, total, "rows", "explained");
        };
        let results = answerer.run(&examples(&rows, LABEL), LABEL, &progress)?;
        let mut refusals = Refusals::at_most(params.max_failed);
        check_answered(ctx, &results, &answerer.usage(), &mut refusals)?;
        check_fits(&results)?;
        let mut explained = Vec::with_capacity(rows.len());
        let mut dropped = Vec::new();
        for (mut row, result) in rows.into_iter().zip(results) {
            match &result.prediction {
                Ok(prediction) => {
                    row.reasoning = prediction.text(REASONING).map(str::to_owned);
                    explained.push(row);
                }
                Err(why) => {
                    row.dropped = Some(why.to_string());
                    dropped.push(row);
                }
            }
        }
        if !dropped.is_empty() {
            ctx.reporter.warning(&format!(
                "{} of {total} rows were dropped: too long for the model, refused by its server, or \
                 their reason could not be read; the output `dropped` says why, row by row",
                dropped.len()
            ));
        }
        write_rows(&ctx.output("rows"), &explained)?;
        write_rows(&ctx.output("dropped"), &dropped)?;
        let outcome = StepOutcome::default()
            .metric("explained", explained.len())
            .metric("dropped", dropped.len());
        Ok(with_usage(refusals.told(outcome), &answerer.usage()))
    }
}
