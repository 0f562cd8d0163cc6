//! [`Votes`]: a program whose members are asked for every row, and the majority's answer is taken
//! (DSPy's `Ensemble` with `majority`; with one member and several samples, self-consistency).

use crate::lm::Sampling;
use crate::metric::normalize_text;
use crate::program::{RowError, RowResult};
use crate::value::Value;

/// How the answers for one row come about.
#[derive(Debug, Clone, PartialEq)]
pub struct Votes {
    /// How many of the program's predictors each member has, in order.
    pub members: Vec<usize>,
    /// Answers of each member.
    pub samples: usize,
    /// Temperature of the draws, when a member answers more than once.
    pub temperature: f64,
}

impl Votes {
    /// How a member's nth answer is drawn.
    pub(super) fn sampling(&self, base: &Sampling, sample: usize) -> Sampling {
        if self.samples == 1 {
            return base.clone();
        }
        Sampling {
            temperature: self.temperature,
            // The same seed would give the same answer again.
            seed: base.seed.map(|seed| seed.wrapping_add(sample as u64)),
            rollout: Some(base.rollout.unwrap_or(0) * self.samples as u64 + sample as u64),
            ..base.clone()
        }
    }
}

/// The majority's answer for one row, with the share of all answers that agree with it as its
/// confidence. Answers are equal when their `field` is, normalised as DSPy does unless `exact`; of equally common
/// ones the first wins. Answers that cannot be read have no vote.
pub(super) fn majority(ballots: Vec<RowResult>, field: &str, exact: bool) -> Option<RowResult> {
    let tokens = ballots.iter().map(|ballot| ballot.tokens).sum();
    // An outage is no vote: the row must be asked again.
    let lost = (ballots.iter()).position(|b| matches!(b.prediction, Err(RowError::Lm(_))));
    let mut counts: Vec<(String, usize, usize)> = Vec::new();
    for (at, ballot) in ballots.iter().enumerate() {
        let Ok(prediction) = &ballot.prediction else {
            continue;
        };
        let value = prediction.fields.get(field).map(Value::to_python_str);
        let value = value.unwrap_or_default();
        let value = if exact { value } else { normalize_text(&value) };
        match counts.iter_mut().find(|(known, ..)| *known == value) {
            Some((_, count, _)) => *count += 1,
            None => counts.push((value, 1, at)),
        }
    }
    // DSPy counts answers without a text only when there are no others.
    if counts.iter().any(|(value, ..)| !value.is_empty()) {
        counts.retain(|(value, ..)| !value.is_empty());
    }
    let most = counts.iter().map(|(_, count, _)| *count).max();
    let winner = counts.iter().find(|(_, count, _)| Some(*count) == most);
    let (at, agreement) = match (lost, winner) {
        (Some(at), _) => (at, None),
        (None, Some((_, count, at))) => (*at, Some(*count as f32 / ballots.len() as f32)),
        (None, None) => (0, None),
    };
    let chosen = ballots.into_iter().nth(at)?;
    Some(RowResult {
        tokens,
        probs: None,
        confidence: agreement,
        ..chosen
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::example::Prediction;
    use crate::lm::LmError;
    use crate::program::Tokens;

    fn ballot(label: Result<&str, RowError>) -> RowResult {
        RowResult {
            id: "0".into(),
            raw: label.as_ref().ok().map(|label| (*label).to_owned()),
            prediction: label.map(|label| Prediction {
                fields: [("label".to_owned(), label.into())].into_iter().collect(),
            }),
            trace: Vec::new(),
            tokens: Tokens {
                calls: 1,
                ..Tokens::default()
            },
            probs: None,
            confidence: Some(0.9),
            cut_off: false,
        }
    }

    fn unread() -> RowResult {
        ballot(Err(RowError::Parse {
            reason: "no label".into(),
            raw: "?".into(),
        }))
    }

    #[test]
    fn the_most_common_answer_wins_and_agreement_is_its_share() {
        let ballots = vec![
            ballot(Ok("b")),
            unread(),
            ballot(Ok("card_arrival")),
            ballot(Ok("Cardarrival.")),
        ];
        let found = majority(ballots, "label", false).unwrap();
        assert_eq!(found.raw.as_deref(), Some("card_arrival"));
        assert_eq!((found.confidence, found.tokens.calls), (Some(0.5), 4));
        let tie = majority(vec![ballot(Ok("x")), ballot(Ok("y"))], "label", false).unwrap();
        assert_eq!(tie.raw.as_deref(), Some("x"));
    }

    #[test]
    fn every_round_and_draw_is_another_request() {
        let votes = Votes {
            members: vec![1],
            samples: 2,
            temperature: 0.7,
        };
        let base = |rollout| Sampling {
            rollout,
            seed: Some(u64::MAX),
            ..Sampling::default()
        };
        let drawn = |round, sample| votes.sampling(&base(round), sample).rollout;
        let all = [
            drawn(None, 0),
            drawn(None, 1),
            drawn(Some(1), 0),
            drawn(Some(1), 1),
        ];
        assert_eq!(all, [Some(0), Some(1), Some(2), Some(3)]);
    }

    #[test]
    fn without_a_readable_answer_the_row_fails_and_an_outage_is_no_vote() {
        assert!(
            majority(vec![unread(), unread()], "label", false)
                .unwrap()
                .prediction
                .is_err()
        );
        let down = ballot(Err(RowError::Lm(LmError::Unavailable("down".into()))));
        let found = majority(vec![ballot(Ok("a")), down], "label", false).unwrap();
        assert!(matches!(found.prediction, Err(RowError::Lm(_))));
        assert_eq!(found.confidence, None);
    }
}
