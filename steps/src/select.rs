//! `select`: the best checkpoint and program by their devset scores.

use std::collections::BTreeSet;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::folder;
use crate::program_file::ProgramFile;
use crate::rows::{read_json, write_json};
use crate::schema_of;
use crate::scores::{ProgramKind, Scores};

/// The step kind.
pub struct Select;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {}

/// What was chosen; the artifact `choice`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Model id.
    pub model: String,
    /// Which program.
    pub program: ProgramKind,
    /// Its accuracy on the devset.
    pub accuracy: f64,
}

impl Step for Select {
    fn kind(&self) -> &'static str {
        "select"
    }
    fn version(&self) -> u32 {
        2
    }
    fn about(&self) -> &'static str {
        "Chooses the checkpoint and program with the best devset score; of equal ones the first."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("scores", "scores", "Devset scores, one per checkpoint.").many(),
            Port::new("adapters", "adapter", "The checkpoints, in the same order.").many(),
            Port::new(
                "optimised",
                "program",
                "Their optimised programs, in the same order.",
            )
            .many(),
            Port::new("program", "program", "The plain program."),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("adapter", "adapter", "The best checkpoint."),
            Port::new("program", "program", "Its best program."),
            Port::new("choice", "choice", "What was chosen, with its score."),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let Params {} = ctx.params()?;
        let adapters = ctx.input_list("adapters");
        let optimised = ctx.input_list("optimised");
        let scores = ctx.input_list("scores");
        if scores.len() != adapters.len() || scores.len() != optimised.len() {
            return Err(StepError::invalid(format!(
                "there are {} scores, {} checkpoints and {} optimised programs; each checkpoint \
                 needs one of each",
                scores.len(),
                adapters.len(),
                optimised.len()
            )));
        }
        let mut best: Option<(usize, Choice)> = None;
        // Every row that had a say in the choice, the losers' too.
        let mut seen = BTreeSet::new();
        for (index, input) in scores.iter().enumerate() {
            let scores: Scores = read_json(&input.path)?;
            let checkpoint = Checkpoint::load(&adapters[index].path)?;
            if scores.model != checkpoint.model_id() {
                return Err(StepError::invalid(format!(
                    "score {index} is of `{}`, checkpoint {index} is `{}`; give both in one order",
                    scores.model,
                    checkpoint.model_id()
                )));
            }
            for score in &scores.programs {
                let rows = score.rows.iter();
                seen.extend(rows.map(|row| (row.id.clone(), row.text.clone())));
                if best
                    .as_ref()
                    .is_none_or(|(_, b)| score.accuracy > b.accuracy)
                {
                    let choice = Choice {
                        model: scores.model.clone(),
                        program: score.program,
                        accuracy: score.accuracy,
                    };
                    best = Some((index, choice));
                }
            }
        }
        let (index, choice) = best.ok_or_else(|| StepError::invalid("there are no scores"))?;
        let program = match choice.program {
            ProgramKind::Plain => &ctx.input("program")?.path,
            ProgramKind::Optimised => &optimised[index].path,
        };
        let mut program = ProgramFile::load(program)?;
        if let Some(lineage) = program.lineage_mut() {
            lineage.select(seen.iter().map(|(id, text)| (id.as_str(), text.as_str())));
        }
        program.save(&ctx.output("program"))?;
        folder::copy(&adapters[index].path, &ctx.output("adapter"))?;
        write_json(&ctx.output("choice"), &choice)?;
        Ok(StepOutcome::default()
            .metric("model", choice.model)
            .metric("program", choice.program.as_str())
            .metric("accuracy", choice.accuracy))
    }
}
