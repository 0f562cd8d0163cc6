//! `evaluate`: a model's accuracy on labelled rows, plain and with the optimised program.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_lm::calibration::calibration;
use flowrun_lm::evaluate::{Evaluate as Evaluation, EvaluateError, EvaluatedRow, EvaluationResult};
use flowrun_lm::lineage::Overlap;
use flowrun_lm::lm::Usage;
use flowrun_lm::metric::MetricKind;
use flowrun_lm::program::{RowErrorKind, RowResult};
use flowrun_lm::stats::{Confusion, LabelScore, wilson95};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::{
    Answerer, Refusals, SamplingSpec, check_answered, check_fits, check_metric, examples, question,
    with_too_long, with_usage,
};
use crate::checkpoint::Checkpoint;
use crate::estimate::{Calls, estimate, server};
use crate::format_version::FormatVersion;
use crate::leakage::{LeakageRule, guard, lineage_of, scored_rows};
use crate::models::{Host, ModelSpec, observe, settle};
use crate::program_file::ProgramFile;
use crate::rows::{Row, read_json, read_rows, write_json};
use crate::schema_of;
use crate::scores::{
    Leakage, PairedTest, ProgramKind, ProgramScore, Role, ScoredRow, Scores, macro_f1,
};

/// Rows between two looks at `max_errors`.
const CHUNK: usize = 256;

/// The step kind.
pub(crate) struct Evaluate;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The model that prompts ask.
    #[serde(default)]
    #[schemars(with = "Option<String>", extend("x-flowrun-ref" = "models"))]
    model: Option<ModelSpec>,
    /// Name in scores; the checkpoint's or the model's own when left out.
    #[serde(default)]
    name: Option<String>,
    /// Why it is tested, for the report.
    #[serde(default)]
    role: Option<Role>,
    /// What counts as correct.
    #[serde(default)]
    metric: MetricKind,
    /// How the model draws tokens.
    #[serde(default)]
    sampling: SamplingSpec,
    /// Only this many rows: the first ones.
    #[serde(default)]
    max_rows: Option<usize>,
    /// As many answers that cannot be read, and prompts that are longer than the model's context,
    /// end the step with an error; by default they only count as wrong.
    #[serde(default)]
    #[schemars(range(min = 1))]
    max_errors: Option<usize>,
    /// What to do about rows that trained or selected what they are to score.
    #[serde(default)]
    leakage: LeakageRule,
}

impl Step for Evaluate {
    fn kind(&self) -> &'static str {
        "evaluate"
    }
    fn version(&self) -> u32 {
        6
    }
    fn about(&self) -> &'static str {
        "Measures a model's accuracy on labelled rows, plain and with the optimised program."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("rows", "examples", "Rows with the expected label."),
            Port::new("program", "program", "The program."),
            Port::new(
                "optimised",
                "program",
                "The same with demos; scored beside it.",
            )
            .optional(),
            Port::new("adapter", "adapter", "The checkpoint that answers.").optional(),
            Port::new(
                "choice",
                "choice",
                "What `select` chose: says which program this is.",
            )
            .optional(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new(
            "scores",
            "scores",
            "Accuracy, and every row's answer.",
        )]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn estimate(&self, given: &Foresight<'_>) -> Option<Estimate> {
        let params: Params = serde_json::from_value(given.params.clone()).ok()?;
        let spec = server(params.model.as_ref())?;
        let read = || {
            let file = ProgramFile::load(given.input("program")?).ok()?;
            Some((file, given.input("rows")?))
        };
        // A checkpoint is another model, and of two programs only one is counted here.
        let alone = |ports: &BTreeMap<_, _>| {
            !ports.contains_key("adapter") && !ports.contains_key("optimised")
        };
        let known = read().filter(|_| given.inputs.is_some_and(alone));
        if let Some((ProgramFile::Classifier(_), _)) = known {
            return None;
        }
        let calls = known.as_ref().map(|(file, rows)| Calls {
            file,
            sampling: params.sampling,
            rows,
            most: params.max_rows.unwrap_or(usize::MAX),
        });
        Some(estimate(spec, calls, given))
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        settle(ctx)?;
        let params: Params = ctx.params()?;
        let mut rows = read_rows(&ctx.input("rows")?.path)?;
        rows.truncate(params.max_rows.unwrap_or(usize::MAX));
        let adapter = ctx.input_opt("adapter").map(|input| input.path.as_path());
        let checkpoint = adapter.map(Checkpoint::load).transpose()?;
        let given = adapter.zip(checkpoint.as_ref());
        let first = match ctx.input_opt("choice") {
            Some(input) => read_json::<crate::select::Choice>(&input.path)?.program,
            None => ProgramKind::Plain,
        };
        let mut programs = vec![(first, ProgramFile::load(&ctx.input("program")?.path)?)];
        if let Some(input) = ctx.input_opt("optimised") {
            programs.push((ProgramKind::Optimised, ProgramFile::load(&input.path)?));
        }
        // Before anything is asked: a refused score costs no call.
        for (_, file) in &programs {
            check_metric(params.metric, file.labels())?;
        }
        let overlaps: Vec<Option<Overlap>> = programs
            .iter()
            .map(|(_, file)| {
                let lineage = lineage_of(file, checkpoint.as_ref())?;
                Some(lineage.overlap(scored_rows(&rows)))
            })
            .collect();
        for overlap in &overlaps {
            match overlap {
                Some(overlap) => {
                    let what = "rows to be scored had a part in what they score";
                    guard(ctx, params.leakage, overlap, what)?;
                }
                None => ctx.reporter.warning(
                    "it is not known which rows trained what is scored: give `finetune` its `lineage`",
                ),
            }
        }
        let mut time = RowTime::default();
        let mut all = Vec::new();
        let mut usage = Usage::default();
        let host = Host::from(ctx);
        for (index, (kind, file)) in programs.iter().enumerate() {
            let answerer =
                Answerer::open(file, params.model.as_ref(), given, params.sampling, &host)?;
            let total = (rows.len() * programs.len()) as u64;
            let before = index * rows.len();
            let progress = |done: usize| {
                let done = (before + done) as u64;
                ctx.reporter.progress(done, total, "rows", kind.as_str());
            };
            let result = score(ctx, &answerer, file, &params, &rows, &progress, &mut time)?;
            usage += answerer.usage();
            let mut score = program_score(*kind, &params, &rows, file, result)?;
            score.leakage = Some(leakage(overlaps[index].as_ref(), &score));
            all.push(score);
        }
        let name = params.name.clone();
        let scores = Scores {
            version: FormatVersion,
            dataset: rows.first().map_or("", Row::dataset).to_owned(),
            model: name
                .or_else(|| checkpoint.as_ref().map(Checkpoint::model_id))
                .or_else(|| params.model.as_ref().map(ModelSpec::name))
                // Not the step's name: that is no part of what the scores depend on.
                .unwrap_or_else(|| "embedding classifier".to_owned()),
            comparison: PairedTest::of(&all),
            programs: all,
        };
        write_json(&ctx.output("scores"), &scores)?;
        let scored = scores.programs.iter().flat_map(|program| &program.rows);
        let too_long = scored.filter(|row| row.error.is_some()).count();
        if too_long > 0 {
            ctx.reporter.warning(&format!(
                "{too_long} prompts are longer than the model's context and count as wrong; the \
                 scores say which"
            ));
        }
        let outcome = with_too_long(with_usage(scores.outcome(), &usage), too_long);
        Ok(match time.ms_per_row() {
            Some(ms) => outcome.metric("ms_per_row", ms),
            None => outcome,
        })
    }
}

/// How long rows took: only those that were computed, and nothing but them.
#[derive(Default)]
struct RowTime {
    spent: Duration,
    rows: usize,
}

impl RowTime {
    fn add(&mut self, spent: Duration, results: &[RowResult]) {
        // A kept answer took no time worth measuring; a classifier makes no calls and keeps none.
        let kept = |r: &&RowResult| r.tokens.calls > 0 && r.tokens.cached == r.tokens.calls;
        let kept = results.iter().filter(kept).count();
        // To read kept answers takes time too: where most are, what the others took is not known.
        if 2 * kept > results.len() {
            return;
        }
        self.rows += results.len() - kept;
        self.spent += spent;
    }

    /// Milliseconds; `None` when nothing was computed.
    fn ms_per_row(&self) -> Option<f64> {
        let ms = self.spent.as_secs_f64() * 1e3 / self.rows as f64;
        (self.rows > 0).then_some((ms * 1e3).round() / 1e3)
    }
}

fn score(
    ctx: &StepContext,
    answerer: &Answerer,
    file: &ProgramFile,
    params: &Params,
    rows: &[Row],
    progress: &(dyn Fn(usize) + Sync),
    time: &mut RowTime,
) -> Result<EvaluationResult, StepError> {
    let field = file.label_field();
    let examples = examples(rows, field);
    let started = Instant::now();
    let mut results: Vec<RowResult> = Vec::with_capacity(examples.len());
    // In one go, unless it may end early.
    let at_once = params.max_errors.map_or(examples.len(), |_| CHUNK).max(1);
    for chunk in examples.chunks(at_once) {
        let before = results.len();
        let told = |done: usize| progress(before + done);
        let answered = answerer.run(chunk, field, &told)?;
        // A row without an answer has no score.
        let mut none = Refusals::default();
        check_answered(ctx, &answered, &answerer.usage(), &mut none)?;
        results.extend(answered);
        let failed = results.iter().filter(|result| result.prediction.is_err());
        if params.max_errors.is_some_and(|max| failed.count() >= max) {
            break;
        }
    }
    check_fits(&results)?;
    time.add(started.elapsed(), &results);
    let metric = params.metric.metric(field);
    let evaluation = Evaluation {
        metric: &metric,
        label: field,
        // Outages were found above: only answers that cannot be read, and prompts that are too
        // long, are left.
        max_errors: params.max_errors.unwrap_or(usize::MAX),
    };
    let result = evaluation
        .score(&examples, results)
        .map_err(|error| match error {
            EvaluateError::Cancelled => StepError::cancelled(),
            EvaluateError::TooManyErrors { .. } => StepError::failed(error.to_string()),
            other => StepError::invalid(other.to_string()),
        })?;
    let unscored = |row: &&EvaluatedRow| row.error_kind == Some(RowErrorKind::Other);
    if let Some(row) = result.rows.iter().find(unscored) {
        let why = row.error.as_deref().unwrap_or_default();
        return Err(
            StepError::invalid(format!("row `{}` cannot be scored: {why}", row.id)).help(
                "the rows need their expected label, and the program an output of type `label`",
            ),
        );
    }
    Ok(result)
}

fn program_score(
    kind: ProgramKind,
    params: &Params,
    rows: &[Row],
    file: &ProgramFile,
    result: EvaluationResult,
) -> Result<ProgramScore, StepError> {
    let inputs = file.row_inputs()?;
    let prices = params.model.as_ref().and_then(ModelSpec::prices);
    let tokens = result.tokens;
    let correct = result.rows.iter().filter(|row| row.correct).count();
    let per_label = per_label(file.labels(), &result.rows);
    let sure = |row: &EvaluatedRow| Some((f64::from(row.confidence?), row.correct));
    Ok(ProgramScore {
        interval: wilson95(correct, result.n),
        macro_f1: macro_f1(&per_label),
        per_label,
        calibration: calibration(result.rows.iter().filter_map(sure)),
        leakage: None,
        program: kind,
        role: params.role,
        n: result.n,
        correct,
        accuracy: result.accuracy,
        // Outages were found before: the model gave no answer because the prompt is too long.
        parse_failures: result.parse_failures + result.lm_failures,
        prompt_tokens: tokens.prompt,
        completion_tokens: tokens.completion,
        cost_usd: prices.map(|prices| prices.cost(tokens.prompt, tokens.completion)),
        rows: rows
            .iter()
            .zip(result.rows)
            .map(|(row, scored)| ScoredRow {
                id: scored.id,
                text: row.text.clone(),
                inputs: question(&inputs, row),
                gold: scored.gold.unwrap_or_default(),
                raw: scored.pred.is_none().then_some(scored.raw).flatten(),
                error: scored
                    .error
                    .filter(|_| scored.error_kind == Some(RowErrorKind::Lm)),
                predicted: scored.pred,
                correct: scored.correct,
                confidence: scored.confidence,
            })
            .collect(),
    })
}

/// Label by label; over the labels that rows have when the program names none.
fn per_label(labels: &[String], rows: &[EvaluatedRow]) -> Vec<LabelScore> {
    let gold = rows.iter().filter_map(|row| row.gold.clone());
    let seen: BTreeSet<String> = gold.collect();
    let labels = match labels {
        [] => seen.into_iter().collect(),
        labels => labels.to_vec(),
    };
    let pairs = rows.iter().map(|row| {
        let gold = row.gold.as_deref().unwrap_or_default();
        (gold, row.pred.as_deref())
    });
    Confusion::new(&labels, pairs).per_label()
}

fn leakage(overlap: Option<&Overlap>, score: &ProgramScore) -> Leakage {
    let Some(overlap) = overlap else {
        return Leakage::default();
    };
    let tainted = overlap.ids();
    let clean = |row: &&ScoredRow| !tainted.contains(row.id.as_str());
    Leakage {
        known: !overlap.unknown_teacher,
        trained: overlap.trained.len(),
        selected: overlap.selected.len(),
        taught: overlap.taught.len(),
        same_text: overlap.same_text.len(),
        clean_rows: score.rows.iter().filter(clean).count(),
        clean_correct: score
            .rows
            .iter()
            .filter(clean)
            .filter(|row| row.correct)
            .count(),
    }
}
