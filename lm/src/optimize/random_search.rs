//! [`RandomSearch`]: DSPy's `BootstrapFewShotWithRandomSearch`: programs with no
//! demos, labelled ones, and bootstrapped ones from differently shuffled train
//! sets, each scored on the validation set; the best wins.
//!
//! Invariant: early stopping and concurrency change which calls are made, never the winner (with
//! a metric of at most 1, and no more failed rows than `max_errors`).

use super::kept::{CANDIDATE, Piece};
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
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    /// Stop scoring a candidate that cannot win any more, hardest rows first. The winner is the
    /// same; a stopped candidate's score is what it could have reached at best.
    pub early_stopping: bool,
    /// Candidates that are made and scored at the same time; by default 1 for a model in this
    /// process and 4 for a server. The winner is the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub concurrency: Option<usize>,
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
            early_stopping: true,
            concurrency: None,
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

    /// Candidates that it scores on the validation set at most, and how many of them have their
    /// demos worked out on the training set before.
    pub fn size(&self) -> (usize, usize) {
        let seeds = self.seeds();
        let worked_out = seeds.iter().filter(|seed| **seed >= -1).count();
        (seeds.len(), worked_out)
    }

    /// Demos that a candidate has at most, for each predictor.
    pub fn most_demos(&self) -> usize {
        self.max_labeled_demos.max(self.max_bootstrapped_demos)
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

    /// Whether no candidate after this one is needed.
    fn is_enough(&self, tried: &Tried) -> bool {
        let whole = tried.candidate.stopped_after.is_none();
        let reached = |enough| tried.candidate.score >= enough;
        whole && self.stop_at_score.is_some_and(reached)
    }
}

/// What is known of the candidates that were scored to the end: what others must beat.
#[derive(Default)]
struct Board {
    finished: Mutex<Vec<Finished>>,
}

struct Finished {
    /// Its place in the order of seeds.
    place: usize,
    score: f64,
    subscores: Vec<f64>,
}

impl Board {
    fn locked(&self) -> MutexGuard<'_, Vec<Finished>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, finished: Finished) {
        self.locked().push(finished);
    }

    fn best(&self) -> Option<f64> {
        let finished = self.locked();
        finished
            .iter()
            .map(|other| other.score)
            .max_by(f64::total_cmp)
    }

    /// Whether a candidate that can reach `most` percent at best has lost already: an earlier one
    /// keeps the lead when it has as much, a later one only takes it with more.
    fn beats(&self, place: usize, most: f64, later_count: bool) -> bool {
        self.locked().iter().any(|other| {
            if other.place < place {
                other.score >= most
            } else {
                later_count && other.score > most
            }
        })
    }

    /// The rows of a set, those first that most finished candidates got wrong: a candidate that
    /// cannot win is found out soonest there.
    fn hardest_first(&self, rows: usize) -> Vec<usize> {
        let finished = self.locked();
        let lost = |row: usize| -> f64 {
            let lost = |other: &Finished| 1.0 - other.subscores.get(row).copied().unwrap_or(1.0);
            finished.iter().map(lost).sum()
        };
        let lost: Vec<f64> = (0..rows).map(lost).collect();
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by(|a, b| lost[*b].total_cmp(&lost[*a]).then(a.cmp(b)));
        order
    }
}

/// One seed's program with its score.
struct Tried {
    program: Program,
    candidate: Candidate,
    tokens: Tokens,
}

/// A search under way.
struct Search<'a> {
    settings: &'a RandomSearch,
    student: &'a Program,
    trainset: &'a [Example],
    valset: &'a [Example],
    session: &'a Session<'a>,
    board: Board,
}

impl Search<'_> {
    /// Makes and scores the candidate of one seed.
    fn try_seed(&self, place: usize, seed: i64) -> Result<Tried, OptimizeError> {
        let settings = self.settings;
        let (program, mut tokens) =
            settings.candidate(seed, self.student, self.trainset, self.session)?;
        let scored = self.score(&program, place).map_err(|source| match source {
            EvaluateError::Cancelled => OptimizeError::Cancelled,
            source => OptimizeError::Evaluate { seed, source },
        })?;
        let demos = program.demos();
        let candidate = match scored {
            Scored::Whole(result, key) => {
                tokens += result.tokens;
                let subscores: Vec<f64> = result.rows.iter().map(|row| row.score).collect();
                self.board.add(Finished {
                    place,
                    score: result.score,
                    subscores: subscores.clone(),
                });
                Candidate {
                    seed,
                    score: result.score,
                    subscores,
                    parse_failures: result.parse_failures,
                    demos,
                    instructions: Vec::new(),
                    stopped_after: None,
                    key,
                }
            }
            Scored::Beaten { most, rows, spent } => {
                tokens += spent;
                Candidate {
                    seed,
                    score: most,
                    subscores: Vec::new(),
                    parse_failures: 0,
                    demos,
                    instructions: Vec::new(),
                    stopped_after: Some(rows),
                    key: None,
                }
            }
        };
        self.session.tell(Progress::Scored {
            seed,
            score: candidate.score,
            best: self.board.best().unwrap_or(candidate.score),
        });
        Ok(Tried {
            program,
            candidate,
            tokens,
        })
    }

    /// The score of a candidate, read back where it is known.
    fn score(&self, program: &Program, place: usize) -> Result<Scored, EvaluateError> {
        let settings = json!({ "max_errors": self.settings.max_errors });
        let answered = (program, self.session.lm);
        let piece = Piece::of_program(self.session, CANDIDATE, answered, self.valset, &settings);
        let Some(piece) = piece else {
            return self.ask(program, place);
        };
        if let Some(known) = piece.recall_evaluation() {
            return Ok(Scored::Whole(known, Some(piece.key())));
        }
        match self.ask(program, place)? {
            Scored::Whole(result, _) => {
                let key = piece.keep_evaluation(&result);
                Ok(Scored::Whole(result, key))
            }
            beaten => Ok(beaten),
        }
    }

    fn ask(&self, program: &Program, place: usize) -> Result<Scored, EvaluateError> {
        let (session, total) = (self.session, self.valset.len());
        let early = self.settings.early_stopping;
        let order = if early {
            self.board.hardest_first(total)
        } else {
            (0..total).collect()
        };
        let evaluate = Evaluate {
            metric: session.metric,
            label: session.label,
            max_errors: self.settings.max_errors,
        };
        let done = AtomicUsize::new(0);
        let on_row = |_| {
            let rows = done.fetch_add(1, Ordering::Relaxed) + 1;
            session.tell(Progress::Evaluating { rows, total });
        };
        let mut tally = evaluate.tally();
        for chunk in order.chunks(session.batch.max(1)) {
            let rows: Vec<Example> = chunk.iter().map(|&at| self.valset[at].clone()).collect();
            let options = RunOptions {
                batch: rows.len(),
                on_row: Some(&on_row),
                ..RunOptions::default()
            };
            let results = program.run(session.lm, session.sampling, &rows, &options);
            for (row, result) in rows.iter().zip(results) {
                tally.add(row, result)?;
            }
            let most = tally.at_most(total);
            let later_count = self.settings.stop_at_score.is_none();
            if early && tally.len() < total && self.board.beats(place, most, later_count) {
                return Ok(Scored::Beaten {
                    most,
                    rows: tally.len(),
                    spent: tally.tokens(),
                });
            }
        }
        let whole = tally.finish_in(&order)?;
        Ok(Scored::Whole(whole, None))
    }

    /// Tries the seeds, as many at once as wanted. Later ones are left out once one has reached
    /// `stop_at_score` or failed.
    fn run(&self, seeds: &[i64]) -> Vec<Option<Result<Tried, OptimizeError>>> {
        let found: Vec<Mutex<Option<Result<Tried, OptimizeError>>>> =
            seeds.iter().map(|_| Mutex::default()).collect();
        let (next, last) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        let work = || {
            loop {
                let place = next.fetch_add(1, Ordering::Relaxed);
                let (Some(&seed), true) = (seeds.get(place), place <= last.load(Ordering::Relaxed))
                else {
                    return;
                };
                self.session.tell(Progress::Candidate {
                    seed,
                    done: place,
                    total: seeds.len(),
                });
                let tried = self.try_seed(place, seed);
                if tried
                    .as_ref()
                    .map_or(true, |tried| self.settings.is_enough(tried))
                {
                    last.fetch_min(place, Ordering::Relaxed);
                }
                *found[place].lock().unwrap_or_else(PoisonError::into_inner) = Some(tried);
            }
        };
        let at_once = self
            .settings
            .concurrency
            .unwrap_or(1)
            .clamp(1, seeds.len().max(1));
        std::thread::scope(|scope| {
            (1..at_once).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        (found.into_iter())
            .map(|tried| tried.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }
}

/// How a candidate's scoring ended.
enum Scored {
    /// To the end, with the key that it is kept under.
    Whole(EvaluationResult, Option<String>),
    /// It cannot win any more.
    Beaten {
        /// The percent that it could have reached.
        most: f64,
        /// Rows scored until then.
        rows: usize,
        spent: Tokens,
    },
}

impl Optimizer for RandomSearch {
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        valset: Option<&[Example]>,
        session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError> {
        let search = Search {
            settings: self,
            student,
            trainset,
            valset: valset.unwrap_or(trainset),
            session,
            board: Board::default(),
        };
        let mut found: Option<Compiled> = None;
        // In the order of seeds, whatever was ready first.
        for tried in search.run(&self.seeds()).into_iter().flatten() {
            let tried = tried?;
            let enough = self.is_enough(&tried);
            let best = found.get_or_insert_with(|| {
                Compiled::unscored(tried.program.clone(), Tokens::default())
            });
            best.tokens += tried.tokens;
            let record = best.best.map(|at| best.candidates[at].score);
            let whole = tried.candidate.stopped_after.is_none();
            if whole && record.is_none_or(|record| tried.candidate.score > record) {
                best.program = tried.program;
                best.best = Some(best.candidates.len());
            }
            best.candidates.push(tried.candidate);
            if enough {
                break;
            }
        }
        let last = i64::try_from(self.num_candidate_programs).unwrap_or(i64::MAX) - 1;
        found.ok_or(OptimizeError::NoCandidates(last))
    }
}
