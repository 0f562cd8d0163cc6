//! The canary: the new bundle and the one in use answer the same rows, side by side.

use std::fmt;

use flowrun_engine::step::{Cancel, StepError};
use flowrun_lm::stats::{McNemar, mcnemar};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::expect::missed;
use super::server::Endpoint;
use super::smoke::Progress;
use crate::scores::{ProgramScore, ScoredRow};

/// A comparison with what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Canary {
    /// Rows to ask, spread over those that were scored.
    #[schemars(range(min = 1))]
    pub(super) rows: usize,
    /// A loss is refused when McNemar's exact test gives a p-value below this.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub(super) alpha: f64,
}

impl Default for Canary {
    fn default() -> Self {
        Self {
            rows: 200,
            alpha: 0.05,
        }
    }
}

/// Rows that a refusal names; the log has all.
const NAMED: usize = 5;

/// A row that the two answer differently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    id: String,
    text: String,
    gold: String,
    new: String,
    deployed: String,
}

/// How the two compare.
#[derive(Debug)]
pub(super) struct Compared {
    rows: usize,
    test: McNemar,
    pub(super) differences: Vec<Difference>,
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let McNemar { only_a, only_b, p } = self.test;
        write!(
            f,
            "{} of {} rows differ; only the new bundle is right on {only_a}, only the deployed \
             one on {only_b} (McNemar's exact p = {p:.4})",
            self.differences.len(),
            self.rows
        )
    }
}

impl Compared {
    /// The first rows that only the deployed one answers right, in words.
    fn lost(&self) -> Vec<String> {
        let lost = self
            .differences
            .iter()
            .filter(|row| row.deployed == row.gold);
        let (count, words) = (lost.clone().count(), |row: &Difference| {
            format!(
                "`{}` is `{}`, now `{}` (`{}`)",
                row.id, row.gold, row.new, row.text
            )
        });
        let mut named: Vec<String> = lost.take(NAMED).map(words).collect();
        if count > NAMED {
            named.push(format!(
                "and {} more, in the log of the step",
                count - NAMED
            ));
        }
        named
    }
}

impl Canary {
    /// Asks both row by row.
    ///
    /// # Errors
    /// Gate when one of them does not answer; cancelled.
    pub(super) fn compare(
        &self,
        score: &ProgramScore,
        new: &Endpoint,
        deployed: &Endpoint,
        cancel: &Cancel,
        progress: Progress<'_>,
    ) -> Result<Compared, StepError> {
        let all = score.rows.len();
        let count = self.rows.min(all);
        let (mut pairs, mut differences) = (Vec::with_capacity(count), Vec::new());
        for at in 0..count {
            if cancel.is_cancelled() {
                return Err(StepError::cancelled());
            }
            let row = &score.rows[at * all / count];
            let (a, b) = (label(new, row, "new")?, label(deployed, row, "deployed")?);
            pairs.push((a == row.gold, b == row.gold));
            if a != b {
                differences.push(Difference {
                    id: row.id.clone(),
                    text: row.text.clone(),
                    gold: row.gold.clone(),
                    new: a,
                    deployed: b,
                });
            }
            progress(at as u64 + 1, count as u64);
        }
        Ok(Compared {
            rows: count,
            test: mcnemar(pairs),
            differences,
        })
    }

    /// # Errors
    /// Gate when the new bundle is worse, and not by chance.
    pub(super) fn check(&self, compared: &Compared) -> Result<(), StepError> {
        let McNemar { only_a, only_b, p } = compared.test;
        match only_b > only_a && p < self.alpha {
            true => Err(missed(format!(
                "the new bundle is worse: {compared}. Lost: {}",
                compared.lost().join("; ")
            ))),
            false => Ok(()),
        }
    }
}

fn label(endpoint: &Endpoint, row: &ScoredRow, which: &str) -> Result<String, StepError> {
    endpoint.predict(&row.question()).map_err(|why| {
        missed(format!(
            "the {which} bundle did not answer row `{}`: {why}",
            row.id
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_by_chance_passes_and_a_real_one_does_not() {
        let compared = |only_a: usize, only_b: usize| {
            let pairs = std::iter::repeat_n((true, false), only_a);
            Compared {
                rows: 100,
                test: mcnemar(pairs.chain(std::iter::repeat_n((false, true), only_b))),
                differences: Vec::new(),
            }
        };
        let canary = Canary::default();
        assert!(canary.check(&compared(4, 6)).is_ok());
        assert!(canary.check(&compared(12, 1)).is_ok());
        assert!(canary.check(&compared(1, 12)).is_err());
        assert!(
            compared(1, 12)
                .to_string()
                .contains("only the deployed one on 12")
        );
    }
}
