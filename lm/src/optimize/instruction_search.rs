//! [`InstructionSearch`]: better instructions, written by a capable model that is shown what the
//! program got wrong (after GEPA, Agrawal et al. 2025, arXiv 2507.19457: reflection on errors, and a
//! parent drawn from the candidates that are best on some row).
//!
//! Invariant: the student wins unless a proposal scores strictly more on the whole validation set.

mod frontier;
mod proposal;

use self::frontier::{Member, frontier};
use self::proposal::{mistakes, words};
use super::kept::{CANDIDATE, Piece};
use super::{Candidate, Compiled, OptimizeError, Optimizer, Progress, Session};
use crate::evaluate::{Evaluate, EvaluateError, EvaluationResult};
use crate::example::Example;
use crate::lm::{Lm, Sampling};
use crate::program::{Program, RunOptions, Tokens};
use crate::python_random::PythonRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeSet;

/// Settings of the search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstructionSettings {
    /// Proposals to ask for.
    pub rounds: usize,
    /// Training rows on which a proposal is compared with its parent before it is scored in full.
    pub minibatch: usize,
    /// Seed of the draws (Python's).
    pub seed: i64,
    /// As many failed rows in one evaluation end the search with an error.
    pub max_errors: usize,
}

impl Default for InstructionSettings {
    fn default() -> Self {
        Self {
            rounds: 10,
            minibatch: 25,
            seed: 0,
            max_errors: 10_000,
        }
    }
}

/// What became of a round of the search.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Proposed {
    /// The parent made no mistake on the minibatch: nothing was asked.
    NotAsked,
    /// The answer held no instructions.
    Empty,
    /// The answer was cut off by the proposer's `max_tokens`.
    CutOff,
    /// The same instructions were tried before.
    Known,
    /// On the minibatch it did no better than its parent.
    NoBetter {
        /// Its points.
        points: f64,
        /// The parent's.
        parent: f64,
    },
    /// It did better there and was scored on the whole validation set.
    Scored,
}

/// The search, with the model that proposes.
pub struct InstructionSearch<'a> {
    /// Its settings.
    pub settings: InstructionSettings,
    /// Writes instructions; a capable model.
    pub proposer: &'a dyn Lm,
    /// How it draws.
    pub sampling: Sampling,
}

impl InstructionSearch<'_> {
    /// The score of a program on rows, with the key that it is kept under; read back where it is
    /// known.
    fn evaluate(
        &self,
        program: &Program,
        rows: &[Example],
        session: &Session<'_>,
        seed: i64,
    ) -> Result<(EvaluationResult, Option<String>), OptimizeError> {
        let settings = json!({ "max_errors": self.settings.max_errors });
        let piece = Piece::of_program(session, CANDIDATE, (program, session.lm), rows, &settings);
        let known = piece.as_ref().and_then(Piece::recall_evaluation);
        if let Some((known, piece)) = known.zip(piece.as_ref()) {
            return Ok((known, Some(piece.key())));
        }
        let result = self.ask(program, rows, session, seed)?;
        let key = piece.and_then(|piece| piece.keep_evaluation(&result));
        Ok((result, key))
    }

    fn ask(
        &self,
        program: &Program,
        rows: &[Example],
        session: &Session<'_>,
        seed: i64,
    ) -> Result<EvaluationResult, OptimizeError> {
        let evaluate = Evaluate {
            metric: session.metric,
            label: session.label,
            max_errors: self.settings.max_errors,
        };
        let options = RunOptions {
            batch: session.batch,
            ..RunOptions::default()
        };
        evaluate
            .run(program, session.lm, session.sampling, rows, &options)
            .map_err(|source| match source {
                EvaluateError::Cancelled => OptimizeError::Cancelled,
                source => OptimizeError::Evaluate { seed, source },
            })
    }
}

impl Optimizer for InstructionSearch<'_> {
    fn compile(
        &self,
        student: &Program,
        trainset: &[Example],
        valset: Option<&[Example]>,
        session: &Session<'_>,
    ) -> Result<Compiled, OptimizeError> {
        let valset = valset.unwrap_or(trainset);
        let (first, key) = self.evaluate(student, valset, session, 0)?;
        let mut found = Found {
            student,
            tokens: first.tokens,
            members: vec![Member {
                program: student.clone(),
                result: first,
                key,
            }],
            candidates: Vec::new(),
            best: 0,
            tried: BTreeSet::new(),
        };
        found.candidates.push(found.candidate(0));
        for (place, predictor) in student.predictors.iter().enumerate() {
            let given = words(&predictor.signature.instructions);
            found.tried.insert((place, given));
        }
        let mut random = PythonRandom::new(self.settings.seed);
        let total = self.settings.rounds;
        for round in 0..total {
            let seed = i64::try_from(round + 1).unwrap_or(i64::MAX);
            session.tell(Progress::Candidate {
                seed,
                done: round,
                total,
            });
            let size = self.settings.minibatch.min(trainset.len());
            let frontier = frontier(&found.members);
            let drawn = random.below(frontier.len() as u64);
            let parent = frontier[usize::try_from(drawn).unwrap_or(0)];
            let drawn = random
                .sample_indices(trainset.len(), size)
                .unwrap_or_default();
            let batch: Vec<Example> = drawn.iter().map(|&at| trainset[at].clone()).collect();
            if batch.is_empty() {
                break;
            }
            let became = self.round(round, parent, &batch, valset, session, &mut found)?;
            session.tell(Progress::Proposed { seed, became });
            if became == Proposed::Scored {
                let score = |at: usize| found.members[at].result.score;
                session.tell(Progress::Scored {
                    seed,
                    score: score(found.members.len() - 1),
                    best: score(found.best),
                });
            }
        }
        Ok(Compiled {
            program: found.members.swap_remove(found.best).program,
            candidates: found.candidates,
            best: Some(found.best),
            tokens: found.tokens,
        })
    }
}

/// What was found so far.
struct Found<'a> {
    student: &'a Program,
    members: Vec<Member>,
    candidates: Vec<Candidate>,
    best: usize,
    /// Predictor → instructions that were tried.
    tried: BTreeSet<(usize, String)>,
    tokens: Tokens,
}

impl Found<'_> {
    /// The newest member as it is reported.
    fn candidate(&self, seed: i64) -> Candidate {
        let member = &self.members[self.members.len() - 1];
        let pairs = member
            .program
            .predictors
            .iter()
            .zip(&self.student.predictors);
        let instructions = pairs
            .filter(|(own, given)| own.signature.instructions != given.signature.instructions)
            .map(|(own, _)| (own.name.clone(), own.signature.instructions.clone()))
            .collect();
        Candidate {
            seed,
            score: member.result.score,
            subscores: member.result.rows.iter().map(|row| row.score).collect(),
            parse_failures: member.result.parse_failures,
            demos: member.program.demos(),
            instructions,
            stopped_after: None,
            key: member.key.clone(),
        }
    }

    fn add(&mut self, seed: i64, member: Member) {
        self.members.push(member);
        self.candidates.push(self.candidate(seed));
        let newest = self.members.len() - 1;
        if self.members[newest].result.score > self.members[self.best].result.score {
            self.best = newest;
        }
    }
}

impl InstructionSearch<'_> {
    /// One proposal for the parent, tried on the minibatch and, if it helps there, in full.
    fn round(
        &self,
        round: usize,
        parent: usize,
        batch: &[Example],
        valset: &[Example],
        session: &Session<'_>,
        found: &mut Found<'_>,
    ) -> Result<Proposed, OptimizeError> {
        let seed = i64::try_from(round + 1).unwrap_or(i64::MAX);
        let mut program = found.members[parent].program.clone();
        let (before, _) = self.evaluate(&program, batch, session, seed)?;
        found.tokens += before.tokens;
        let told = mistakes(batch, &before);
        if told.is_empty() {
            return Ok(Proposed::NotAsked);
        }
        // One predictor at a time, in turn.
        let place = round % program.predictors.len();
        let instructions = match self.propose(&program, place, &told, round, session)? {
            Ok(instructions) => instructions,
            Err(unusable) => return Ok(unusable),
        };
        if !found.tried.insert((place, words(&instructions))) {
            return Ok(Proposed::Known);
        }
        program.predictors[place].signature.instructions = instructions;
        let (after, _) = self.evaluate(&program, batch, session, seed)?;
        found.tokens += after.tokens;
        if after.correct <= before.correct {
            return Ok(Proposed::NoBetter {
                points: after.correct,
                parent: before.correct,
            });
        }
        let (result, key) = self.evaluate(&program, valset, session, seed)?;
        found.tokens += result.tokens;
        let member = Member {
            program,
            result,
            key,
        };
        found.add(seed, member);
        Ok(Proposed::Scored)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::lm::{Completion, LmError, OnAnswer, Request};
    use crate::metric::MetricKind;
    use crate::program::ProgramSpec;
    use crate::testing::{answer_each, completion};
    use std::sync::Mutex;

    /// Answers `a` unless the instructions say what `b` is; as a proposer, gives what is said.
    struct Model {
        proposal: &'static str,
        asked: Mutex<Vec<String>>,
    }

    impl Lm for Model {
        fn id(&self) -> &str {
            "model"
        }

        fn complete(
            &self,
            requests: &[Request],
            on_answer: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            answer_each(requests, on_answer, |request| {
                let (first, last) = (&request.messages[0], request.messages.last().unwrap());
                let text = if first.content.starts_with("You improve") {
                    self.asked.lock().unwrap().push(first.content.clone());
                    self.proposal
                } else if first.content.contains("even") && last.content.len() % 2 == 0 {
                    "b"
                } else {
                    "a"
                };
                Ok(completion(text))
            })
        }
    }

    fn search(proposal: &'static str) -> (Compiled, Vec<String>) {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"predict": {"adapter": "compact", "instructions": "Sort.",
                "inputs": [{"name": "text"}], "outputs": [{"name": "label", "type": "label"}]}}"#,
        )
        .unwrap();
        let student = spec.build(&["a".into(), "b".into()]).unwrap();
        let row = |i: usize| {
            let text = "x".repeat(i + 1);
            let label = ["a", "b"][i % 2];
            Example::of_texts(i.to_string(), [("text", text.as_str()), ("label", label)])
        };
        let rows: Vec<Example> = (0..20).map(row).collect();
        let model = Model {
            proposal,
            asked: Mutex::default(),
        };
        let metric = MetricKind::LabelEquality.metric("label");
        let session = Session {
            lm: &model,
            sampling: &Sampling::default(),
            metric: &metric,
            label: "label",
            teacher: None,
            batch: 8,
            on_progress: None,
            kept: None,
        };
        let search = InstructionSearch {
            settings: InstructionSettings {
                rounds: 2,
                minibatch: 6,
                ..InstructionSettings::default()
            },
            proposer: &model,
            sampling: Sampling::default(),
        };
        let compiled = search.compile(&student, &rows[..10], Some(&rows[10..]), &session);
        (compiled.unwrap(), model.asked.into_inner().unwrap())
    }

    #[test]
    fn instructions_that_help_are_kept() {
        let (compiled, asked) = search("Here:\n```text\nSort; even lengths are b.\n```");
        let instructions = &compiled.program.predictors[0].signature.instructions;
        assert_eq!(instructions, "Sort; even lengths are b.");
        let scores: Vec<f64> = compiled.candidates.iter().map(|c| c.score).collect();
        assert_eq!(
            (scores.as_slice(), compiled.best),
            (&[50.0, 100.0][..], Some(1))
        );
        assert!(asked[0].contains("```\nSort.\n```") && asked[0].contains("expected: b"));
        // What is perfect is not asked about again.
        assert_eq!(asked.len(), 1);
    }

    #[test]
    fn instructions_that_do_not_help_are_not() {
        for (proposal, asked_for) in [
            ("```\nSort well.\n```", 2),
            ("I would rather not.", 2),
            ("```\n```", 2),
            ("``` \n Sort. \n```", 2),
        ] {
            let (compiled, asked) = search(proposal);
            assert_eq!(asked.len(), asked_for);
            assert_eq!(
                compiled.program.predictors[0].signature.instructions,
                "Sort."
            );
            assert_eq!(compiled.candidates.len(), 1);
        }
    }
}
