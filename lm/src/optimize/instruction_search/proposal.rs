//! New instructions: what the proposer is shown, and what is taken from its answer.

use super::super::kept::{PROPOSAL, Piece};
use super::super::{OptimizeError, Session};
use super::{InstructionSearch, Proposed};
use crate::evaluate::{EvaluatedRow, EvaluationResult};
use crate::example::Example;
use crate::lm::{FinishReason, LmError, Message, Request, Role, Sampling};
use crate::program::Program;
use crate::value::Value;
use serde_json::json;

/// Mistakes that the proposer is shown at most.
const SHOWN: usize = 8;

impl InstructionSearch<'_> {
    /// New instructions for the predictor at `place`, or why the answer holds none.
    pub(super) fn propose(
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
            Some(Err(LmError::Cancelled)) => Err(OptimizeError::Cancelled),
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
pub(super) fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What went wrong, row by row.
pub(super) fn mistakes(rows: &[Example], result: &EvaluationResult) -> String {
    let wrong = rows
        .iter()
        .zip(&result.rows)
        .filter(|(_, scored)| !scored.correct);
    let tell = |(row, scored): (&Example, &EvaluatedRow)| {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
