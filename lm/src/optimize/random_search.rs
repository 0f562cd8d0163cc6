//! [`RandomSearch`]: DSPy's `BootstrapFewShotWithRandomSearch`: programs with no
//! demos, labelled ones, and bootstrapped ones from differently shuffled train
//! sets, each scored on the validation set; the best wins.

use super::{
    BootstrapFewShot, Candidate, Compiled, LabeledFewShot, OptimizeError, Optimizer, Progress,
    Session,
};
use crate::evaluate::{Evaluate, EvaluateError, EvaluationResult};
use crate::example::Example;
use crate::program::{Program, RunOptions, Tokens};
use crate::python_random::PythonRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Settings of the search, by DSPy's names and defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RandomSearch {
    /// Training rows to work out at most; shuffled candidates draw from 1 to this many.
    pub max_bootstrapped_demos: usize,
    /// Demos in all, filled up with labelled rows.
    pub max_labeled_demos: usize,
    /// Shuffled candidates, besides the three plain ones.
    pub num_candidate_programs: usize,
    /// Tries per training row.
    pub max_rounds: usize,
    /// As many failed rows in one bootstrap or one evaluation end the search with an error.
    pub max_errors: usize,
    /// The score from which a training row counts as solved; any score but 0 without it.
    pub metric_threshold: Option<f64>,
    /// Stop as soon as a candidate reaches this many percent.
    pub stop_at_score: Option<f64>,
    /// Try only these seeds (−3 no demos, −2 labelled, −1 unshuffled, 0… shuffled).
    pub restrict: Option<Vec<i64>>,
    /// Whether the labelled candidate draws its rows; else it takes the first ones.
    pub labeled_sample: bool,
}

impl Default for RandomSearch {
    fn default() -> Self {
        Self {
            max_bootstrapped_demos: 4,
            max_labeled_demos: 16,
            num_candidate_programs: 16,
            max_rounds: 1,
            max_errors: 10,
            metric_threshold: None,
            stop_at_score: None,
            restrict: None,
            labeled_sample: true,
        }
    }
}

impl RandomSearch {
    fn seeds(&self) -> Vec<i64> {
        let count = i64::try_from(self.num_candidate_programs).unwrap_or(i64::MAX);
        let wanted = |seed: &i64| {
            self.restrict
                .as_ref()
                .is_none_or(|only| only.contains(seed))
        };
        (-3..count).filter(wanted).collect()
    }

    fn bootstrap(&self, max_bootstrapped_demos: usize) -> BootstrapFewShot {
        BootstrapFewShot {
            max_bootstrapped_demos,
            max_labeled_demos: self.max_labeled_demos,
            max_rounds: self.max_rounds,
            max_errors: self.max_errors,
            metric_threshold: self.metric_threshold,
        }
    }

    /// The program of one seed, and what making it cost.
    fn candidate(
        &self,
        seed: i64,
        student: &Program,
        trainset: &[Example],
        session: &Session<'_>,
    ) -> Result<(Program, Tokens), OptimizeError> {
        let mut shuffled;
        let (bootstrap, trainset) = match seed {
            -3 => return Ok((student.without_demos(), Tokens::default())),
            -2 => {
                let labeled = LabeledFewShot {
                    k: self.max_labeled_demos,
                    sample: self.labeled_sample,
                };
                return Ok((labeled.apply(student, trainset), Tokens::default()));
            }
            -1 => (self.bootstrap(self.max_bootstrapped_demos), trainset),
            seed => {
                shuffled = trainset.to_vec();
                PythonRandom::new(seed).shuffle(&mut shuffled);
                let most = i64::try_from(self.max_bootstrapped_demos).unwrap_or(i64::MAX);
                let size = PythonRandom::new(seed)
                    .randint(1, most)
                    .ok_or(OptimizeError::NoDemos)?;
                (
                    self.bootstrap(usize::try_from(size).unwrap_or(usize::MAX)),
                    &shuffled[..],
                )
            }
        };
        let compiled = bootstrap.compile(student, trainset, None, session)?;
        Ok((compiled.program, compiled.tokens))
    }

    fn score(
        &self,
        program: &Program,
        valset: &[Example],
        session: &Session<'_>,
    ) -> Result<EvaluationResult, EvaluateError> {
        let done = AtomicUsize::new(0);
        let on_row = |_| {
            if let Some(on_progress) = session.on_progress {
                let rows = done.fetch_add(1, Ordering::Relaxed) + 1;
                on_progress(Progress::Evaluating {
                    rows,
                    total: valset.len(),
                });
            }
        };
        let options = RunOptions {
            batch: session.batch,
            on_row: Some(&on_row),
            hide_own_demo: false,
        };
        let evaluate = Evaluate {
            metric: session.metric,
            label: session.label,
            max_errors: self.max_errors,
        };
        evaluate.run(program, session.lm, session.sampling, valset, &options)
    }
}

impl Optimizer for RandomSearch {
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        valset: Option<&[Example]>,
        session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError> {
        let valset = valset.unwrap_or(trainset);
        let seeds = self.seeds();
        let tell = |progress| {
            if let Some(on_progress) = session.on_progress {
                on_progress(progress);
            }
        };
        let mut found: Option<Compiled> = None;
        for (done, &seed) in seeds.iter().enumerate() {
            tell(Progress::Candidate {
                seed,
                done,
                total: seeds.len(),
            });
            let (program, cost) = self.candidate(seed, student, trainset, session)?;
            let result = self
                .score(&program, valset, session)
                .map_err(|source| match source {
                    EvaluateError::Cancelled => OptimizeError::Cancelled,
                    source => OptimizeError::Evaluate { seed, source },
                })?;
            let candidate = Candidate {
                seed,
                score: result.score,
                subscores: result.rows.iter().map(|row| row.score).collect(),
                parse_failures: result.parse_failures,
                demos: program.demos(),
            };
            let best =
                found.get_or_insert_with(|| Compiled::unscored(program.clone(), Tokens::default()));
            best.tokens += cost;
            best.tokens += result.tokens;
            let record = best.best.map(|at| best.candidates[at].score);
            if record.is_none_or(|record| candidate.score > record) {
                best.program = program;
                best.best = Some(best.candidates.len());
            }
            best.candidates.push(candidate);
            let record = record.map_or(result.score, |record| record.max(result.score));
            tell(Progress::Scored {
                seed,
                score: result.score,
                best: record,
            });
            if self
                .stop_at_score
                .is_some_and(|enough| result.score >= enough)
            {
                break;
            }
        }
        let last = i64::try_from(self.num_candidate_programs).unwrap_or(i64::MAX) - 1;
        found.ok_or(OptimizeError::NoCandidates(last))
    }
}
