//! `bootstrap`: the teacher labels the rows that have no label.

mod teacher;

use std::collections::BTreeMap;

use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_lm::metric::normalize_label;
use flowrun_lm::program::{CUT_OFF, ProgramSpec, RowResult};
use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use self::teacher::check;
use self::teacher::{drawn, teacher};
use crate::answer::{
    Answerer, Refusals, SamplingSpec, check_answered, check_fits, examples, is_too_long,
    rows_at_once, with_too_long, with_usage,
};
use crate::checkpoint::Checkpoint;
use crate::estimate::{Calls, estimate, server};
use crate::leakage::{mark, teachers_port};
use crate::models::{Host, ModelSpec, observe, settle};
use crate::program_file::{KnnSpec, ProgramFile};
use crate::rows::{JsonlReader, JsonlWriter, Row, read_json};
use crate::schema_of;

/// Rows that are asked about before their answers are written, of what computes in this process.
const AT_ONCE: usize = 20_000;
/// The same for a server, in whole calls: a call ends with its slowest answer anyway.
const OF_A_SERVER: usize = 4_096;
/// The same for a Batch API: as many as a batch takes.
const IN_A_BATCH: usize = 50_000;

/// The step kind.
pub(crate) struct Bootstrap;

/// Its name.
const KIND: &str = "bootstrap";
/// The inputs that make a student the teacher.
const PROGRAM: &str = "program";
const ADAPTER: &str = "adapter";

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The teacher: a prompt for `model`, or an `embedding_classifier`. Left out where the input
    /// `program` is the teacher.
    #[serde(default)]
    #[schemars(with = "Option<String>", extend("x-flowrun-ref" = "programs"))]
    program: Option<ProgramSpec>,
    /// The model that a prompt asks.
    #[serde(default)]
    #[schemars(with = "Option<String>", extend("x-flowrun-ref" = "models"))]
    model: Option<ModelSpec>,
    /// How the model draws tokens.
    #[serde(default)]
    sampling: SamplingSpec,
    /// Answers for each row; with more than one, the majority's label is taken and its share is
    /// the confidence (self-consistency).
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    samples: usize,
    /// Temperature of the draws, when `samples` is more than 1.
    #[serde(default = "draw_temperature")]
    temperature: f64,
    /// For each row the labelled rows most like it as demos.
    #[serde(default)]
    knn: Option<KnnSpec>,
    /// Take a label that is only spelled otherwise (`Card Arrival.`), or the only one that an
    /// answer holds, instead of dropping the row.
    #[serde(default)]
    normalise_labels: bool,
    /// Drop rows whose label is less sure than this; rows without a confidence stay. A classifier
    /// tells one, `samples` do, and a `provider: embedded` model that a program with `constrain:
    /// true` asks.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    min_confidence: f64,
    /// Drop up to so many rows that the model's server refuses for good: it says no to that row
    /// alone (400), or has an error of its own (5xx) at every try. One more ends the step with an
    /// error.
    #[serde(default)]
    max_failed: usize,
}

fn one() -> usize {
    1
}

fn draw_temperature() -> f64 {
    0.7
}

impl Step for Bootstrap {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn version(&self) -> u32 {
        6
    }
    fn about(&self) -> &'static str {
        "A teacher (a large model, a classifier fitted on a few labels, or a trained student) labels the unlabelled rows."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new(
                "unlabelled",
                "examples",
                "Rows to label; a label that they have is replaced.",
            ),
            Port::new("labels", "labels", "The labels to choose from."),
            Port::new(
                "labelled",
                "examples",
                "Rows with gold labels: a classifier is fitted on them, and `knn` takes demos from them.",
            )
            .optional(),
            Port::new(
                PROGRAM,
                "program",
                "The teacher, where a step made it: the student's program for the next round.",
            )
            .optional(),
            Port::new(
                ADAPTER,
                "adapter",
                "The checkpoint that answers, as a teacher of the next round.",
            )
            .optional(),
            teachers_port(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("rows", "examples", "Rows with the teacher's label."),
            Port::new(
                "dropped",
                "examples",
                "Rows that were not kept, each with the reason.",
            ),
            Port::new(
                "teacher",
                "program",
                "The teacher; a checkpoint's is evaluated with its `adapter`. It says what both came from.",
            ),
        ]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn estimate(&self, given: &Foresight<'_>) -> Option<Estimate> {
        let params: Params = serde_json::from_value(given.params.clone()).ok()?;
        let spec = server(params.model.as_ref())?;
        if let Some(program) = &params.program {
            program.prompt()?;
        }
        let read = || {
            let file = match &params.program {
                Some(program) => {
                    let labels: Vec<String> = read_json(given.input("labels")?).ok()?;
                    ProgramFile::plain(&drawn(program, &params), &labels).ok()?
                }
                None => ProgramFile::load(given.input(PROGRAM)?).ok()?,
            };
            Some((file, given.input("unlabelled")?))
        };
        // A checkpoint is a folder: then no input is given, and nothing is known.
        let known = read().filter(|_| params.knn.is_none());
        if let Some((ProgramFile::Classifier(_), _)) = known {
            return None;
        }
        let calls = known.as_ref().map(|(file, rows)| Calls {
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
        let labels: Vec<String> = read_json(&ctx.input("labels")?.path)?;
        let unlabelled = &ctx.input("unlabelled")?.path;
        let total = JsonlReader::<IgnoredAny>::open(unlabelled)?.count() as u64;
        let folder = ctx.input_opt(ADAPTER).map(|input| input.path.as_path());
        let checkpoint = folder.map(Checkpoint::load).transpose()?;
        let teacher = teacher(ctx, &params, &labels, checkpoint.as_ref())?;
        teacher.save(&ctx.output("teacher"))?;
        let mark = mark(&ctx.output("teacher"))?;
        let field = teacher.label_field().to_owned();
        let answerer = Answerer::open(
            &teacher,
            params.model.as_ref(),
            folder.zip(checkpoint.as_ref()),
            params.sampling,
            &Host::from(ctx),
        )?;
        let mut kept = JsonlWriter::create(&ctx.output("rows"))?;
        let mut dropped = JsonlWriter::create(&ctx.output("dropped"))?;
        let mut rows = JsonlReader::<Row>::open(unlabelled)?;
        let portion = portion(params.model.as_ref());
        let mut too_long = 0;
        let mut unsure = 0;
        let mut refusals = Refusals::at_most(params.max_failed);
        loop {
            // An answer that a row has is none of this teacher's, also when it drops the row.
            let some = rows.by_ref().take(portion);
            let some = some.map(|row| row.map(Row::unanswered));
            let some: Vec<Row> = some.collect::<Result<_, _>>()?;
            if some.is_empty() {
                break;
            }
            let before = kept.written() + dropped.written();
            let progress = |done: usize| {
                let done = (before + done) as u64;
                ctx.reporter.progress(done, total, "rows", "labelled");
            };
            let results = answerer.run(&examples(&some, &field), &field, &progress)?;
            check_answered(ctx, &results, &answerer.usage(), &mut refusals)?;
            if before == 0 {
                check_fits(&results)?;
            }
            too_long += results.iter().filter(|result| is_too_long(result)).count();
            for (row, result) in some.into_iter().zip(results) {
                let mut row = labelled(row, result, &field, &labels, &params);
                row.teacher = row.label.is_some().then(|| mark.clone());
                unsure += usize::from(row.dropped.is_none() && row.confidence.is_none());
                match row.dropped {
                    None => kept.write(&row)?,
                    Some(_) => dropped.write(&row)?,
                }
            }
        }
        let (kept, dropped) = (kept.finish()?, dropped.finish()?);
        if dropped > 0 {
            ctx.reporter.warning(&format!(
                "{dropped} of {total} rows were dropped; the output `dropped` says why, row by row"
            ));
        }
        if unsure > 0 && params.min_confidence > 0.0 {
            ctx.reporter.warning(&format!(
                "{unsure} rows have no confidence and were kept whatever `min_confidence` is: ask \
                 with `samples`, or a `provider: embedded` model with `constrain: true`"
            ));
        }
        let outcome = StepOutcome::default()
            .metric("labelled", kept)
            .metric("dropped", dropped);
        let outcome = refusals.told(with_too_long(outcome, too_long));
        Ok(with_usage(outcome, &answerer.usage()))
    }
}

fn portion(model: Option<&ModelSpec>) -> usize {
    match server(model) {
        Some(spec) if spec.batch => IN_A_BATCH,
        Some(_) => {
            let call = model.map_or(1, rows_at_once);
            OF_A_SERVER.next_multiple_of(call.clamp(1, IN_A_BATCH))
        }
        None => AT_ONCE,
    }
}

/// The row with the teacher's answer, or with the reason why it has none.
fn labelled(
    mut row: Row,
    result: RowResult,
    field: &str,
    labels: &[String],
    params: &Params,
) -> Row {
    row.confidence = result.confidence.map(f64::from);
    let prediction = match &result.prediction {
        Err(error) => {
            row.raw_label = result.raw;
            row.dropped = Some(error.to_string());
            return row;
        }
        Ok(prediction) => prediction,
    };
    let label = prediction.text(field).unwrap_or_default();
    row.reasoning = prediction.text("reasoning").map(str::to_owned);
    row.sanitised_label = Some(label.to_owned());
    // What it wrote before it was sanitised.
    let written = result.trace.last().and_then(|step| step.outputs.get(field));
    row.raw_label = written.and_then(|value| Some(value.as_str()?.to_owned()));
    let known = labels
        .iter()
        .map(String::as_str)
        .find(|known| *known == label);
    let meant = || normalize_label(label, labels).filter(|_| params.normalise_labels);
    let Some(found) = known.or_else(meant) else {
        row.dropped = Some(format!("`{label}` is not one of the labels"));
        return row;
    };
    if result.cut_off {
        row.dropped = Some(format!("{CUT_OFF}, perhaps within the label"));
        return row;
    }
    row.label = Some(found.to_owned());
    if let Some(sure) = row.confidence.filter(|sure| *sure < params.min_confidence) {
        let least = params.min_confidence;
        row.dropped = Some(format!("confidence {sure:.2} is below {least}"));
    }
    row
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_batch_and_a_servers_calls_are_filled() {
        let portion_of = |batch: bool, concurrency: usize| {
            let entry = json!({
                "provider": "openai", "base_url": "http://h/v1", "model": "m", "batch": batch,
                "concurrency": concurrency,
            });
            let model: ModelSpec = serde_json::from_value(entry).unwrap();
            portion(Some(&model))
        };
        assert_eq!(portion(None), AT_ONCE);
        assert_eq!(portion_of(true, 64), IN_A_BATCH);
        assert_eq!([1, 64].map(|n| portion_of(false, n)), [OF_A_SERVER; 2]);
        // Three calls of 1,600 rows; one of 16,000.
        assert_eq!([100, 1000].map(|n| portion_of(false, n)), [4_800, 16_000]);
    }
}
