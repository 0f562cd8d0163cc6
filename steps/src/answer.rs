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
    let mut outcome = outcome.metric("tokens", usage.tokens());
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

/// The metric of the rows that were dropped because the server refuses them, where there are some.
const FAILED: &str = "failed";

/// How many rows a step may drop because their server refuses them for good, and how many it has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Refusals {
    most: usize,
    rows: usize,
    /// Some row had an answer.
    answered: bool,
}

impl Refusals {
    /// None yet, and at most so many: `max_failed`.
    pub(crate) fn at_most(most: usize) -> Self {
        Self {
            most,
            ..Self::default()
        }
    }

    /// Adds how many there were, where there were some.
    #[must_use]
    pub(crate) fn told(self, outcome: StepOutcome) -> StepOutcome {
        match self.rows {
            0 => outcome,
            rows => outcome.metric(FAILED, rows),
        }
    }

    /// Why rows are not dropped, for the end of a sentence.
    fn why_not(self) -> String {
        let Self { most, rows, .. } = self;
        match self.answered {
            true => format!("; {rows} failed in all (`max_failed` is {most})"),
            false => "; not one was answered, so none is dropped (`max_failed`)".to_owned(),
        }
    }

    /// Takes the rows of one call; whether they may be dropped. A server that has refused every row
    /// so far refuses more than rows.
    fn admit(&mut self, refused: usize, all: usize) -> bool {
        self.answered |= refused < all;
        self.rows += refused;
        self.answered && self.rows <= self.most
    }
}

/// Whether the server refuses this row for good, while others may be answered: it says no to it, or
/// had an error of its own at every try.
fn is_refused(result: &RowResult) -> bool {
    matches!(
        result.prediction,
        Err(RowError::Lm(LmError::Rejected(_) | LmError::ServerError(_)))
    )
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
/// too long is none: it has no answer, and the others stand; so it is with those that the server
/// refuses, as many as `refusals` allow. What was used so far is told, as a failed step reports no
/// metrics.
///
/// # Errors
/// Cancelled; invalid when the program does not fit the rows; transient while the model cannot be
/// reached, failed when it refused; with the weightiest reason.
pub(crate) fn check_answered(
    ctx: &StepContext,
    results: &[RowResult],
    usage: &Usage,
    refusals: &mut Refusals,
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
    let refused = results.iter().filter(|result| is_refused(result)).count();
    if refusals.admit(refused, results.len()) && refused == lost.len() {
        return Ok(());
    }
    // Of several reasons, the one that must be seen to; of an outage, what ended it, which those
    // have that were not sent any more.
    lost.reverse();
    lost.sort_by_key(|error| match error {
        LmError::Barred(_) | LmError::NoModel(_) => 0,
        LmError::Rejected(_) => 1,
        LmError::ServerError(_) => 3,
        _ => 2,
    });
    let Some(first) = lost.first() else {
        return Ok(());
    };
    // What a server refuses once it refuses again.
    let may_pass = |e: &&LmError| matches!(e, LmError::Unavailable(_) | LmError::ServerError(_));
    let passes = lost.iter().all(may_pass);
    let kind = if passes {
        StepErrorKind::Transient
    } else {
        StepErrorKind::Failed
    };
    let (lost, all) = (lost.len(), results.len());
    let mut text = format!("{lost} of {all} rows got no answer: {first}");
    if refused == lost && refusals.most > 0 {
        text += &refusals.why_not();
    }
    let tokens = usage.tokens();
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

    #[test]
    fn rows_that_the_server_refuses_are_dropped_up_to_a_number() {
        let mut none = Refusals::default();
        assert!(none.admit(0, 4));
        assert!(!none.admit(1, 4));
        // Over several calls.
        let mut two = Refusals::at_most(2);
        assert!(two.admit(1, 4) && two.admit(0, 4) && two.admit(1, 1));
        assert!(!two.admit(1, 4));
        let told = two.told(StepOutcome::default());
        assert_eq!(told.metrics["failed"], 3);
        // It may well be something else than the rows.
        assert!(!Refusals::at_most(100).admit(4, 4));
    }

    #[test]
    fn only_what_the_server_says_of_a_row_is_the_rows_own_matter() {
        let of = |error: LmError| is_refused(&result(Err(RowError::Lm(error))));
        let why = || "no".to_owned();
        assert!(of(LmError::Rejected(why())) && of(LmError::ServerError(why())));
        for error in [
            LmError::Unavailable(why()),
            LmError::Barred(why()),
            LmError::NoModel(why()),
            LmError::TooLong(why()),
            LmError::Cancelled,
        ] {
            assert!(!of(error.clone()), "{error:?}");
        }
        assert!(!is_refused(&result(Ok(Prediction::default()))));
    }
}
