//! `save-dspy`: a program as DSPy's `program.save("….json")` writes it, for `program.load()` there.

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::program::{Program, dspy_file};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::program_file::ProgramFile;
use crate::schema_of;

/// The step kind.
pub(crate) struct SaveDspy;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Prompt (`predict`, `chain_of_thought`, or a stage's name) → the attribute of the DSPy
    /// program that holds it, where the names differ.
    #[serde(default)]
    names: BTreeMap<String, String>,
}

impl Step for SaveDspy {
    fn kind(&self) -> &'static str {
        "save-dspy"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Writes a program's demos and instructions as DSPy saves them, for `program.load()` in DSPy."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new("program", "program", "The program.")]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new(
            "saved",
            "json",
            "The file, in the version that the program's `format` names.",
        )]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let file = ProgramFile::load(&ctx.input("program")?.path)?;
        let (saved, mut program) = file.prompt()?;
        if !saved.neighbours.is_empty() {
            return Err(StepError::invalid(
                "the program chooses its demos for each query, which no saved program of DSPy can say",
            )
            .help("save the program as it was before, and use DSPy's `KNNFewShot` there"));
        }
        rename(&mut program, &params.names)?;
        let text = dspy_file(&program).map_err(|e| StepError::failed(e.to_string()))?;
        let path = ctx.output("saved");
        std::fs::write(&path, text).map_err(|e| StepError::io(&path, &e))?;
        let demos: usize = program.predictors.iter().map(|p| p.demos.len()).sum();
        Ok(StepOutcome::default().metric("demos", demos))
    }
}

/// Calls prompts by their names in the DSPy program.
///
/// # Errors
/// Invalid for a prompt that the program does not have.
pub(crate) fn rename(
    program: &mut Program,
    names: &BTreeMap<String, String>,
) -> Result<(), StepError> {
    let there: Vec<&str> = program.predictors.iter().map(|p| p.name.as_str()).collect();
    if let Some(unknown) = names.keys().find(|name| !there.contains(&name.as_str())) {
        return Err(StepError::invalid(format!(
            "`names` has `{unknown}`, and the program's prompts are `{}`",
            there.join("`, `")
        )));
    }
    for predictor in &mut program.predictors {
        if let Some(name) = names.get(&predictor.name) {
            predictor.name.clone_from(name);
        }
    }
    Ok(())
}
