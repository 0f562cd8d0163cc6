//! `convert-to-messages`: labelled rows as chats for fine-tuning, through the student's own program.

use std::collections::BTreeSet;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::lineage::LongLineage;
use flowrun_lm::messages::{ChatRow, MessageOptions, row_to_messages};
use flowrun_lm::program::ProgramSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::examples;
use crate::leakage::{self, LeakageRule};
use crate::program_file::ProgramFile;
use crate::rows::{JsonlReader, JsonlWriter, Row, read_json, read_rows, write_json};
use crate::schema_of;

/// Rows between two looks at the cancel flag.
const LOOK_EVERY: usize = 4096;

/// The step kind.
pub(crate) struct ConvertToMessages;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The student's program: it is trained on the very prompts that it will be asked.
    #[schemars(with = "String", extend("x-flowrun-ref" = "programs"))]
    program: ProgramSpec,
    /// Train on the label as the teacher wrote it (`raw_label`) instead of the sanitised one.
    #[serde(default)]
    raw_targets: bool,
    /// What to do about rows of `test` among those to train on.
    #[serde(default)]
    leakage: LeakageRule,
}

impl Step for ConvertToMessages {
    fn kind(&self) -> &'static str {
        "convert-to-messages"
    }
    fn version(&self) -> u32 {
        3
    }
    fn about(&self) -> &'static str {
        "Turns labelled rows into chats (OpenAI's fine-tuning JSONL) with the student's program."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new(
                "rows",
                "examples",
                "Rows with their label; without any just the program is made.",
            )
            .many()
            .optional(),
            Port::new("labels", "labels", "The labels to choose from."),
            leakage::teachers_port(),
            Port::new(
                "test",
                "examples",
                "Rows that must not be trained on: refused here, before any training.",
            )
            .optional(),
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
            Port::new(
                "lineage",
                "lineage",
                "The rows that the chats are of, for `finetune`.",
            ),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let labels: Vec<String> = read_json(&ctx.input("labels")?.path)?;
        let file = ProgramFile::plain(&params.program, &labels)?;
        let (_, program) = file.prompt()?;
        let mut chats = JsonlWriter::create(&ctx.output("messages"))?;
        let test = match ctx.input_opt("test") {
            Some(input) => read_rows(&input.path)?,
            None => Vec::new(),
        };
        let scratch = || tempfile::tempfile_in(&ctx.work_dir);
        let unwritten = |e: std::io::Error| StepError::io(&ctx.work_dir, &e);
        let mut lineage = LongLineage::new(&scratch);
        lineage.watch(leakage::id_and_text(&test));
        let mut marks = BTreeSet::new();
        for input in ctx.input_list("rows") {
            for (number, row) in JsonlReader::<Row>::open(&input.path)?.enumerate() {
                if number % LOOK_EVERY == 0 {
                    ctx.check_cancelled()?;
                }
                let mut row = row?;
                lineage.train(&row.id, &row.text).map_err(unwritten)?;
                if let Some(mark) = row.teacher.take() {
                    marks.insert(mark);
                }
                if params.raw_targets {
                    take_raw_label(&mut row);
                }
                for row in examples(std::slice::from_ref(&row), file.label_field()) {
                    let converted = row_to_messages(&program, &row, MessageOptions::default());
                    let converted = converted.map_err(|e| StepError::invalid(e.to_string()))?;
                    converted
                        .iter()
                        .try_for_each(|chat: &ChatRow| chats.write(chat))?;
                }
            }
        }
        leakage::learn_from_marked(ctx, lineage.others(), &marks)?;
        if !test.is_empty() {
            let overlap = lineage.overlap(leakage::scored_rows(&test));
            let what = "test rows are among the rows to train on";
            leakage::guard(ctx, params.leakage, &overlap, what)?;
        }
        let chats = chats.finish()?;
        write_json(
            &ctx.output("lineage"),
            &lineage.finish().map_err(unwritten)?,
        )?;
        file.save(&ctx.output("program"))?;
        Ok(StepOutcome::default().metric("chats", chats))
    }
}

/// The label as the teacher wrote it, where it wrote one.
fn take_raw_label(row: &mut Row) {
    if let Some(raw) = row.raw_label.take() {
        row.label = Some(raw);
    }
}
