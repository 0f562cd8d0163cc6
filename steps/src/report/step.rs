//! The step kind `report`: gathers what the run found out and draws it.

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, StepSummary};
use flowrun_lm::stats::{self, mcnemar, wilson95};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Comparison, Confusion, CostRow, DataSummary, ErrorRow, OracleAudit, Report, Score, StepCost,
    render_html,
};
use crate::load::DataSetInfo;
use crate::rows::{Row, read_json, read_jsonl, read_rows, write_json};
use crate::schema_of;
use crate::scores::{ProgramScore, Role, Scores};
use crate::split::Gold;

/// The step kind.
pub struct ReportStep;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Headline of the page.
    title: String,
    /// Name of the pipeline: `${{ run.name }}`.
    pipeline: String,
    /// What the pipeline is for.
    #[serde(default)]
    about: Option<String>,
    /// Name of the oracle.
    #[serde(default = "oracle")]
    oracle: String,
    /// Remarks that a reader needs in order to judge the scores.
    #[serde(default)]
    notes: Vec<String>,
}

fn oracle() -> String {
    "oracle".to_owned()
}

impl Step for ReportStep {
    fn kind(&self) -> &'static str {
        "report"
    }
    fn version(&self) -> u32 {
        4
    }
    fn about(&self) -> &'static str {
        "Draws the scores, errors, times and costs of a distillation as one HTML page, and as JSON."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("about", "dataset", "The data set."),
            Port::new("labels", "labels", "The labels in use."),
            Port::new("train", "examples", "Training rows after filtering."),
            Port::new("labelled", "examples", "Rows that kept their gold label."),
            Port::new("gold", "gold", "The deleted labels; they audit the oracle.").optional(),
            Port::new("kept", "examples", "Rows that the oracle labelled.").optional(),
            Port::new("dropped", "examples", "Rows whose answer was dropped.").optional(),
            Port::new("loss", "loss", "Training loss.").optional(),
            Port::new("dev", "scores", "Devset scores.").many(),
            Port::new("test", "scores", "Test-set scores.").many(),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("report", "report", "The page."),
            Port::new("json", "json", "The same figures."),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let about: DataSetInfo = read_json(&ctx.input("about")?.path)?;
        let labels: Vec<String> = read_json(&ctx.input("labels")?.path)?;
        let dev = scores(ctx, "dev")?;
        let test = scores(ctx, "test")?;
        let best = tested(&test).find(|(_, score)| score.role == Some(Role::Best));
        let confusion = best.map(|(_, score)| confusion(&labels, score));
        let report = Report {
            version: Report::VERSION,
            title: params.title.clone(),
            about: params.about.clone(),
            pipeline: params.pipeline.clone(),
            generated_at: humantime::format_rfc3339_seconds(ctx.started_at).to_string(),
            dataset: about.dataset.clone(),
            stand_in: about.stand_in,
            data: data(ctx, &about, &labels, &test)?,
            oracle: audit(ctx, &params.oracle)?,
            training: match ctx.input_opt("loss") {
                Some(input) => read_json(&input.path)?,
                None => Vec::new(),
            },
            dev: tested(&dev).map(|(s, p)| dev_score(s, p)).collect(),
            test: tested(&test)
                .map(|(s, p)| test_score(s, p))
                .collect::<Result<_, _>>()?,
            comparisons: best.map_or_else(Vec::new, |best| comparisons(best, &test)),
            per_label: confusion
                .as_ref()
                .map_or_else(Vec::new, stats::Confusion::per_label),
            confusion: confusion.map(|found| Confusion {
                labels: found.labels,
                matrix: found.counts,
            }),
            calibration: best.and_then(|(_, score)| score.calibration.clone()),
            errors: best.map_or_else(Vec::new, |(_, score)| wrong(score)),
            steps: ctx.finished.to_vec().iter().map(step_cost).collect(),
            cost: tested(&test).map(|(s, p)| cost(ctx, s, p)).collect(),
            notes: params.notes,
        };
        let page = render_html(&report).map_err(|e| StepError::failed(e.to_string()))?;
        let path = ctx.output("report");
        std::fs::write(&path, page).map_err(|e| StepError::io(&path, &e))?;
        write_json(&ctx.output("json"), &report)?;
        let mut outcome = StepOutcome::default().metric("dataset", report.dataset.as_str());
        if let Some(best) = report.best() {
            outcome = outcome
                .metric("best", best.model.as_str())
                .metric("accuracy", best.accuracy);
        }
        Ok(outcome)
    }
}

fn scores(ctx: &StepContext, port: &str) -> Result<Vec<Scores>, StepError> {
    let inputs = ctx.input_list(port).iter();
    inputs.map(|input| read_json(&input.path)).collect()
}

/// Every model with every program.
fn tested(scores: &[Scores]) -> impl Iterator<Item = (&Scores, &ProgramScore)> {
    scores
        .iter()
        .flat_map(|scores| std::iter::repeat(scores).zip(&scores.programs))
}

/// On the devset, where a model has no role.
fn dev_score(scores: &Scores, score: &ProgramScore) -> Score {
    let (low, high) = wilson95(score.correct, score.n);
    Score {
        role: None,
        model: scores.model.clone(),
        program: score.program,
        n: score.n as u64,
        correct: score.correct as u64,
        accuracy: score.accuracy,
        parse_failures: score.parse_failures as u64,
        low,
        high,
        leakage: score.leakage.clone(),
    }
}

fn test_score(scores: &Scores, score: &ProgramScore) -> Result<Score, StepError> {
    let role = score.role.ok_or_else(|| {
        StepError::invalid(format!("the test score of `{}` has no role", scores.model))
            .help("set `role` on the `evaluate` step that made it")
    })?;
    Ok(Score {
        role: Some(role),
        ..dev_score(scores, score)
    })
}

fn data(
    ctx: &StepContext,
    about: &DataSetInfo,
    labels: &[String],
    test: &[Scores],
) -> Result<DataSummary, StepError> {
    let train = read_rows(&ctx.input("train")?.path)?.len() as u64;
    let labelled = read_rows(&ctx.input("labelled")?.path)?.len() as u64;
    Ok(DataSummary {
        train_rows: train,
        test_rows: tested(test)
            .map(|(_, score)| score.n as u64)
            .max()
            .unwrap_or(0),
        labels: labels.to_vec(),
        labelled_rows: labelled,
        unlabelled_rows: train - labelled.min(train),
        source: about.source.clone(),
    })
}

/// How often the oracle was right: the only place where the deleted labels are read.
fn audit(ctx: &StepContext, name: &str) -> Result<Option<OracleAudit>, StepError> {
    let rows = |port: &str| match ctx.input_opt(port) {
        Some(input) => read_rows(&input.path),
        None => Ok(Vec::new()),
    };
    let (kept, dropped): (Vec<Row>, Vec<Row>) = (rows("kept")?, rows("dropped")?);
    if kept.is_empty() && dropped.is_empty() {
        return Ok(None);
    }
    let gold: Vec<Gold> = match ctx.input_opt("gold") {
        Some(input) => read_jsonl(&input.path)?,
        None => Vec::new(),
    };
    Ok(Some(oracle_audit(name, &kept, &dropped, &gold)))
}

/// A row without a gold label says nothing about the oracle; a dropped answer may be right.
fn oracle_audit(name: &str, kept: &[Row], dropped: &[Row], gold: &[Gold]) -> OracleAudit {
    let gold: BTreeMap<&str, &str> = gold
        .iter()
        .map(|gold| (gold.id.as_str(), gold.label.as_str()))
        .collect();
    let judged = |rows: &[Row]| -> Vec<bool> {
        let known = rows.iter().filter_map(|row| {
            let gold = gold.get(row.id.as_str())?;
            Some(row.label.as_deref() == Some(*gold))
        });
        known.collect()
    };
    let share = |judged: &[bool]| {
        let right = judged.iter().filter(|right| **right).count();
        (!judged.is_empty()).then(|| right as f64 / judged.len() as f64)
    };
    let judged_kept = judged(kept);
    let all = [judged_kept.clone(), judged(dropped)].concat();
    let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
    for row in dropped {
        *reasons
            .entry(row.dropped.clone().unwrap_or_default())
            .or_default() += 1;
    }
    OracleAudit {
        model: name.to_owned(),
        labelled: (kept.len() + dropped.len()) as u64,
        kept: kept.len() as u64,
        dropped: reasons,
        audited: all.len() as u64,
        audit_accuracy: share(&all),
        kept_accuracy: share(&judged_kept),
    }
}

fn confusion(labels: &[String], score: &ProgramScore) -> stats::Confusion {
    let rows = score.rows.iter();
    let pairs = rows.map(|row| (row.gold.as_str(), row.predicted.as_deref()));
    stats::Confusion::new(labels, pairs)
}

/// The best model against every other one on the rows that both answered.
fn comparisons(best: (&Scores, &ProgramScore), test: &[Scores]) -> Vec<Comparison> {
    let right: BTreeMap<&str, bool> = best
        .1
        .rows
        .iter()
        .map(|row| (row.id.as_str(), row.correct))
        .collect();
    tested(test)
        .filter(|(scores, score)| (&scores.model, score.program) != (&best.0.model, best.1.program))
        .map(|(scores, score)| {
            let pairs = score
                .rows
                .iter()
                .filter_map(|row| Some((*right.get(row.id.as_str())?, row.correct)));
            let found = mcnemar(pairs);
            Comparison {
                a: best.0.model.clone(),
                a_program: best.1.program,
                b: scores.model.clone(),
                b_program: score.program,
                a_only: found.only_a as u64,
                b_only: found.only_b as u64,
                p_value: found.p,
            }
        })
        .collect()
}

/// Wrong answers, the surest first.
fn wrong(score: &ProgramScore) -> Vec<ErrorRow> {
    let mut wrong: Vec<_> = score.rows.iter().filter(|row| !row.correct).collect();
    wrong.sort_by(|a, b| {
        let sure = |row: &crate::scores::ScoredRow| row.confidence.unwrap_or(0.0);
        sure(b).total_cmp(&sure(a)).then(a.id.cmp(&b.id))
    });
    let error = |row: &crate::scores::ScoredRow| ErrorRow {
        id: row.id.clone(),
        text: row.text.clone(),
        gold: row.gold.clone(),
        predicted: row.predicted.clone().unwrap_or_default(),
        confidence: row.confidence.map(f64::from),
        raw: row.raw.clone(),
    };
    wrong.into_iter().map(error).collect()
}

fn step_cost(step: &StepSummary) -> StepCost {
    StepCost {
        step: step.step.clone(),
        kind: step.kind.clone(),
        took_ms: step.took_ms,
        tokens: step
            .metrics
            .get("tokens")
            .and_then(Value::as_u64)
            .unwrap_or(0),
        cost_usd: step.metrics.get("cost_usd").and_then(Value::as_f64),
        status: step.status.clone(),
    }
}

fn cost(ctx: &StepContext, scores: &Scores, score: &ProgramScore) -> CostRow {
    let n = score.n.max(1) as f64;
    // The step that measured it says how long a row took.
    let finished = ctx.finished.to_vec();
    let measured = finished.iter().rev().find(|step| {
        let is = |name: &str, value: Value| step.metrics.get(name) == Some(&value);
        let role = score.role.map_or("", Role::as_str);
        is("model", scores.model.as_str().into())
            && is("program", score.program.as_str().into())
            && is("role", role.into())
    });
    let ms = measured.and_then(|step| step.metrics.get("ms_per_row")?.as_f64());
    CostRow {
        model: scores.model.clone(),
        program: score.program,
        queries: score.n as u64,
        tokens_per_query: score.prompt_tokens.saturating_add(score.completion_tokens) as f64 / n,
        ms_per_query: ms,
        usd_per_1000: score.cost_usd.map(|cost| cost / n * 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, label: Option<&str>) -> Row {
        Row::new(id.to_owned(), "text".to_owned(), label.map(str::to_owned))
    }

    fn gold(id: &str, label: &str) -> Gold {
        Gold {
            id: id.to_owned(),
            label: label.to_owned(),
        }
    }

    #[test]
    fn rows_without_a_gold_label_are_not_counted_as_wrong() {
        let kept = ["1", "2", "3"].map(|id| row(id, Some("a")));
        let audit = oracle_audit("teacher", &kept, &[], &[gold("2", "a")]);
        assert_eq!((audit.labelled, audit.audited), (3, 1));
        assert_eq!(audit.audit_accuracy, Some(1.0));
        assert_eq!(audit.kept_accuracy, Some(1.0));
        let audit = oracle_audit("teacher", &kept, &[], &[]);
        assert_eq!((audit.audited, audit.audit_accuracy), (0, None));
    }

    #[test]
    fn a_right_answer_that_was_dropped_is_right_all_the_same() {
        let kept = [row("1", Some("a")), row("2", Some("b"))];
        let mut unsure = row("3", Some("a"));
        unsure.dropped = Some("confidence".to_owned());
        let dropped = [unsure, row("4", None)];
        let known = ["1", "2", "3", "4"].map(|id| gold(id, "a"));
        let audit = oracle_audit("teacher", &kept, &dropped, &known);
        assert_eq!((audit.labelled, audit.kept, audit.audited), (4, 2, 4));
        assert_eq!(audit.audit_accuracy, Some(0.5));
        assert_eq!(audit.kept_accuracy, Some(0.5));
        let unknown = oracle_audit("teacher", &kept, &dropped, &known[2..]);
        assert_eq!(unknown.audit_accuracy, Some(0.5));
        assert_eq!(unknown.kept_accuracy, None);
    }
}
