//! [`InstructionSearch`]: better instructions, written by a capable model that is shown what the
//! program got wrong (after GEPA, Agrawal et al. 2025, arXiv 2507.19457: reflection on errors, and a
//! parent drawn from the candidates that are best on some row).
//!
//! Invariant: the student wins unless a proposal scores strictly more on the whole validation set.

use super::kept::{CANDIDATE, PROPOSAL, Piece};
use super::{Candidate, Compiled, OptimizeError, Optimizer, Progress, Session};
use crate::evaluate::{Evaluate, EvaluateError, EvaluationResult};
use crate::example::Example;
use crate::lm::{FinishReason, Lm, Message, Request, Role, Sampling};
use crate::program::{Program, RunOptions, Tokens};
use crate::python_random::PythonRandom;
use crate::value::Value;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeSet;

/// Mistakes that the proposer is shown at most.
const SHOWN: usize = 8;

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

/// Scored in full.
struct Member {
    program: Program,
    result: EvaluationResult,
    /// Key of the action that its score is kept under, where it is.
    key: Option<String>,
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

    /// New instructions for the predictor at `place`, or why the answer holds none.
    fn propose(
        &self,
        program: &Program,
        place: usize,
        mistakes: &str,
        round: usize,
        session: &Session<'_>,
    ) -> Result<Result<String, Proposed>, OptimizeError> {
        let current = &program.predictors[place].signature.instructions;
        let text = format!(
            "You improve the instructions of a program that asks a language model.\n\nCurrent \
             instructions:\n```\n{current}\n```\n\nWhat the program got wrong with them:\n\n\
             {mistakes}\nFind what the mistakes have in common. Write new instructions that \
             prevent them: keep every label and every requirement of the current ones, say how \
             labels that are taken for each other are told apart, and copy no query. Answer with \
             the new instructions between ``` lines and nothing else."
        );
        let request = Request {
            messages: vec![Message {
                role: Role::User,
                content: text,
            }],
            sampling: Sampling {
                rollout: Some(round as u64),
                ..self.sampling.clone()
            },
            choices: None,
        };
        let (answer, cut_off) = self.answer(request, session)?;
        Ok(match instructions_of(&answer) {
            // What is closed is whole.
            (text, closed) if cut_off && !closed && !text.is_empty() => Err(Proposed::CutOff),
            ("", _) => Err(Proposed::Empty),
            (text, _) => Ok(text.to_owned()),
        })
    }

    /// What the proposer says, and whether it was cut off; read back where it is known.
    fn answer(
        &self,
        request: Request,
        session: &Session<'_>,
    ) -> Result<(String, bool), OptimizeError> {
        let asked = json!({ "model": self.proposer.id(), "request": &request });
        let piece = Piece::of_params(session, PROPOSAL, &asked);
        if let Some(known) = piece.as_ref().and_then(Piece::recall) {
            return Ok(known);
        }
        let answer = self.proposer.complete(&[request], &|_, _| {}).pop();
        match answer {
            Some(Ok(completion)) => {
                let answer = (completion.text, completion.finish == FinishReason::Length);
                if let Some(piece) = piece {
                    piece.keep(&answer);
                }
                Ok(answer)
            }
            Some(Err(crate::lm::LmError::Cancelled)) => Err(OptimizeError::Cancelled),
            Some(Err(error)) => Err(OptimizeError::Proposer(error.to_string())),
            None => Err(OptimizeError::Proposer("no answer".to_owned())),
        }
    }
}

/// The text between the first and the last ``` line, and whether there are both. As in GEPA, an
/// answer without them is taken whole: many models do not keep to it.
fn instructions_of(answer: &str) -> (&str, bool) {
    const FENCE: &str = "```";
    let Some(start) = answer.find(FENCE) else {
        return (answer.trim(), false);
    };
    // Behind the fence there may be the name of a language.
    let rest = &answer[start + FENCE.len()..];
    let body = rest.split_once('\n').map_or("", |(_, body)| body);
    match body.rfind(FENCE) {
        Some(end) => (body[..end].trim(), true),
        // One fence alone opens the instructions, or closes them.
        None if body.trim().is_empty() => (answer[..start].trim(), true),
        None => (body.trim(), false),
    }
}

/// Instructions as far as they say something: without their line breaks and spaces.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What went wrong, row by row.
fn mistakes(rows: &[Example], result: &EvaluationResult) -> String {
    let wrong = rows
        .iter()
        .zip(&result.rows)
        .filter(|(_, scored)| !scored.correct);
    let tell = |(row, scored): (&Example, &crate::evaluate::EvaluatedRow)| {
        let given = (row.fields.iter())
            .filter(|(_, value)| Some(value.to_python_str()) != scored.gold)
            .map(|(name, value): (&String, &Value)| format!("{name}: {}", value.to_python_str()));
        let answer = match (&scored.pred, &scored.error) {
            (Some(pred), _) => format!("answered: {pred}"),
            (None, Some(error)) => format!("answer that could not be read: {error}"),
            (None, None) => "no answer".to_owned(),
        };
        let gold = scored.gold.as_deref().unwrap_or("unknown");
        let given: Vec<String> = given.collect();
        format!("- {}\n  {answer}\n  expected: {gold}\n", given.join("\n  "))
    };
    wrong.take(SHOWN).map(tell).collect()
}

/// Whether one is as good as the other on every row, and better on one.
fn dominates(one: &Member, other: &Member) -> bool {
    let pairs = || one.result.rows.iter().zip(&other.result.rows);
    pairs().all(|(a, b)| a.score >= b.score) && pairs().any(|(a, b)| a.score > b.score)
}

/// The members that are best on some row, each as often as it is, without those that another one
/// dominates (GEPA's frontier).
fn frontier(members: &[Member]) -> Vec<usize> {
    let rows = members.first().map_or(0, |member| member.result.rows.len());
    let open: Vec<usize> = (0..members.len())
        .filter(|&at| !members.iter().any(|other| dominates(other, &members[at])))
        .collect();
    let best = |row: usize| {
        let score = move |at: &usize| members[*at].result.rows[row].score;
        let most = open.iter().map(score).fold(0.0, f64::max);
        // A row that nobody gets right says nothing.
        let is_best = move |at: &usize| most > 0.0 && score(at) == most;
        open.iter().copied().filter(is_best)
    };
    let mut all: Vec<usize> = (0..rows).flat_map(best).collect();
    if all.is_empty() {
        all.extend(open.first());
    }
    all
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
        let tell = |progress| {
            if let Some(on_progress) = session.on_progress {
                on_progress(progress);
            }
        };
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
            tell(Progress::Candidate {
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
            tell(Progress::Proposed { seed, became });
            if became == Proposed::Scored {
                let score = |at: usize| found.members[at].result.score;
                tell(Progress::Scored {
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
    use crate::lm::{Completion, FinishReason, LmError, OnAnswer};
    use crate::metric::MetricKind;
    use crate::program::ProgramSpec;
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
            _: &OnAnswer<'_>,
        ) -> Vec<Result<Completion, LmError>> {
            let answer = |request: &Request| {
                let (first, last) = (&request.messages[0], request.messages.last().unwrap());
                let text = if first.content.starts_with("You improve") {
                    self.asked.lock().unwrap().push(first.content.clone());
                    self.proposal
                } else if first.content.contains("even") && last.content.len() % 2 == 0 {
                    "b"
                } else {
                    "a"
                };
                Ok(Completion {
                    text: text.to_owned(),
                    finish: FinishReason::Stop,
                    prompt_tokens: 1,
                    completion_tokens: 1,
                    choice_probs: None,
                    cached: false,
                })
            };
            requests.iter().map(answer).collect()
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
    fn the_frontier_counts_a_member_for_each_row_that_it_is_best_on() {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"predict": {"inputs": [{"name": "text"}], "outputs": [{"name": "label"}]}}"#,
        )
        .unwrap();
        let metric = MetricKind::LabelEquality.metric("label");
        let member = |scores: [f64; 3]| {
            let row = |score: f64| crate::program::RowResult {
                id: String::new(),
                prediction: Ok(crate::example::Prediction {
                    fields: [("label".to_owned(), score.to_string().as_str().into())].into(),
                }),
                trace: Vec::new(),
                raw: None,
                tokens: Tokens::default(),
                probs: None,
                confidence: None,
                cut_off: false,
            };
            let gold = vec![Example::of_texts("", [("label", "1")]); 3];
            let evaluate = Evaluate {
                metric: &metric,
                label: "label",
                max_errors: 9,
            };
            Member {
                program: spec.build(&[]).unwrap(),
                result: evaluate.score(&gold, scores.map(row)).unwrap(),
                key: None,
            }
        };
        let all = [[1., 1., 0.], [0., 1., 1.], [0., 1., 0.]].map(member);
        assert_eq!(frontier(&all), [0, 0, 1, 1]);
    }

    #[test]
    fn instructions_are_found_in_answers_of_any_shape() {
        for (answer, instructions, closed) in [
            ("Here:\n```text\nSort.\n```\nDone.", "Sort.", true),
            ("Sort.\n", "Sort.", false),
            ("```\nSort.", "Sort.", false),
            ("Sort.\n```", "Sort.", true),
            ("```\n```", "", true),
            ("```", "", true),
            (" \n", "", false),
        ] {
            assert_eq!(
                instructions_of(answer),
                (instructions, closed),
                "{answer:?}"
            );
        }
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
