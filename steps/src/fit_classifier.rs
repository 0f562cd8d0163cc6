//! `fit-classifier`: a cheap baseline: sentence vectors and a few labelled rows, no language model.

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_lm::program::ProgramSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::leakage::{learn_from_teachers, teachers_port};
use crate::models::{Host, observe, settle};
use crate::program_file::ProgramFile;
use crate::rows::{read_json, read_rows};
use crate::schema_of;

/// The step kind.
pub(crate) struct FitClassifier;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// An `embedding_classifier`.
    #[schemars(with = "String", extend("x-flowrun-ref" = "programs"))]
    program: ProgramSpec,
}

impl Step for FitClassifier {
    fn kind(&self) -> &'static str {
        "fit-classifier"
    }
    fn version(&self) -> u32 {
        3
    }
    fn about(&self) -> &'static str {
        "Fits an embedding classifier on labelled rows: a baseline that calls no language model."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("labelled", "examples", "Rows with their label."),
            Port::new("labels", "labels", "The labels to choose from."),
            Port::new("unlabelled", "examples", "Rows for self-training.").optional(),
            teachers_port(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new("program", "program", "The fitted classifier.")]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        settle(ctx)?;
        let Params { program } = ctx.params()?;
        let ProgramSpec::EmbeddingClassifier(spec) = program else {
            return Err(StepError::invalid(
                "`program` must be an `embedding_classifier`",
            ));
        };
        let labels: Vec<String> = read_json(&ctx.input("labels")?.path)?;
        let labelled = read_rows(&ctx.input("labelled")?.path)?;
        let unlabelled = match ctx.input_opt("unlabelled") {
            Some(input) => read_rows(&input.path)?,
            None => Vec::new(),
        };
        let host = Host::from(ctx);
        let mut fitted = ProgramFile::fit(&spec, &labels, &labelled, &unlabelled, &host)?;
        if let Some(lineage) = fitted.lineage_mut() {
            learn_from_teachers(ctx, lineage, &labelled)?;
        }
        fitted.save(&ctx.output("program"))?;
        Ok(StepOutcome::default().metric("labelled", labelled.len()))
    }
}
