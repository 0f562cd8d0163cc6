//! `merge-scores`: the score on all rows out of those of their shards, the same as if all rows
//! had been scored at once.

use std::collections::BTreeSet;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::calibration::calibration;
use flowrun_lm::stats::{Confusion, wilson95};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{read_json, write_json};
use crate::schema_of;
use crate::scores::{Leakage, PairedTest, ProgramScore, Scores, macro_f1};

/// The step kind.
pub(crate) struct MergeScores;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {}

impl Step for MergeScores {
    fn kind(&self) -> &'static str {
        "merge-scores"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Joins the scores of a model on shards of rows to its score on all of them."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new(
                "scores",
                "scores",
                "Scores of one model, in the order of the rows.",
            )
            .many(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new(
            "scores",
            "scores",
            "Accuracy, and every row's answer.",
        )]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let Params {} = ctx.params()?;
        let parts = ctx.input_list("scores").iter();
        let parts: Result<Vec<Scores>, StepError> = parts.map(|p| read_json(&p.path)).collect();
        let scores = merged(parts?)?;
        write_json(&ctx.output("scores"), &scores)?;
        Ok(scores.outcome())
    }
}

/// # Errors
/// When there is nothing to merge, or the parts are not of one model and its programs.
fn merged(parts: Vec<Scores>) -> Result<Scores, StepError> {
    let mut parts = parts.into_iter();
    let Some(mut all) = parts.next() else {
        return Err(StepError::invalid("there are no scores to merge"));
    };
    let mut labels = label_sets(&all);
    for part in parts {
        let kinds = |scores: &Scores| -> Vec<_> {
            scores
                .programs
                .iter()
                .map(|p| (p.program, p.role))
                .collect()
        };
        if part.model != all.model || kinds(&part) != kinds(&all) {
            return Err(StepError::invalid(format!(
                "the scores are of several models or programs: `{}` and `{}`",
                all.model, part.model
            ))
            .help("merge the scores of one model; `select` and `report` take several"));
        }
        if all.dataset.is_empty() {
            all.dataset.clone_from(&part.dataset);
        }
        for (labels, more) in labels.iter_mut().zip(label_sets(&part)) {
            join_labels(labels, more);
        }
        for (program, more) in all.programs.iter_mut().zip(part.programs) {
            add(program, more);
        }
    }
    for (program, labels) in all.programs.iter_mut().zip(&labels) {
        finish(program, labels);
    }
    all.comparison = PairedTest::of(&all.programs);
    Ok(all)
}

/// The labels that each program was scored on.
fn label_sets(scores: &Scores) -> Vec<Vec<String>> {
    let labels = |p: &ProgramScore| p.per_label.iter().map(|l| l.label.clone()).collect();
    scores.programs.iter().map(labels).collect()
}

/// A program that names its labels has the same in every part, in its own order; else they are
/// those that rows have, sorted.
fn join_labels(labels: &mut Vec<String>, more: Vec<String>) {
    if *labels != more {
        let all: BTreeSet<String> = labels.drain(..).chain(more).collect();
        labels.extend(all);
    }
}

fn add(program: &mut ProgramScore, more: ProgramScore) {
    program.n += more.n;
    program.correct += more.correct;
    program.parse_failures += more.parse_failures;
    program.prompt_tokens = program.prompt_tokens.saturating_add(more.prompt_tokens);
    program.completion_tokens = program
        .completion_tokens
        .saturating_add(more.completion_tokens);
    program.cost_usd = program.cost_usd.zip(more.cost_usd).map(|(a, b)| a + b);
    program.leakage = match (program.leakage.take(), more.leakage) {
        (Some(a), Some(b)) => Some(Leakage {
            known: a.known && b.known,
            trained: a.trained + b.trained,
            selected: a.selected + b.selected,
            taught: a.taught + b.taught,
            same_text: a.same_text + b.same_text,
            clean_rows: a.clean_rows + b.clean_rows,
            clean_correct: a.clean_correct + b.clean_correct,
        }),
        _ => None,
    };
    program.rows.extend(more.rows);
}

/// Computes what is no sum anew.
fn finish(program: &mut ProgramScore, labels: &[String]) {
    program.accuracy = program.correct as f64 / program.n.max(1) as f64;
    program.interval = wilson95(program.correct, program.n);
    let pairs = program.rows.iter();
    let pairs = pairs.map(|row| (row.gold.as_str(), row.predicted.as_deref()));
    program.per_label = Confusion::new(labels, pairs).per_label();
    program.macro_f1 = macro_f1(&program.per_label);
    let sure = program.rows.iter();
    let sure = sure.filter_map(|row| Some((f64::from(row.confidence?), row.correct)));
    program.calibration = calibration(sure);
}
