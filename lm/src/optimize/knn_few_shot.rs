//! [`KnnFewShot`]: demos chosen per query, the labelled rows most like it (after DSPy's
//! `KNNFewShot`). DSPy bootstraps the chosen rows anew for every query; here that is done once for
//! all rows, if wanted, so that an answer costs one call.

use std::sync::Arc;

use super::{Compiled, OptimizeError, Optimizer, Session};
use crate::classifier::Embedder;
use crate::example::{Demo, Example};
use crate::program::{Neighbours, Program, RunOptions, Tokens, embedded_text};

/// What a predictor chooses from: one for each row that can be shown.
type Pool = Vec<Option<Demo>>;

/// Settings and the encoder.
#[derive(Clone)]
pub struct KnnFewShot {
    /// Demos for each query.
    pub k: usize,
    /// Whether the teacher (the student itself when there is none) first answers every row: what it
    /// gets right becomes a demo with all its outputs, such as the reasoning.
    pub bootstrap: bool,
    /// Turns texts into vectors.
    pub embedder: Arc<dyn Embedder + Send + Sync>,
}

impl KnnFewShot {
    /// The student with these rows to choose from; no model is asked.
    ///
    /// # Errors
    /// When the encoder fails.
    pub fn apply(&self, student: &Program, trainset: &[Example]) -> Result<Program, OptimizeError> {
        let pools = (student.predictors.iter())
            .map(|predictor| trainset.iter().map(|row| predictor.labelled(row)).collect())
            .collect();
        self.with_pools(student, pools)
    }

    fn with_pools(&self, student: &Program, pools: Vec<Pool>) -> Result<Program, OptimizeError> {
        let mut program = student.without_demos();
        for (predictor, pool) in program.predictors.iter_mut().zip(pools) {
            let rows: Vec<Demo> = pool.into_iter().flatten().collect();
            if rows.is_empty() {
                continue;
            }
            let text = |demo: &Demo| {
                let inputs = predictor.signature.inputs.iter();
                let given = inputs.filter_map(|field| {
                    Some((field.name.clone(), demo.fields.get(&field.name)?.clone()))
                });
                embedded_text(&given.collect())
            };
            let texts: Vec<String> = rows.iter().map(text).collect();
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let vectors = self.embedder.embed(&texts).map_err(OptimizeError::Embed)?;
            predictor.neighbours = Some(Neighbours {
                k: self.k,
                rows,
                vectors,
                embedder: Some(Arc::clone(&self.embedder)),
            });
        }
        Ok(program)
    }

    /// What the teacher took and gave on the rows that it got right, else the row itself.
    fn worked_out(
        &self,
        student: &Program,
        trainset: &[Example],
        session: &Session<'_>,
    ) -> Result<(Vec<Pool>, Tokens), OptimizeError> {
        let (teacher, lm) = match &session.teacher {
            Some(teacher) => (teacher.program, teacher.lm),
            None => (student, session.lm),
        };
        let options = RunOptions {
            batch: session.batch,
            // Shown its own label it would only repeat it.
            hide_own_demo: true,
            ..RunOptions::default()
        };
        let results = teacher.run(lm, session.sampling, trainset, &options);
        let tokens = results.iter().map(|result| result.tokens).sum();
        let mut pools = vec![Vec::with_capacity(trainset.len()); student.predictors.len()];
        for (row, result) in trainset.iter().zip(&results) {
            let right = match &result.prediction {
                Ok(prediction) => (session.metric)(row, prediction).is_ok_and(|score| score >= 1.0),
                Err(error) if error.is_cancelled() => return Err(OptimizeError::Cancelled),
                Err(_) => false,
            };
            for (at, (predictor, pool)) in student.predictors.iter().zip(&mut pools).enumerate() {
                let name = teacher.predictors.get(at).map(|p| p.name.as_str());
                let step = result
                    .trace
                    .iter()
                    .find(|s| right && Some(s.predictor.as_str()) == name);
                pool.push(match step {
                    Some(step) => Some(Demo::augmented(&step.inputs, &step.outputs)),
                    None => predictor.labelled(row),
                });
            }
        }
        Ok((pools, tokens))
    }
}

impl Optimizer for KnnFewShot {
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        _valset: Option<&[Example]>,
        session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError> {
        if !self.bootstrap {
            let program = self.apply(student, trainset)?;
            return Ok(Compiled::unscored(program, Tokens::default()));
        }
        let (pools, tokens) = self.worked_out(student, trainset, session)?;
        Ok(Compiled::unscored(self.with_pools(student, pools)?, tokens))
    }
}
