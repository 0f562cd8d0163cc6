//! [`LabeledFewShot`]: labelled rows as demos, drawn as DSPy draws them.

use super::{Compiled, OptimizeError, Optimizer, Session};
use crate::example::{Demo, Example};
use crate::program::{Program, Tokens};
use crate::python_random::PythonRandom;

/// DSPy's `LabeledFewShot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabeledFewShot {
    /// Demos per predictor, as far as there are rows.
    pub k: usize,
    /// Whether to draw them by `Random(0)`, one generator for all predictors; else the first rows.
    pub sample: bool,
}

impl LabeledFewShot {
    /// The student with labelled demos; without rows it is left without demos.
    pub fn apply(self, student: &Program, trainset: &[Example]) -> Program {
        let mut program = student.without_demos();
        let k = self.k.min(trainset.len());
        let mut random = PythonRandom::new(0);
        for predictor in &mut program.predictors {
            let drawn = if self.sample {
                random.sample_indices(trainset.len(), k)
            } else {
                None
            };
            let rows = drawn.unwrap_or_else(|| (0..k).collect());
            predictor.demos = rows
                .into_iter()
                .map(|row| Demo::labeled(&trainset[row]))
                .collect();
        }
        program
    }
}

impl Optimizer for LabeledFewShot {
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        _valset: Option<&[Example]>,
        _session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError> {
        Ok(Compiled::unscored(
            self.apply(student, trainset),
            Tokens::default(),
        ))
    }
}
