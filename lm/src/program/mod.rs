//! [`Program`]: predictors run one after another over rows. Each sees the row's
//! columns and the outputs before it; the last one's outputs are the
//! prediction. Rows never influence each other.

mod chain_of_thought;
mod dspy_json;
mod neighbours;
mod predictor;
mod row_inputs;
mod saved;
mod spec;
mod trace;
mod votes;

pub use chain_of_thought::{EXPERIMENTAL_REASONING_DESC, REASONING, chain_of_thought};
pub use dspy_json::{dspy_file, load_dspy_json, to_dspy_json};
pub use neighbours::{Neighbours, embedded_text};
pub use predictor::{LabelRule, Predictor};
pub use row_inputs::RowInput;
pub use saved::{SavedError, SavedNeighbours, SavedProgram};
pub use spec::{
    BuildError, InputSpec, MajoritySpec, OutputSpec, OutputType, ProgramSpec, PromptSpec, StageSpec,
};
pub use trace::{RowError, RowErrorKind, RowResult, Tokens, TraceStep};
pub use votes::Votes;

use crate::adapter::{Adapter, Dialect};
use crate::example::{Demo, Example, Prediction};
use crate::lm::{Completion, FinishReason, Lm, LmError, Request, Sampling};
use crate::metric::{alike, normalize_text};
use crate::value::{Fields, Value};

/// Why an answer that ended too early is not taken.
pub const CUT_OFF: &str = "the answer was cut off at `max_tokens`";
/// Why there is an empty answer.
const WITHHELD: &str = "the provider withheld the answer (content filter)";

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
    /// When the predictors are those of several members that vote, or one member votes with
    /// several samples.
    pub votes: Option<Votes>,
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
            cut_off: false,
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
        let unread = |reason: String| RowError::Parse {
            reason,
            raw: completion.text.clone(),
        };
        if completion.finish == FinishReason::ContentFilter {
            return Err(unread(WITHHELD.to_owned()));
        }
        let full = completion.finish == FinishReason::Length;
        let parsed = adapter.parse(&predictor.signature, &completion.text);
        let outputs = parsed.map_err(|error| match full {
            true => unread(format!("{CUT_OFF}: {error}")),
            false => unread(error.to_string()),
        })?;
        // What the next letter changes was not at its end.
        let longer = || adapter.parse(&predictor.signature, &format!("{}x", completion.text));
        self.result.cut_off |= full && longer().is_ok_and(|longer| longer != outputs);
        // Those of an earlier step say nothing about this one's answer.
        let probs = completion.choice_probs.clone();
        let fields = predictor.sanitized(&outputs);
        let sure = probs.as_ref().zip(predictor.label.as_ref());
        self.result.confidence = sure.and_then(|(probs, rule)| {
            let label = fields.get(&rule.field).and_then(Value::as_str)?;
            rule.probability(label, probs)
        });
        self.result.probs = probs;
        self.available.extend(outputs.clone());
        self.result.prediction = Ok(Prediction { fields });
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
            votes: None,
        }
    }

    /// The same program without demos (DSPy's `reset_copy`).
    #[must_use]
    pub(crate) fn without_demos(&self) -> Self {
        let mut copy = self.clone();
        for predictor in &mut copy.predictors {
            predictor.demos.clear();
            predictor.neighbours = None;
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
        match &self.votes {
            None => self.run_once(lm, sampling, rows, options),
            Some(votes) => self.run_votes(votes, lm, sampling, rows, options),
        }
    }

    /// The members of a program that votes.
    fn members(&self, votes: &Votes) -> Vec<Self> {
        let mut rest = self.predictors.as_slice();
        let member = |count: &usize| {
            let (own, others) = rest.split_at((*count).min(rest.len()));
            rest = others;
            Self::new(self.dialect, own.to_vec())
        };
        votes.members.iter().map(member).collect()
    }

    fn run_votes(
        &self,
        votes: &Votes,
        lm: &dyn Lm,
        sampling: &Sampling,
        rows: &[Example],
        options: &RunOptions<'_>,
    ) -> Vec<RowResult> {
        let members = self.members(votes);
        let rounds: Vec<(&Self, usize)> = (members.iter())
            .flat_map(|member| (0..votes.samples.max(1)).map(move |sample| (member, sample)))
            .collect();
        let mut ballots: Vec<Vec<RowResult>> = rows.iter().map(|_| Vec::new()).collect();
        for (round, (member, sample)) in rounds.iter().enumerate() {
            let last = round + 1 == rounds.len();
            let own = RunOptions {
                // A row is settled by its last answer.
                on_row: options.on_row.filter(|_| last),
                ..*options
            };
            let drawn = votes.sampling(sampling, *sample);
            let results = member.run_once(lm, &drawn, rows, &own);
            let lost = results.iter().find_map(outage).cloned();
            for (ballots, result) in ballots.iter_mut().zip(results) {
                ballots.push(result);
            }
            // Further rounds would be paid for in vain: some rows must be asked again anyway.
            if let Some(error) = lost.filter(|_| !last) {
                for (row, ballots) in ballots.iter_mut().enumerate() {
                    end_early(ballots, &error);
                    if let Some(on_row) = options.on_row {
                        on_row(row);
                    }
                }
                break;
            }
        }
        let field = self.voted_field();
        // Labels that differ only in what the normalisation leaves out are labels of their own, and
        // so is one of which it leaves nothing.
        let mut rules = self.predictors.iter().filter_map(|p| p.label.as_ref());
        let exact = rules.any(|rule| {
            let nothing = |label: &String| normalize_text(label).is_empty();
            alike(&rule.labels).is_some() || rule.labels.iter().any(nothing)
        });
        let chosen = ballots
            .into_iter()
            .filter_map(|ballots| votes::majority(ballots, field, exact));
        chosen.collect()
    }

    /// The output that is voted on: the label, else the last one.
    fn voted_field(&self) -> &str {
        let last = self
            .predictors
            .last()
            .and_then(|p| p.signature.outputs.last());
        match (self.label(), last) {
            (Some(rule), _) => &rule.field,
            (None, Some(output)) => &output.name,
            (None, None) => "",
        }
    }

    fn run_once(
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

/// Why the model gave a row no answer, unless it is the row's own fault.
fn outage(result: &RowResult) -> Option<&LmError> {
    match &result.prediction {
        Err(RowError::Lm(LmError::Rejected(_) | LmError::ServerError(_) | LmError::TooLong(_))) => {
            None
        }
        Err(RowError::Lm(error)) => Some(error),
        _ => None,
    }
}

/// A row that was not asked in every round has no majority.
fn end_early(ballots: &mut [RowResult], error: &LmError) {
    if let Some(ballot) = ballots.last_mut()
        && !matches!(ballot.prediction, Err(RowError::Lm(_)))
    {
        ballot.prediction = Err(RowError::Lm(error.clone()));
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
    /// The demos that are chosen for each of the jobs at `live`.
    fn near_demos(&self, jobs: &[Job<'_>], live: &[usize]) -> Result<Vec<Vec<Demo>>, String> {
        match &self.predictor.neighbours {
            Some(neighbours) if !live.is_empty() => {
                let queries: Vec<&Fields> = live.iter().map(|&at| &jobs[at].inputs).collect();
                neighbours.demos_for(&queries)
            }
            _ => Ok(vec![Vec::new(); live.len()]),
        }
    }

    /// Asks for the jobs at `live`; the ones whose answers cannot be read are returned.
    fn ask(
        &self,
        adapter: &dyn Adapter,
        jobs: &mut [Job<'_>],
        live: &[usize],
        on_answer: &(dyn Fn(usize) + Sync),
    ) -> Vec<usize> {
        let near = match self.near_demos(jobs, live) {
            Ok(near) => near,
            Err(why) => {
                let fail = |&at: &usize| jobs[at].fail(RowError::Other(why.clone()));
                live.iter().for_each(fail);
                return Vec::new();
            }
        };
        let mut asked = Vec::with_capacity(live.len());
        let mut requests: Vec<Request> = Vec::with_capacity(live.len());
        for (place, &at) in live.iter().enumerate() {
            let job = &mut jobs[at];
            job.outcome = None;
            let but = self.hide_own_demo.then_some(job.row);
            match self
                .predictor
                .request(adapter, &job.inputs, self.sampling, &near[place], but)
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
                        // Another format of the same prompt is withheld too.
                        if completion.finish != FinishReason::ContentFilter {
                            unread.push(at);
                        }
                    }
                }
            }
        }
        unread
    }
}

#[cfg(test)]
mod tests;
