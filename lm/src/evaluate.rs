//! [`Evaluate`]: runs a program over rows and scores it, as DSPy's `Evaluate`
//! does. Failures score 0 and are counted by kind; rows stay in order.

use crate::example::{Example, Prediction};
use crate::lm::{Lm, Sampling};
use crate::metric::Metric;
use crate::program::{Program, RowErrorKind, RowResult, RunOptions, Tokens};
use crate::python_text::round;
use serde::{Deserialize, Serialize};

/// How to score a program.
pub struct Evaluate<'a> {
    /// Scores each prediction.
    pub metric: &'a Metric<'a>,
    /// The column and field that hold the label, for the rows of the result.
    pub label: &'a str,
    /// As many failed rows end the evaluation with an error (DSPy's rule: 1 tolerates none).
    pub max_errors: usize,
}

/// Why there is no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvaluateError {
    /// Nothing to score.
    #[error("there are no rows to evaluate; give a dev set with at least one row")]
    Empty,
    /// Too many rows failed.
    #[error("{errors} rows failed (`max_errors` is {max}); the last: {last}")]
    TooManyErrors {
        /// Rows failed.
        errors: usize,
        /// The limit.
        max: usize,
        /// Why the last one failed.
        last: String,
    },
    /// The run was asked to stop.
    #[error("stopped")]
    Cancelled,
}

/// A row's part of the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluatedRow {
    /// The row's id.
    pub id: String,
    /// Its label, when it has one.
    pub gold: Option<String>,
    /// The predicted label, when there is one.
    pub pred: Option<String>,
    /// The model's last answer as it came.
    pub raw: Option<String>,
    /// What the metric gave; 0 for failed rows.
    pub score: f64,
    /// Whether the score is at least 1.
    pub correct: bool,
    /// Probability of the predicted label, for constrained programs.
    pub confidence: Option<f32>,
    /// Why the row failed.
    pub error: Option<String>,
    /// The kind of failure.
    pub error_kind: Option<RowErrorKind>,
}

/// How good a program is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationResult {
    /// Rows.
    pub n: usize,
    /// Sum of the metric.
    pub correct: f64,
    /// Percent, rounded to two digits as Python rounds.
    pub score: f64,
    /// `correct / n`.
    pub accuracy: f64,
    /// Rows whose answer could not be read.
    pub parse_failures: usize,
    /// Rows that the model did not answer.
    pub lm_failures: usize,
    /// Rows that failed otherwise.
    pub other_failures: usize,
    /// Row by row, in order.
    pub rows: Vec<EvaluatedRow>,
    /// What it cost.
    pub tokens: Tokens,
}

impl Evaluate<'_> {
    /// Runs and scores the program.
    ///
    /// # Errors
    /// When there are no rows, too many fail, or the run is asked to stop.
    pub fn run(
        &self,
        program: &Program,
        lm: &dyn Lm,
        sampling: &Sampling,
        rows: &[Example],
        options: &RunOptions<'_>,
    ) -> Result<EvaluationResult, EvaluateError> {
        let mut tally = self.tally();
        for (index, batch) in rows.chunks(options.batch.max(1)).enumerate() {
            let first = index * options.batch.max(1);
            let on_row = |row: usize| {
                if let Some(on_row) = options.on_row {
                    on_row(first + row);
                }
            };
            let options = RunOptions {
                on_row: Some(&on_row),
                ..*options
            };
            for (row, result) in batch.iter().zip(program.run(lm, sampling, batch, &options)) {
                tally.add(row, result)?;
            }
        }
        tally.finish()
    }

    /// For results that come one by one.
    pub(crate) fn tally(&self) -> Tally<'_> {
        Tally::new(self)
    }

    /// Scores results that are there already.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn score(
        &self,
        rows: &[Example],
        results: impl IntoIterator<Item = RowResult>,
    ) -> Result<EvaluationResult, EvaluateError> {
        let mut tally = self.tally();
        for (row, result) in rows.iter().zip(results) {
            tally.add(row, result)?;
        }
        tally.finish()
    }
}

/// An evaluation under way.
pub(crate) struct Tally<'a> {
    evaluate: &'a Evaluate<'a>,
    errors: usize,
    tokens: Tokens,
    rows: Vec<EvaluatedRow>,
}

impl<'a> Tally<'a> {
    fn new(evaluate: &'a Evaluate<'a>) -> Self {
        Self {
            evaluate,
            errors: 0,
            tokens: Tokens::default(),
            rows: Vec::new(),
        }
    }

    /// Rows so far.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// What they cost.
    pub(crate) fn tokens(&self) -> Tokens {
        self.tokens
    }

    /// The score of all `total` rows, in percent, if those still to come are all right. Never below
    /// the score that they will have, for metrics of at most 1.
    pub(crate) fn at_most(&self, total: usize) -> f64 {
        let sum: f64 = self.rows.iter().map(|row| row.score).sum();
        let most = sum + (total - self.rows.len()) as f64;
        // The sum of the whole is taken in another order, which may round it up.
        round(100.0 * most / total as f64 + 1e-9, 2)
    }

    /// Ends it; the rows were added in this order of their places.
    pub(crate) fn finish_in(mut self, order: &[usize]) -> Result<EvaluationResult, EvaluateError> {
        let mut placed: Vec<(usize, EvaluatedRow)> = order
            .iter()
            .copied()
            .zip(std::mem::take(&mut self.rows))
            .collect();
        placed.sort_by_key(|(place, _)| *place);
        self.rows = placed.into_iter().map(|(_, row)| row).collect();
        self.finish()
    }

    /// Adds the next row.
    pub(crate) fn add(
        &mut self,
        example: &Example,
        result: RowResult,
    ) -> Result<(), EvaluateError> {
        self.tokens += result.tokens;
        let prediction = result.prediction.as_ref().ok().cloned();
        let scored = self.score(example, &result)?;
        let (score, error) = match scored {
            Ok(score) => (score, None),
            Err(error) => (0.0, Some(error)),
        };
        if let Some((_, reason)) = &error {
            self.errors += 1;
            if self.errors >= self.evaluate.max_errors {
                return Err(EvaluateError::TooManyErrors {
                    errors: self.errors,
                    max: self.evaluate.max_errors,
                    last: reason.clone(),
                });
            }
        }
        let label = self.evaluate.label;
        let pred = prediction
            .as_ref()
            .and_then(|prediction| Some(prediction.text(label)?.to_owned()));
        self.rows.push(EvaluatedRow {
            id: result.id,
            gold: example.text(label).map(str::to_owned),
            pred,
            raw: result.raw,
            score,
            correct: score >= 1.0,
            confidence: result.confidence,
            error_kind: error.as_ref().map(|(kind, _)| *kind),
            error: error.map(|(_, reason)| reason),
        });
        Ok(())
    }

    #[allow(clippy::type_complexity)]
    fn score(
        &self,
        example: &Example,
        result: &RowResult,
    ) -> Result<Result<f64, (RowErrorKind, String)>, EvaluateError> {
        let prediction: &Prediction = match &result.prediction {
            Ok(prediction) => prediction,
            Err(error) if error.is_cancelled() => return Err(EvaluateError::Cancelled),
            Err(error) => return Ok(Err((error.kind(), error.to_string()))),
        };
        Ok((self.evaluate.metric)(example, prediction)
            .map_err(|reason| (RowErrorKind::Other, reason)))
    }

    fn finish(self) -> Result<EvaluationResult, EvaluateError> {
        let n = self.rows.len();
        if n == 0 {
            return Err(EvaluateError::Empty);
        }
        let correct: f64 = self.rows.iter().map(|row| row.score).sum();
        let failures = |kind| {
            self.rows
                .iter()
                .filter(|row| row.error_kind == Some(kind))
                .count()
        };
        Ok(EvaluationResult {
            n,
            correct,
            score: round(100.0 * correct / n as f64, 2),
            accuracy: correct / n as f64,
            parse_failures: failures(RowErrorKind::Parse),
            lm_failures: failures(RowErrorKind::Lm),
            other_failures: failures(RowErrorKind::Other),
            tokens: self.tokens,
            rows: self.rows,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::lm::LmError;
    use crate::metric::MetricKind;
    use crate::program::RowError;

    fn result(prediction: Result<&str, RowError>) -> RowResult {
        RowResult {
            id: "0".into(),
            prediction: prediction.map(|label| Prediction {
                fields: [("label".to_owned(), label.into())].into_iter().collect(),
            }),
            trace: Vec::new(),
            raw: None,
            tokens: Tokens {
                prompt: 2,
                completion: 1,
                calls: 1,
                cached: 0,
            },
            probs: None,
            confidence: None,
            cut_off: false,
        }
    }

    fn score(
        max_errors: usize,
        results: Vec<RowResult>,
    ) -> Result<EvaluationResult, EvaluateError> {
        let metric = MetricKind::LabelEquality.metric("label");
        let rows = vec![Example::of_texts("0", [("label", "a")]); results.len()];
        Evaluate {
            metric: &metric,
            label: "label",
            max_errors,
        }
        .score(&rows, results)
    }

    fn unread() -> RowResult {
        result(Err(RowError::Parse {
            reason: "no label".into(),
            raw: "x".into(),
        }))
    }

    #[test]
    fn failures_score_nothing_and_are_told_apart() {
        let lm = result(Err(RowError::Lm(LmError::Unavailable("down".into()))));
        let result = score(10, vec![result(Ok("a")), result(Ok("b")), unread(), lm]).unwrap();
        assert_eq!((result.n, result.score), (4, 25.0));
        assert_eq!((result.parse_failures, result.lm_failures), (1, 1));
        assert_eq!(result.rows[1].pred.as_deref(), Some("b"));
        assert_eq!(result.tokens.calls, 4);
    }

    #[test]
    fn as_many_errors_as_allowed_end_it() {
        assert!(score(3, vec![unread(), unread()]).is_ok());
        let error = score(2, vec![unread(), unread()]).unwrap_err();
        assert!(matches!(
            error,
            EvaluateError::TooManyErrors { errors: 2, .. }
        ));
        assert_eq!(score(1, Vec::new()), Err(EvaluateError::Empty));
        let cancelled = result(Err(RowError::Lm(LmError::Cancelled)));
        assert_eq!(score(1, vec![cancelled]), Err(EvaluateError::Cancelled));
    }
}
