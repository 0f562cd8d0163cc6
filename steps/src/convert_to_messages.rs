//! `convert-to-messages`: labelled rows as chats for fine-tuning, through the student's own program.

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::messages::{ChatRow, MessageOptions, row_to_messages};
use flowrun_lm::program::ProgramSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::examples;
use crate::program_file::ProgramFile;
use crate::rows::{read_json, read_rows, write_jsonl};
use crate::schema_of;

/// The step kind.
pub struct ConvertToMessages;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The student's program: it is trained on the very prompts that it will be asked.
    #[schemars(with = "String", extend("x-flowrun-ref" = "programs"))]
    program: ProgramSpec,
}

impl Step for ConvertToMessages {
    fn kind(&self) -> &'static str {
        "convert-to-messages"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Turns labelled rows into chats (OpenAI's fine-tuning JSONL) with the student's program."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("rows", "examples", "Rows with their label.").many(),
            Port::new("labels", "labels", "The labels to choose from."),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("messages", "messages", "One chat a line."),
            Port::new(
                "program",
                "program",
                "The student's program, without demos.",
            ),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let labels: Vec<String> = read_json(&ctx.input("labels")?.path)?;
        let file = ProgramFile::plain(&params.program, &labels)?;
        let (_, program) = file.prompt()?;
        let mut chats: Vec<ChatRow> = Vec::new();
        for input in ctx.input_list("rows") {
            for row in examples(&read_rows(&input.path)?, file.label_field()) {
                let converted = row_to_messages(&program, &row, MessageOptions::default());
                chats.extend(converted.map_err(|e| StepError::invalid(e.to_string()))?);
            }
        }
        write_jsonl(&ctx.output("messages"), &chats)?;
        file.save(&ctx.output("program"))?;
        Ok(StepOutcome::default().metric("chats", chats.len()))
    }
}
