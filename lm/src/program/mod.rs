//! [`Program`]: predictors run one after another over rows. Each sees the row's
//! columns and the outputs before it; the last one's outputs are the
//! prediction. Rows never influence each other.

mod chain_of_thought;
mod predictor;
mod saved;
mod spec;
mod trace;

pub use chain_of_thought::{EXPERIMENTAL_REASONING_DESC, REASONING, chain_of_thought};
pub use predictor::{LabelRule, Predictor};
pub use saved::{SavedError, SavedProgram, load_dspy_json, to_dspy_json};
pub use spec::{BuildError, InputSpec, OutputSpec, OutputType, ProgramSpec, PromptSpec};
pub use trace::{RowError, RowErrorKind, RowResult, Tokens, TraceStep};

use crate::adapter::{Adapter, Dialect};
use crate::example::{Demo, Example, Prediction};
use crate::lm::{Completion, Lm, LmError, Request, Sampling};
use crate::value::Fields;

/// Called once per row as soon as it is settled, in any order, with the row's index.
pub type OnRow<'a> = dyn Fn(usize) + Sync + 'a;

/// How to run rows.
pub struct RunOptions<'a> {
    /// Rows per call of the model; 1 asks row by row, as DSPy with one thread.
    pub batch: usize,
    /// Hears of each row.
    pub on_row: Option<&'a OnRow<'a>>,
    /// Whether a demo that is the row itself is hidden from it (bootstrapping).
    pub hide_own_demo: bool,
}

impl Default for RunOptions<'_> {
    fn default() -> Self {
        Self {
            batch: 1024,
            on_row: None,
            hide_own_demo: false,
        }
    }
}

/// A prompting program.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its steps, in order.
    pub predictors: Vec<Predictor>,
    /// Whose optimizer rules it follows.
    pub dialect: Dialect,
}

/// A row under way.
struct Job<'a> {
    row: &'a Example,
    available: Fields,
    inputs: Fields,
    outcome: Option<RowError>,
    result: RowResult,
}

impl<'a> Job<'a> {
    fn new(row: &'a Example) -> Self {
        let result = RowResult {
            id: row.id.clone(),
            prediction: Ok(Prediction::default()),
            trace: Vec::new(),
            raw: None,
            tokens: Tokens::default(),
            probs: None,
            confidence: None,
        };
        Self {
            row,
            available: row.fields.clone(),
            inputs: Fields::new(),
            outcome: None,
            result,
        }
    }

    fn fail(&mut self, error: RowError) {
        self.outcome = Some(error);
    }

    /// Takes an answer; `Err` says why it cannot be read.
    fn take(
        &mut self,
        predictor: &Predictor,
        adapter: &dyn Adapter,
        completion: &Completion,
    ) -> Result<(), RowError> {
        self.result.tokens += Tokens {
            prompt: completion.prompt_tokens,
            completion: completion.completion_tokens,
            calls: 1,
            cached: u64::from(completion.cached),
        };
        self.result.raw = Some(completion.text.clone());
        let outputs = adapter
            .parse(&predictor.signature, &completion.text)
            .map_err(|error| RowError::Parse {
                reason: error.to_string(),
                raw: completion.text.clone(),
            })?;
        if let Some(probs) = &completion.choice_probs {
            self.result.confidence = probs.iter().copied().max_by(f32::total_cmp);
            self.result.probs = Some(probs.clone());
        }
        self.available.extend(outputs.clone());
        self.result.prediction = Ok(Prediction {
            fields: predictor.sanitized(&outputs),
        });
        self.result.trace.push(TraceStep {
            predictor: predictor.name.clone(),
            inputs: self.inputs.clone(),
            outputs,
        });
        Ok(())
    }

    fn finish(mut self) -> RowResult {
        if let Some(error) = self.outcome {
            self.result.prediction = Err(error);
        }
        self.result
    }
}

impl Program {
    /// A program of one or more steps.
    pub fn new(dialect: Dialect, predictors: Vec<Predictor>) -> Self {
        Self {
            predictors,
            dialect,
        }
    }

    /// The same program without demos (DSPy's `reset_copy`).
    #[must_use]
    pub fn without_demos(&self) -> Self {
        let mut copy = self.clone();
        for predictor in &mut copy.predictors {
            predictor.demos.clear();
        }
        copy
    }

    /// The demos of every predictor, by name and in order.
    pub fn demos(&self) -> Vec<(String, Vec<Demo>)> {
        self.predictors
            .iter()
            .map(|predictor| (predictor.name.clone(), predictor.demos.clone()))
            .collect()
    }

    /// The rule of the label that the last step gives, if it gives one.
    pub fn label(&self) -> Option<&LabelRule> {
        self.predictors.last()?.label.as_ref()
    }

    /// Answers every row, results in row order. Rows run in batches, step by step within a
    /// batch; a failed row takes no further part. After a cancelled call the rows left over
    /// fail as cancelled.
    pub fn run(
        &self,
        lm: &dyn Lm,
        sampling: &Sampling,
        rows: &[Example],
        options: &RunOptions<'_>,
    ) -> Vec<RowResult> {
        let mut results = Vec::with_capacity(rows.len());
        let mut cancelled = false;
        for chunk in rows.chunks(options.batch.max(1)) {
            let mut jobs: Vec<Job<'_>> = chunk.iter().map(Job::new).collect();
            if cancelled {
                jobs.iter_mut()
                    .for_each(|job| job.fail(RowError::Lm(LmError::Cancelled)));
            }
            self.run_batch(lm, sampling, &mut jobs, results.len(), options);
            cancelled |= jobs
                .iter()
                .any(|job| job.outcome.as_ref().is_some_and(RowError::is_cancelled));
            results.extend(jobs.into_iter().map(Job::finish));
        }
        results
    }

    fn run_batch(
        &self,
        lm: &dyn Lm,
        sampling: &Sampling,
        jobs: &mut [Job<'_>],
        first_row: usize,
        options: &RunOptions<'_>,
    ) {
        let last = self.predictors.len().saturating_sub(1);
        let told: Vec<std::sync::atomic::AtomicBool> = jobs.iter().map(|_| false.into()).collect();
        let tell = |at: usize| {
            if let Some(on_row) = options.on_row
                && !told[at].swap(true, std::sync::atomic::Ordering::Relaxed)
            {
                on_row(first_row + at);
            }
        };
        for (stage, predictor) in self.predictors.iter().enumerate() {
            for job in jobs.iter_mut() {
                job.inputs = predictor.inputs(&job.available);
            }
            let adapter = &*predictor.adapter;
            let live: Vec<usize> = (0..jobs.len())
                .filter(|&at| jobs[at].outcome.is_none())
                .collect();
            let settles = stage == last && adapter.fallback().is_none();
            let call = Call {
                lm,
                sampling,
                predictor,
                hide_own_demo: options.hide_own_demo,
            };
            let failed = call.ask(adapter, jobs, &live, &|at| {
                if settles {
                    tell(at);
                }
            });
            if let Some(fallback) = adapter.fallback() {
                call.ask(fallback, jobs, &failed, &|_| {});
            }
        }
        (0..jobs.len()).for_each(tell);
    }
}

/// One step of one batch.
struct Call<'a> {
    lm: &'a dyn Lm,
    sampling: &'a Sampling,
    predictor: &'a Predictor,
    hide_own_demo: bool,
}

impl Call<'_> {
    /// Asks for the jobs at `live`; the ones whose answers cannot be read are returned.
    fn ask(
        &self,
        adapter: &dyn Adapter,
        jobs: &mut [Job<'_>],
        live: &[usize],
        on_answer: &(dyn Fn(usize) + Sync),
    ) -> Vec<usize> {
        let mut asked = Vec::with_capacity(live.len());
        let mut requests: Vec<Request> = Vec::with_capacity(live.len());
        for &at in live {
            let job = &mut jobs[at];
            job.outcome = None;
            let but = self.hide_own_demo.then_some(job.row);
            match self
                .predictor
                .request(adapter, &job.inputs, self.sampling, but)
            {
                Ok(request) => {
                    asked.push(at);
                    requests.push(request);
                }
                Err(error) => job.fail(RowError::Other(error.to_string())),
            }
        }
        if requests.is_empty() {
            return Vec::new();
        }
        let answers = self.lm.complete(&requests, &|index, _| {
            if let Some(&at) = asked.get(index) {
                on_answer(at);
            }
        });
        let mut answers = answers.into_iter();
        let mut unread = Vec::new();
        for at in asked {
            match answers.next() {
                None => jobs[at].fail(RowError::Other(
                    "the model left a call unanswered".to_owned(),
                )),
                Some(Err(error)) => jobs[at].fail(RowError::Lm(error)),
                Some(Ok(completion)) => {
                    if let Err(error) = jobs[at].take(self.predictor, adapter, &completion) {
                        jobs[at].fail(error);
                        unread.push(at);
                    }
                }
            }
        }
        unread
    }
}

#[cfg(test)]
mod tests;
