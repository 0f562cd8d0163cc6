//! [`Answerer`]: a program with what it asks, ready for rows: a prompt with its model, or a
//! classifier with its sentence encoder. Steps and the server do not see the difference.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowrun_engine::step::{StepContext, StepError, StepErrorKind, StepOutcome};
use flowrun_lm::classifier::{Classifier, Embedder};
use flowrun_lm::example::{Example, Prediction};
use flowrun_lm::lm::{LmError, Metered, Sampling, Usage};
use flowrun_lm::metric::MetricKind;
use flowrun_lm::program::{
    Program, RowError, RowInput, RowResult, RunOptions, SavedProgram, Tokens,
};
use flowrun_lm::value::{Fields, Value};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::models::{Host, ModelSpec, encoder_spec, open_encoder, open_lm};
use crate::program_file::{FittedProgram, ProgramFile, TEXT};
use crate::rows::Row;

/// How a model draws tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSpec {
    /// 0 takes the most likely token each time.
    pub temperature: f64,
    /// Tokens of an answer at most.
    pub max_tokens: u32,
    /// Seed of the draws, where the model takes one.
    pub seed: Option<u64>,
}

impl Default for SamplingSpec {
    fn default() -> Self {
        let Sampling {
            temperature,
            max_tokens,
            seed,
            ..
        } = Sampling::default();
        Self {
            temperature,
            max_tokens,
            seed,
        }
    }
}

impl From<SamplingSpec> for Sampling {
    fn from(spec: SamplingSpec) -> Self {
        Self {
            temperature: spec.temperature,
            max_tokens: spec.max_tokens,
            seed: spec.seed,
            ..Self::default()
        }
    }
}

/// A program that can be run.
pub enum Answerer {
    /// A prompt with its model.
    Prompt {
        /// The program.
        program: Box<Program>,
        /// Its model.
        lm: Box<Metered>,
        /// How the model draws.
        sampling: Sampling,
        /// Rows that are asked in one call, which ends with the slowest of them.
        at_once: usize,
    },
    /// A classifier with its sentence encoder.
    Classifier {
        /// The classifier.
        classifier: Box<Classifier>,
        /// Its encoder.
        encoder: Arc<dyn Embedder + Send + Sync>,
    },
}

impl Answerer {
    /// Opens what the program needs. `model` and `checkpoint` are for prompts.
    ///
    /// # Errors
    /// When a prompt has no model, or something cannot be loaded.
    pub fn open(
        file: &ProgramFile,
        model: Option<&ModelSpec>,
        checkpoint: Option<(&Path, &Checkpoint)>,
        sampling: SamplingSpec,
        host: &Host<'_>,
    ) -> Result<Self, StepError> {
        match file {
            ProgramFile::Prompt(saved) => {
                let model = model.ok_or_else(|| {
                    StepError::invalid("the program asks a language model, but none is named")
                        .help("set `model` to a name of `models:`")
                })?;
                let (_, mut program) = file.prompt()?;
                attach_encoders(saved, &mut program, host)?;
                Ok(Self::Prompt {
                    program: Box::new(program),
                    lm: Box::new(open_lm(model, checkpoint, host)?),
                    sampling: sampling.into(),
                    at_once: rows_at_once(model),
                })
            }
            ProgramFile::Classifier(FittedProgram {
                spec, classifier, ..
            }) => Ok(Self::Classifier {
                classifier: Box::new(classifier.clone()),
                encoder: open_encoder(&encoder_spec(&spec.embedder)?, host)?,
            }),
        }
    }

    /// Tokens and money spent so far; kept answers cost nothing.
    pub fn usage(&self) -> Usage {
        match self {
            Self::Prompt { lm, .. } => lm.totals(),
            Self::Classifier { .. } => Usage::default(),
        }
    }

    /// One result per row, in order. `on_row` hears how many are done.
    ///
    /// # Errors
    /// When the sentence encoder fails; what a language model says is in the results.
    pub fn run(
        &self,
        rows: &[Example],
        label_field: &str,
        on_row: &(dyn Fn(usize) + Sync),
    ) -> Result<Vec<RowResult>, StepError> {
        let done = std::sync::atomic::AtomicUsize::new(0);
        let count = |_: usize| {
            on_row(1 + done.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        };
        match self {
            Self::Prompt {
                program,
                lm,
                sampling,
                at_once,
            } => {
                let usual = RunOptions::default();
                let options = RunOptions {
                    batch: usual.batch.max(*at_once),
                    on_row: Some(&count),
                    ..usual
                };
                Ok(program.run(lm.as_ref(), sampling, rows, &options))
            }
            Self::Classifier {
                classifier,
                encoder,
            } => {
                let texts: Vec<&str> = rows
                    .iter()
                    .map(|row| row.text(TEXT).unwrap_or_default())
                    .collect();
                let predictions = classifier
                    .predict(encoder.as_ref(), &texts)
                    .map_err(|e| StepError::failed(e.to_string()))?;
                on_row(rows.len());
                let result = |(row, predicted): (&Example, _)| {
                    let flowrun_lm::classifier::ClassPrediction {
                        label,
                        confidence,
                        probs,
                    } = predicted;
                    let fields = Fields::from([(label_field.to_owned(), label.into())]);
                    RowResult {
                        id: row.id.clone(),
                        prediction: Ok(Prediction { fields }),
                        trace: Vec::new(),
                        raw: None,
                        tokens: Tokens::default(),
                        probs: Some(probs),
                        confidence: Some(confidence),
                        cut_off: false,
                    }
                };
                Ok(rows.iter().zip(predictions).map(result).collect())
            }
        }
    }
}

/// Rows for one call of a model: many times what is in flight, so that one slow answer keeps few
/// places empty; of a batch, all, as its answers come together.
pub(crate) fn rows_at_once(model: &ModelSpec) -> usize {
    const WAVES: usize = 16;
    match model {
        ModelSpec::OpenAi(spec) if spec.batch => usize::MAX,
        ModelSpec::OpenAi(spec) => spec.concurrency.saturating_mul(WAVES),
        ModelSpec::Embedded(_) | ModelSpec::SentenceEncoder(_) => 0,
    }
}

/// Opens the sentence encoder of each predictor that chooses demos by similarity; one that
/// several share is opened once.
///
/// # Errors
/// When an encoder cannot be had.
pub fn attach_encoders(
    saved: &SavedProgram,
    program: &mut Program,
    host: &Host<'_>,
) -> Result<(), StepError> {
    let mut opened: Vec<(&serde_json::Value, Arc<dyn Embedder + Send + Sync>)> = Vec::new();
    for predictor in &mut program.predictors {
        let (Some(neighbours), Some(saved)) = (
            predictor.neighbours.as_mut(),
            saved.neighbours.get(&predictor.name),
        ) else {
            continue;
        };
        let known = opened.iter().find(|(entry, _)| **entry == saved.embedder);
        let encoder = match known {
            Some((_, encoder)) => Arc::clone(encoder),
            None => {
                let encoder = open_encoder(&encoder_spec(&saved.embedder)?, host)?;
                opened.push((&saved.embedder, Arc::clone(&encoder)));
                encoder
            }
        };
        neighbours.embedder = Some(encoder);
    }
    Ok(())
}

/// What a server is asked for a row, by the names of the program's inputs; `None` where that is
/// the text alone.
#[must_use]
pub fn question(inputs: &[RowInput], row: &Row) -> Option<BTreeMap<String, serde_json::Value>> {
    if let [only] = inputs
        && only.column == TEXT
    {
        return None;
    }
    let value = |input: &RowInput| match input.column.as_str() {
        TEXT => Some(row.text.clone().into()),
        column => row.extra.get(column).cloned(),
    };
    let given = inputs
        .iter()
        .filter_map(|input| Some((input.name.clone(), value(input)?)));
    Some(given.collect())
}

/// Rows as programs see them, the label under the name that the program gives it.
#[must_use]
pub fn examples(rows: &[Row], label_field: &str) -> Vec<Example> {
    let example = |row: &Row| {
        let columns = [
            (TEXT, Some(&row.text)),
            ("reasoning", row.reasoning.as_ref()),
            (label_field, row.label.as_ref()),
        ];
        let given = columns
            .into_iter()
            .filter_map(|(name, text)| Some((name, text?.as_str())));
        let mut example = Example::of_texts(row.id.clone(), given);
        // Further columns of the source, for programs with more inputs than the text.
        for (column, value) in &row.extra {
            let value = serde_json::from_value(value.clone()).unwrap_or(Value::Null);
            example.fields.entry(column.clone()).or_insert(value);
        }
        example
    };
    rows.iter().map(example).collect()
}

/// The metric of the answers that cost nothing, where there are some.
pub(crate) const KEPT_ANSWERS: &str = "kept_answers";

/// Adds what a step spent to what it reports: `tokens`, `kept_answers` where there are some, and
/// `cost_usd` where prices are known.
#[must_use]
pub(crate) fn with_usage(outcome: StepOutcome, usage: &Usage) -> StepOutcome {
    let tokens = usage.prompt_tokens + usage.completion_tokens;
    let mut outcome = outcome.metric("tokens", tokens);
    if usage.cached > 0 {
        outcome = outcome.metric(KEPT_ANSWERS, usage.cached);
    }
    match usage.cost {
        Some(cost) => outcome.metric("cost_usd", cost),
        None => outcome,
    }
}

/// A metric that tells the labels apart.
///
/// # Errors
/// Invalid, naming two labels that it takes for one.
pub(crate) fn check_metric(metric: MetricKind, labels: &[String]) -> Result<(), StepError> {
    let Some((one, other)) = metric.takes_for_one(labels) else {
        return Ok(());
    };
    let text = format!(
        "the labels `{one}` and `{other}` are equal to `metric: exact_match`, which leaves case, \
         punctuation and articles out"
    );
    Err(StepError::invalid(text).help("set `metric: label_equality`"))
}

/// The metric of the rows whose prompts were too long for the model, where there are some.
const TOO_LONG: &str = "too_long";

/// Whether the row's prompt did not fit into the model's context.
#[must_use]
pub fn is_too_long(result: &RowResult) -> bool {
    matches!(result.prediction, Err(RowError::Lm(LmError::TooLong(_))))
}

/// Adds how many prompts were too long, where some were.
#[must_use]
pub(crate) fn with_too_long(outcome: StepOutcome, rows: usize) -> StepOutcome {
    match rows {
        0 => outcome,
        rows => outcome.metric(TOO_LONG, rows),
    }
}

/// Stops a step none of whose prompts fits into the model's context: then it is no fault of rows.
///
/// # Errors
/// Failed, with the first reason.
pub fn check_fits(results: &[RowResult]) -> Result<(), StepError> {
    let Some(first) = results.first().filter(|_| results.iter().all(is_too_long)) else {
        return Ok(());
    };
    let why = first.prediction.as_ref().err();
    let why = why.map(ToString::to_string).unwrap_or_default();
    let text = format!(
        "none of {} prompts fits into the model's context: {why}",
        results.len()
    );
    Err(StepError::failed(text)
        .help("take a model with a longer context, or fewer demos and a smaller `max_tokens`"))
}

/// Stops a step whose model did not answer some rows: an outage is no score. A row whose prompt is
/// too long is none: it has no answer, and the others stand. What was used so far is told, as a
/// failed step reports no metrics.
///
/// # Errors
/// Cancelled; invalid when the program does not fit the rows; transient while the model cannot be reached, failed when it refused; with the first
/// reason.
pub(crate) fn check_answered(
    ctx: &StepContext,
    results: &[RowResult],
    usage: &Usage,
) -> Result<(), StepError> {
    ctx.check_cancelled()?;
    // The program cannot ask about this row at all: no model is to blame, and it is no score.
    if let Some((id, why)) = results.iter().find_map(|result| match &result.prediction {
        Err(RowError::Other(why)) => Some((&result.id, why)),
        _ => None,
    }) {
        return Err(
            StepError::invalid(format!("row `{id}` cannot be asked: {why}")).help(
                "check the program's `inputs` (`from` names the column of the row, such as `text`), and \
                 for demos by similarity its sentence encoder",
            ),
        );
    }
    let mut lost: Vec<&LmError> = results
        .iter()
        .filter_map(|result| match &result.prediction {
            // The row's own fault.
            Err(RowError::Lm(LmError::TooLong(_))) => None,
            Err(RowError::Lm(error)) => Some(error),
            _ => None,
        })
        .collect();
    // Of several reasons, the one that must be seen to.
    lost.sort_by_key(|error| match error {
        LmError::Barred(_) | LmError::NoModel(_) => 0,
        LmError::Rejected(_) => 1,
        _ => 2,
    });
    let Some(first) = lost.first() else {
        return Ok(());
    };
    // What a server refuses once it refuses again.
    let passes = lost.iter().all(|e| matches!(e, LmError::Unavailable(_)));
    let kind = if passes {
        StepErrorKind::Transient
    } else {
        StepErrorKind::Failed
    };
    let (lost, all) = (lost.len(), results.len());
    let mut text = format!("{lost} of {all} rows got no answer: {first}");
    let tokens = usage.prompt_tokens + usage.completion_tokens;
    if tokens > 0 {
        let cost = usage.cost.map(|cost| format!(", ${cost:.4}"));
        text += &format!(
            " (this attempt used {tokens} tokens{})",
            cost.unwrap_or_default()
        );
    }
    Err(StepError::new(kind, text)
        .help("the answers that came are kept; a later run asks only for the rest"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn result(prediction: Result<Prediction, RowError>) -> RowResult {
        RowResult {
            id: "0".into(),
            prediction,
            trace: Vec::new(),
            raw: None,
            tokens: Tokens::default(),
            probs: None,
            confidence: None,
            cut_off: false,
        }
    }

    #[test]
    fn long_prompts_are_the_rows_own_matter_unless_none_fits() {
        let long = || result(Err(RowError::Lm(LmError::TooLong("8 of 4 tokens".into()))));
        let answered = || result(Ok(Prediction::default()));
        assert_eq!(
            [long(), answered()]
                .iter()
                .filter(|r| is_too_long(r))
                .count(),
            1
        );
        assert!(check_fits(&[]).is_ok());
        assert!(check_fits(&[long(), answered()]).is_ok());
        let refused = check_fits(&[long(), long()]).unwrap_err().message;
        let said = "none of 2 prompts fits into the model's context: context_length_exceeded: 8 of";
        assert!(refused.starts_with(said), "{refused}");
    }
}
