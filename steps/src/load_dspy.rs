//! `load-dspy`: takes over what DSPy's optimizers found, from the file that `program.save("….json")`
//! wrote there.

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::program::{Predictor, REASONING, SavedProgram, load_dspy_json};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::program_file::ProgramFile;
use crate::save_dspy::rename;
use crate::schema_of;

/// The step kind.
pub(crate) struct LoadDspy;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Prompt (`predict`, `chain_of_thought`, or a stage's name) → the attribute of the DSPy
    /// program that holds it, where the names differ. A program of one prompt needs none.
    #[serde(default)]
    names: BTreeMap<String, String>,
}

impl Step for LoadDspy {
    fn kind(&self) -> &'static str {
        "load-dspy"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Gives a program the demos and instructions of one that was optimised and saved in DSPy."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("program", "program", "The same program, as declared here."),
            Port::new(
                "saved",
                "json",
                "What `program.save(\"….json\")` wrote in DSPy, of the version that the program's `format` names.",
            ),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new("program", "program", "The program with them.")]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let file = ProgramFile::load(&ctx.input("program")?.path)?;
        let (saved, declared) = file.prompt()?;
        let path = &ctx.input("saved")?.path;
        let text = std::fs::read_to_string(path).map_err(|e| StepError::io(path, &e))?;
        let mut program = declared.clone();
        rename(&mut program, &params.names)?;
        load_dspy_json(&mut program, &text).map_err(|e| {
            StepError::invalid(e.to_string()).help(
                "declare the same prompts with the same fields here; `names` maps their names",
            )
        })?;
        for (loaded, declared) in program.predictors.iter_mut().zip(&declared.predictors) {
            same_descriptions(loaded, declared)?;
            loaded.name.clone_from(&declared.name);
        }
        let mut found = SavedProgram::new(saved.spec.clone(), saved.labels.clone(), &program);
        found
            .keep_instructions(&program)
            .map_err(|e| StepError::failed(e.to_string()))?;
        ctx.reporter.warning(
            "it is not known which rows the program was optimised on: no score of it is known to be clean",
        );
        let demos: usize = found.demos.values().map(Vec::len).sum();
        let instructions = found.instructions.len();
        ProgramFile::Prompt(found).save(&ctx.output("program"))?;
        Ok(StepOutcome::default()
            .metric("demos", demos)
            .metric("instructions", instructions))
    }
}

/// Refuses descriptions other than the declared ones: these alone are kept, and prompts show them.
fn same_descriptions(loaded: &Predictor, declared: &Predictor) -> Result<(), StepError> {
    let pairs = loaded.signature.fields().zip(declared.signature.fields());
    for (loaded, declared) in pairs {
        let (there, here) = (loaded.full_desc(), declared.full_desc());
        if there != here {
            let setting = match declared.name.as_str() {
                REASONING => "reasoning_desc",
                _ => "desc",
            };
            return Err(StepError::invalid(format!(
                "the field `{}` is described as `{there}` in the saved program and as `{here}` here",
                declared.name
            ))
            .help(format!("say the same with `{setting}` of the program in `programs:`")));
        }
    }
    Ok(())
}
