//! [`frontier`]: the programs that may be the parent of the next proposal.

use crate::evaluate::EvaluationResult;
use crate::program::Program;

/// Scored in full.
pub(super) struct Member {
    pub(super) program: Program,
    pub(super) result: EvaluationResult,
    /// Key of the action that its score is kept under, where it is.
    pub(super) key: Option<String>,
}

/// Whether one is as good as the other on every row, and better on one.
fn dominates(one: &Member, other: &Member) -> bool {
    let pairs = || one.result.rows.iter().zip(&other.result.rows);
    pairs().all(|(a, b)| a.score >= b.score) && pairs().any(|(a, b)| a.score > b.score)
}

/// The members that are best on some row, each as often as it is, without those that another one
/// dominates (GEPA's frontier).
pub(super) fn frontier(members: &[Member]) -> Vec<usize> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::evaluate::Evaluate;
    use crate::example::Example;
    use crate::metric::MetricKind;
    use crate::program::{ProgramSpec, Tokens};

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
}
