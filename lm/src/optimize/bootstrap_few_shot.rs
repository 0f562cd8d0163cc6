//! [`BootstrapFewShot`]: demos worked out by a teacher program: what it took and
//! gave on training rows that the metric likes, then labelled rows. Follows
//! DSPy's draws and its order of calls.

use super::kept::{DEMOS, Piece};
use super::{Compiled, LabeledFewShot, OptimizeError, Optimizer, Progress, Session};
use crate::adapter::Dialect;
use crate::example::{Demo, Example};
use crate::lm::{Lm, Sampling};
use crate::program::{Program, RowErrorKind, RowResult, RunOptions, Tokens};
use crate::python_random::PythonRandom;
use serde_json::json;

/// DSPy's `BootstrapFewShot`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BootstrapFewShot {
    /// Training rows to work out at most.
    pub max_bootstrapped_demos: usize,
    /// Demos in all, bootstrapped ones included, filled up with labelled rows. The teacher sees
    /// as many labelled rows while it works.
    pub max_labeled_demos: usize,
    /// Tries per row; tries after the first draw at a higher temperature.
    pub max_rounds: usize,
    /// As many failed rows end it with an error.
    pub max_errors: usize,
    /// The score from which a row counts as solved; any score but 0 when `None` or 0.
    pub metric_threshold: Option<f64>,
}

impl Default for BootstrapFewShot {
    /// DSPy's defaults, but for `max_errors`, which differs between its versions.
    fn default() -> Self {
        Self {
            max_bootstrapped_demos: 4,
            max_labeled_demos: 16,
            max_rounds: 1,
            max_errors: 10,
            metric_threshold: None,
        }
    }
}

impl Optimizer for BootstrapFewShot {
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        _valset: Option<&[Example]>,
        session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError> {
        let mut run = Bootstrap::new(self, student, trainset, session);
        let piece = run.piece();
        let known = piece.as_ref().and_then(Piece::recall);
        if let Some((found, solved)) = known {
            (run.found, run.solved) = (found, solved);
        } else {
            run.work_out()?;
            if let Some(piece) = piece.filter(|_| !run.unanswered) {
                piece.keep(&(&run.found, &run.solved));
            }
        }
        let tokens = run.tokens;
        Ok(Compiled::unscored(run.trained(student), tokens))
    }
}

struct Bootstrap<'a> {
    settings: &'a BootstrapFewShot,
    trainset: &'a [Example],
    session: &'a Session<'a>,
    dialect: Dialect,
    teacher: Program,
    teacher_lm: &'a dyn Lm,
    /// Demos per predictor.
    found: Vec<Vec<Demo>>,
    solved: Vec<bool>,
    errors: usize,
    /// Whether the model left a row unanswered: another time there may be other demos.
    unanswered: bool,
    tokens: Tokens,
}

impl<'a> Bootstrap<'a> {
    fn new(
        settings: &'a BootstrapFewShot,
        student: &Program,
        trainset: &'a [Example],
        session: &'a Session<'a>,
    ) -> Self {
        let (mut teacher, teacher_lm) = match &session.teacher {
            Some(teacher) => (teacher.program.clone(), teacher.lm),
            // DSPy 3 keeps the student's demos in its own teacher.
            None if student.dialect == Dialect::Dspy3 => (student.clone(), session.lm),
            None => (student.without_demos(), session.lm),
        };
        // A teacher that was given with demos is compiled already.
        let compiled = session.teacher.is_some()
            && teacher
                .predictors
                .iter()
                .any(|predictor| !predictor.demos.is_empty() || predictor.neighbours.is_some());
        if settings.max_labeled_demos > 0 && !compiled {
            let labeled = LabeledFewShot {
                k: settings.max_labeled_demos,
                sample: true,
            };
            teacher = labeled.apply(&teacher, trainset);
        }
        Self {
            settings,
            trainset,
            session,
            dialect: student.dialect,
            found: vec![Vec::new(); teacher.predictors.len()],
            teacher,
            teacher_lm,
            solved: vec![false; trainset.len()],
            errors: 0,
            unanswered: false,
            tokens: Tokens::default(),
        }
    }

    /// What is worked out, as an action.
    fn piece(&self) -> Option<Piece<'a>> {
        let settings = json!({
            "max_bootstrapped_demos": self.settings.max_bootstrapped_demos,
            "max_rounds": self.settings.max_rounds,
            "max_errors": self.settings.max_errors,
            "metric_threshold": self.settings.metric_threshold,
        });
        let teacher = (&self.teacher, self.teacher_lm);
        Piece::of_program(self.session, DEMOS, teacher, self.trainset, &settings)
    }

    fn is_full(&self) -> bool {
        self.count() >= self.settings.max_bootstrapped_demos
    }

    fn count(&self) -> usize {
        self.solved.iter().filter(|solved| **solved).count()
    }

    /// DSPy 2.5 tries every row once before it tries any again; DSPy 3 tries a row until it is
    /// solved before it goes on.
    fn work_out(&mut self) -> Result<(), OptimizeError> {
        let rows: Vec<usize> = (0..self.trainset.len()).collect();
        if self.dialect == Dialect::Dspy3 && self.settings.max_rounds > 1 {
            for row in rows {
                for round in 0..self.settings.max_rounds {
                    if !self.solved[row] {
                        self.try_rows(&[row], round)?;
                    }
                }
            }
            return Ok(());
        }
        for round in 0..self.settings.max_rounds {
            let open: Vec<usize> = rows
                .iter()
                .copied()
                .filter(|&row| !self.solved[row])
                .collect();
            self.try_rows(&open, round)?;
        }
        Ok(())
    }

    /// Tries rows in order until enough are solved. A batch is judged in row order, and answers
    /// beyond the last demo needed are thrown away.
    fn try_rows(&mut self, rows: &[usize], round: usize) -> Result<(), OptimizeError> {
        let mut next = 0;
        while next < rows.len() && !self.is_full() {
            let batch = &rows[next..rows.len().min(next + self.session.batch.max(1))];
            let examples: Vec<Example> = batch
                .iter()
                .map(|&row| self.trainset[row].clone())
                .collect();
            let options = RunOptions {
                batch: batch.len(),
                on_row: None,
                hide_own_demo: true,
            };
            let sampling = self.sampling(round);
            let results = self
                .teacher
                .run(self.teacher_lm, &sampling, &examples, &options);
            self.tokens += results.iter().map(|result| result.tokens).sum();
            for (&row, result) in batch.iter().zip(&results) {
                if self.is_full() {
                    break;
                }
                next += 1;
                if self.judge(row, result)? {
                    // The teacher has changed: the rest of the batch was asked with old demos.
                    break;
                }
            }
            self.session.tell(Progress::Bootstrapping {
                tried: next,
                found: self.count(),
            });
        }
        Ok(())
    }

    fn sampling(&self, round: usize) -> Sampling {
        let mut sampling = self.session.sampling.clone();
        if round > 0 {
            if self.dialect == Dialect::Dspy3 {
                sampling.temperature = 1.0;
                sampling.rollout = Some(round as u64);
            } else {
                sampling.temperature = 0.7 + 0.001 * round as f64;
                // Votes draw at a temperature of their own.
                if self.teacher.votes.is_some() {
                    sampling.rollout = Some(round as u64);
                }
            }
        }
        sampling
    }

    /// Keeps the row's steps as demos if the metric likes them; true when the teacher changed.
    fn judge(&mut self, row: usize, result: &RowResult) -> Result<bool, OptimizeError> {
        let example = &self.trainset[row];
        let prediction = match &result.prediction {
            Ok(prediction) => prediction,
            Err(error) if error.is_cancelled() => return Err(OptimizeError::Cancelled),
            Err(error) => {
                self.count_error(error.kind(), error.to_string())?;
                return Ok(self.forget(row));
            }
        };
        let score = match (self.session.metric)(example, prediction) {
            Ok(score) => score,
            Err(reason) => {
                self.count_error(RowErrorKind::Other, reason)?;
                return Ok(false);
            }
        };
        let solved = match self.settings.metric_threshold {
            Some(threshold) if threshold != 0.0 => score >= threshold,
            _ => score != 0.0,
        };
        if solved {
            self.solved[row] = true;
            for step in &result.trace {
                let at = self
                    .teacher
                    .predictors
                    .iter()
                    .position(|p| p.name == step.predictor);
                if let Some(demos) = at.and_then(|at| self.found.get_mut(at)) {
                    demos.push(Demo::augmented(&step.inputs, &step.outputs));
                }
            }
        }
        Ok(false)
    }

    fn count_error(&mut self, kind: RowErrorKind, last: String) -> Result<(), OptimizeError> {
        self.errors += 1;
        self.unanswered |= kind == RowErrorKind::Lm;
        if self.errors < self.settings.max_errors {
            return Ok(());
        }
        let (errors, max) = (self.errors, self.settings.max_errors);
        Err(OptimizeError::TooManyErrors {
            errors,
            max,
            kind,
            last,
        })
    }

    /// DSPy hides a row's own demo from the teacher while it works on the row, and does not bring
    /// it back when that fails.
    fn forget(&mut self, row: usize) -> bool {
        let example = &self.trainset[row];
        let mut changed = false;
        for predictor in &mut self.teacher.predictors {
            let before = predictor.demos.len();
            predictor.demos.retain(|demo| !demo.is(example));
            changed |= predictor.demos.len() != before;
        }
        changed
    }

    /// The student with the demos found, filled up with labelled rows that were not solved.
    fn trained(self, student: &Program) -> Program {
        let mut pool: Vec<Demo> = self
            .trainset
            .iter()
            .zip(&self.solved)
            .filter(|(_, solved)| !**solved)
            .map(|(example, _)| Demo::labeled(example))
            .collect();
        PythonRandom::new(0).shuffle(&mut pool);
        let mut random = PythonRandom::new(0);
        let mut program = student.without_demos();
        for (predictor, mut demos) in program.predictors.iter_mut().zip(self.found) {
            demos.truncate(self.settings.max_bootstrapped_demos);
            let room = self.settings.max_labeled_demos.saturating_sub(demos.len());
            let drawn = random
                .sample(&pool, room.min(pool.len()))
                .unwrap_or_default();
            // DSPy 2.5 draws the next predictor's rows from those drawn for this one.
            if self.dialect != Dialect::Dspy3 {
                pool.clone_from(&drawn);
            }
            demos.extend(drawn);
            predictor.demos = demos;
        }
        program
    }
}
