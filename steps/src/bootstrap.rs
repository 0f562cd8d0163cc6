//! `bootstrap`: the teacher labels the rows that have no label.

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_lm::program::{ProgramSpec, RowResult};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::{Answerer, SamplingSpec, check_answered, examples, with_usage};
use crate::models::{Host, ModelSpec, observe};
use crate::program_file::ProgramFile;
use crate::rows::{Row, read_json, read_rows, write_rows};
use crate::schema_of;

/// The step kind.
pub struct Bootstrap;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The teacher: a prompt for `model`, or an `embedding_classifier`.
    #[schemars(with = "String", extend("x-flowrun-ref" = "programs"))]
    program: ProgramSpec,
    /// The model that a prompt asks.
    #[serde(default)]
    #[schemars(with = "Option<String>", extend("x-flowrun-ref" = "models"))]
    model: Option<ModelSpec>,
    /// How the model draws tokens.
    #[serde(default)]
    sampling: SamplingSpec,
}

impl Step for Bootstrap {
    fn kind(&self) -> &'static str {
        "bootstrap"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "A teacher (a large model, or a classifier fitted on a few labels) labels the unlabelled rows."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("unlabelled", "examples", "Rows to label."),
            Port::new("labels", "labels", "The labels to choose from."),
            Port::new(
                "labelled",
                "examples",
                "Rows with gold labels; a classifier is fitted on them.",
            )
            .optional(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("rows", "examples", "Rows with the teacher's label."),
            Port::new(
                "dropped",
                "examples",
                "Rows whose answer was not one of the labels, with the reason.",
            ),
            Port::new("teacher", "program", "The teacher, ready to be evaluated."),
        ]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let labels: Vec<String> = read_json(&ctx.input("labels")?.path)?;
        let rows = read_rows(&ctx.input("unlabelled")?.path)?;
        let host = Host::from(ctx);
        let teacher = match &params.program {
            ProgramSpec::EmbeddingClassifier(spec) => {
                let labelled = match ctx.input_opt("labelled") {
                    Some(input) => read_rows(&input.path)?,
                    None => Vec::new(),
                };
                ctx.reporter
                    .progress(0, rows.len() as u64, "rows", "fitting the teacher");
                ProgramFile::fit(spec, &labels, &labelled, &rows, &host)?
            }
            prompt => ProgramFile::plain(prompt, &labels)?,
        };
        let field = teacher.label_field().to_owned();
        let answerer = Answerer::open(
            &teacher,
            params.model.as_ref(),
            None,
            params.sampling,
            &host,
        )?;
        let total = rows.len() as u64;
        let progress = |done: usize| {
            ctx.reporter
                .progress(done as u64, total, "rows", "labelled")
        };
        let results = answerer.run(&examples(&rows, &field), &field, &progress)?;
        check_answered(ctx, &results)?;
        let (mut kept, mut dropped) = (Vec::new(), Vec::new());
        for (row, result) in rows.into_iter().zip(results) {
            let row = labelled(row, result, &field, &labels);
            let to = if row.dropped.is_none() {
                &mut kept
            } else {
                &mut dropped
            };
            to.push(row);
        }
        if !dropped.is_empty() {
            ctx.reporter.warning(&format!(
                "{} of {total} rows were dropped: their answer was not one of the {} labels",
                dropped.len(),
                labels.len()
            ));
        }
        write_rows(&ctx.output("rows"), &kept)?;
        write_rows(&ctx.output("dropped"), &dropped)?;
        teacher.save(&ctx.output("teacher"))?;
        let outcome = StepOutcome::default()
            .metric("labelled", kept.len())
            .metric("dropped", dropped.len());
        Ok(with_usage(outcome, &answerer.usage()))
    }
}

/// The row with the teacher's answer, or with the reason why it has none.
fn labelled(mut row: Row, result: RowResult, field: &str, labels: &[String]) -> Row {
    row.confidence = result.confidence.map(f64::from);
    match &result.prediction {
        Err(error) => {
            row.raw_label = result.raw;
            row.dropped = Some(error.to_string());
        }
        Ok(prediction) => {
            let label = prediction.text(field).unwrap_or_default();
            row.reasoning = prediction.text("reasoning").map(str::to_owned);
            // What it wrote before it was sanitised.
            let written = result.trace.last().and_then(|step| step.outputs.get(field));
            row.raw_label = written.and_then(|value| Some(value.as_str()?.to_owned()));
            if labels.iter().any(|known| known == label) {
                row.label = Some(label.to_owned());
            } else {
                row.dropped = Some(format!("`{label}` is not one of the labels"));
            }
        }
    }
    row
}
