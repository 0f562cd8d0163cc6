//! `optimize`: few-shot demos for a checkpoint, by random search.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_engine::record::timestamp;
use flowrun_engine::step::{Port, Step, StepContext, StepError, StepErrorKind, StepOutcome, World};
use flowrun_lm::lm::LmError;
use flowrun_lm::metric::MetricKind;
use flowrun_lm::optimize::{
    InstructionSearch, InstructionSettings, KeptResults, Optimizer, Progress, Proposed,
    RandomSearch, Session,
};
use flowrun_lm::program::SavedProgram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::{SamplingSpec, attach_encoders, check_metric, examples, with_usage};
use crate::checkpoint::Checkpoint;
use crate::estimate::{Search, estimate_search, server};
use crate::leakage::{id_and_text, learn_from_teachers, teachers_port};
use crate::models::{Host, ModelSpec, observe, open_lm, settle};
use crate::program_file::{KnnSpec, ProgramFile};
use crate::rows::{read_rows, write_json};
use crate::schema_of;

/// Rows per call of the model; changes no result. A bootstrap wants a handful of demos: rows that
/// are asked beyond the last one are wasted.
const BATCH: usize = 16;

/// Candidates at once for a server.
const AT_ONCE: usize = 4;

/// The step kind.
pub(crate) struct Optimize;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The student.
    #[schemars(with = "String", extend("x-flowrun-ref" = "models"))]
    model: ModelSpec,
    /// How the search goes.
    #[serde(default)]
    search: RandomSearch,
    /// Instead of a search: for each query the training rows most like it as demos.
    #[serde(default)]
    knn_few_shot: Option<KnnSpec>,
    /// Instead of a search for demos: instructions that a capable model writes from the mistakes.
    #[serde(default)]
    instructions: Option<InstructionSpec>,
    /// What a candidate is scored by.
    #[serde(default)]
    metric: MetricKind,
    /// How the model draws tokens.
    #[serde(default)]
    sampling: SamplingSpec,
}

/// Who proposes instructions, and how many.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct InstructionSpec {
    /// The model that writes; a capable one.
    #[schemars(with = "String", extend("x-flowrun-ref" = "models"))]
    proposer: ModelSpec,
    /// How it draws tokens.
    #[serde(default)]
    sampling: SamplingSpec,
    /// How the search goes.
    #[serde(default)]
    search: InstructionSettings,
}

impl Step for Optimize {
    fn kind(&self) -> &'static str {
        "optimize"
    }
    fn version(&self) -> u32 {
        4
    }
    fn about(&self) -> &'static str {
        "Finds few-shot demos: DSPy's BootstrapFewShotWithRandomSearch, the nearest rows per query, or new instructions."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("program", "program", "The program to improve."),
            Port::new("adapter", "adapter", "The checkpoint that answers.").optional(),
            Port::new(
                "trainset",
                "examples",
                "Labelled rows that demos come from.",
            ),
            Port::new("valset", "examples", "Labelled rows that score candidates."),
            teachers_port(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("program", "program", "The program with the best demos."),
            Port::new("candidates", "json", "All candidates with their scores."),
        ]
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        observe(params, world)
    }
    fn estimate(&self, given: &Foresight<'_>) -> Option<Estimate> {
        let params: Params = serde_json::from_value(given.params.clone()).ok()?;
        let proposer = params.instructions.as_ref().map(|spec| &spec.proposer);
        let student = server(Some(&params.model));
        let read = || {
            let file = ProgramFile::load(given.input("program")?).ok()?;
            let rows = |port: &str| read_rows(given.input(port)?).ok();
            Some((file, rows("trainset")?, rows("valset")?))
        };
        // How many calls a search makes depends on its answers; of a search for demos there is a
        // bound.
        let for_demos = params.knn_few_shot.is_none() && params.instructions.is_none();
        let known = (for_demos && student.is_some()).then(read).flatten();
        let search = known.as_ref().map(|(file, trainset, valset)| Search {
            file,
            sampling: params.sampling,
            settings: &params.search,
            batch: BATCH,
            trainset,
            valset,
        });
        Some(estimate_search(
            student.or(server(proposer))?,
            search,
            given,
        ))
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        settle(ctx)?;
        let params: Params = ctx.params()?;
        let file = ProgramFile::load(&ctx.input("program")?.path)?;
        let (saved, mut student) = file.prompt()?;
        let field = file.label_field();
        let folder = ctx.input_opt("adapter").map(|input| input.path.as_path());
        let checkpoint = folder.map(Checkpoint::load).transpose()?;
        let host = Host::from(ctx);
        attach_encoders(saved, &mut student, &host)?;
        let lm = open_lm(&params.model, folder.zip(checkpoint.as_ref()), &host)?;
        let train_rows = read_rows(&ctx.input("trainset")?.path)?;
        let val_rows = read_rows(&ctx.input("valset")?.path)?;
        let (trainset, valset) = (examples(&train_rows, field), examples(&val_rows, field));
        check_metric(params.metric, file.labels())?;
        let metric = params.metric.metric(field);
        let proposals: Mutex<BTreeMap<&str, usize>> = Mutex::default();
        let on_progress = |progress: Progress| {
            tell(ctx, progress);
            if let Progress::Proposed { became, .. } = progress {
                let mut all = proposals.lock().unwrap_or_else(PoisonError::into_inner);
                *all.entry(outcome_of(became)).or_default() += 1;
            }
        };
        let kept = kept_results(ctx, params.metric);
        let session = Session {
            lm: &lm,
            sampling: &params.sampling.into(),
            metric: &metric,
            label: field,
            teacher: None,
            batch: BATCH,
            on_progress: Some(&on_progress),
            kept: Some(&kept),
        };
        let mut search = params.search.clone();
        search.concurrency = search.concurrency.or(match params.model {
            ModelSpec::OpenAi(_) => Some(AT_ONCE),
            _ => None,
        });
        let knn = params.knn_few_shot.as_ref();
        let knn = knn.map(|knn| knn.open(&host)).transpose()?;
        let proposer = params.instructions.as_ref();
        let proposer = proposer
            .map(|spec| open_lm(&spec.proposer, None, &host))
            .transpose()?;
        let instructions = params.instructions.as_ref().zip(proposer.as_ref());
        let instructions = instructions.map(|(spec, lm)| InstructionSearch {
            settings: spec.search.clone(),
            proposer: lm,
            sampling: spec.sampling.into(),
        });
        let optimizer: &dyn Optimizer = match (&knn, &instructions) {
            (Some(_), Some(_)) => {
                return Err(StepError::invalid(
                    "`knn_few_shot` and `instructions` are two optimizers",
                )
                .help("keep one; chain two `optimize` steps to use both"));
            }
            (Some((knn, _)), None) => knn,
            (None, Some(instructions)) => instructions,
            (None, None) => &search,
        };
        let compiled = optimizer.compile(&student, &trainset, Some(&valset), &session);
        ctx.check_cancelled()?;
        // To be refused every time is no answer that counts as wrong.
        if let Some(LmError::Rejected(why) | LmError::TooLong(why)) = lm.refused() {
            let text = format!("the model answered none of the search's calls: {why}");
            return Err(StepError::failed(text));
        }
        let barred = lm.barred().or(proposer.as_ref().and_then(|lm| lm.barred()));
        if let Some(why) = barred {
            let text = format!("the search was left before its end: {why}");
            return Err(StepError::failed(text)
                .help("the answers that came are kept; a later run asks only for the rest"));
        }
        let unavailable =
            lm.totals().unavailable + proposer.as_ref().map_or(0, |p| p.totals().unavailable);
        if unavailable > 0 {
            let lost = lm.lost().or_else(|| proposer.as_ref()?.lost());
            let why = lost.map(|error| format!(": {error}")).unwrap_or_default();
            let text = format!(
                "the model could not be reached for {unavailable} calls of the search{why}"
            );
            return Err(StepError::new(StepErrorKind::Transient, text)
                .help("the answers that came are kept; a later run asks only for the rest"));
        }
        let compiled = compiled.map_err(|e| StepError::failed(e.to_string()))?;
        let best = compiled.best.and_then(|at| compiled.candidates.get(at));
        let mut optimised =
            SavedProgram::new(saved.spec.clone(), saved.labels.clone(), &compiled.program);
        match &knn {
            Some((_, encoder)) => optimised.keep_neighbours(&compiled.program, encoder),
            // Those of an optimizer before this one.
            None => {
                let kept = compiled.program.predictors.iter();
                let kept = kept.filter(|predictor| predictor.neighbours.is_some());
                optimised.neighbours = kept
                    .filter_map(|p| saved.neighbours.get_key_value(&p.name))
                    .map(|(name, neighbours)| (name.clone(), neighbours.clone()))
                    .collect();
            }
        }
        optimised
            .keep_instructions(&compiled.program)
            .map_err(|e| StepError::failed(e.to_string()))?;
        optimised.lineage.clone_from(&saved.lineage);
        if let Some(lineage) = &mut optimised.lineage {
            lineage.train(id_and_text(&train_rows));
            lineage.select(id_and_text(&val_rows));
            let labelled = [train_rows, val_rows].concat();
            learn_from_teachers(ctx, lineage, &labelled)?;
        }
        let stopped = (compiled.candidates.iter())
            .filter(|candidate| candidate.stopped_after.is_some())
            .count();
        let demos: usize = optimised.demos.values().map(Vec::len).sum();
        ProgramFile::Prompt(optimised).save(&ctx.output("program"))?;
        write_json(&ctx.output("candidates"), &compiled.candidates)?;
        let outcome = StepOutcome::default()
            .metric("score", best.map_or(Value::Null, |best| best.score.into()))
            .metric("candidates", compiled.candidates.len())
            .metric("stopped_early", stopped)
            .metric("known_before", kept.recalled())
            .metric("demos", demos);
        let outcome = match tally(&proposals) {
            tally if tally.is_empty() => outcome,
            tally => outcome.metric("proposals", tally),
        };
        let mut usage = lm.totals();
        if let Some(proposer) = &proposer {
            usage += proposer.totals();
        }
        Ok(with_usage(outcome, &usage))
    }
}

/// The action cache, for the candidates of the search.
fn kept_results(ctx: &StepContext, metric: MetricKind) -> KeptResults {
    let metric = serde_json::to_value(metric).unwrap_or_default();
    let (began, started) = (ctx.started_at, Instant::now());
    KeptResults::new(
        ctx.actions.clone(),
        metric.as_str().unwrap_or_default(),
        &ctx.step,
        move || timestamp(began + started.elapsed()),
    )
}

/// What became of a proposal, in a word or two.
fn outcome_of(became: Proposed) -> &'static str {
    match became {
        Proposed::NotAsked => "no mistakes to learn from",
        Proposed::Empty => "empty",
        Proposed::CutOff => "cut off by `max_tokens`",
        Proposed::Known => "tried before",
        Proposed::NoBetter { .. } => "no better on the minibatch",
        Proposed::Scored => "scored",
    }
}

/// `5 no better on the minibatch, 1 scored`.
fn tally(proposals: &Mutex<BTreeMap<&str, usize>>) -> String {
    let all = proposals.lock().unwrap_or_else(PoisonError::into_inner);
    let parts: Vec<String> = all.iter().map(|(what, n)| format!("{n} {what}")).collect();
    parts.join(", ")
}

fn tell(ctx: &StepContext, progress: Progress) {
    match progress {
        Progress::Candidate { seed, done, total } => {
            let text = format!("candidate {seed}");
            ctx.reporter
                .progress(done as u64, total as u64, "candidates", &text);
        }
        Progress::Scored { seed, score, best } => {
            ctx.reporter
                .log(&format!("candidate {seed}: {score} % (best {best} %)"));
        }
        Progress::Proposed { seed, became } => {
            let said = outcome_of(became);
            let points = match became {
                Proposed::NoBetter { points, parent } => {
                    format!(" ({points}, its parent {parent})")
                }
                _ => String::new(),
            };
            ctx.reporter
                .log(&format!("proposal {seed}: {said}{points}"));
        }
        Progress::Bootstrapping { .. } | Progress::Evaluating { .. } => {}
    }
}
