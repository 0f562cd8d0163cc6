//! [`Expect`]: what must hold before a bundle is used.

use flowrun_engine::step::{StepError, StepErrorKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::smoke::Agreed;
use crate::bundle::Measured;

/// What must hold before a bundle is used; what is left out is not asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Expect {
    /// Accuracy of the scores given to the step.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub(super) min_accuracy: Option<f64>,
    /// Milliseconds that 95 % of the smoke rows are answered in, one after the other, on this
    /// machine.
    pub(super) max_p95_ms: Option<f64>,
    /// How much less accurate than the bundle that is deployed, at most. Both must have been
    /// measured on equally many rows of one data set.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub(super) max_drop: Option<f64>,
}

impl Expect {
    /// Checks what is known before anything runs. `deployed` is the bundle that is in use.
    ///
    /// # Errors
    /// Gate, with the figures.
    pub(super) fn check_scores(
        &self,
        new: &Measured,
        deployed: Option<&Measured>,
    ) -> Result<(), StepError> {
        let Measured { accuracy, n, .. } = *new;
        if let Some(least) = self.min_accuracy
            && accuracy < least
        {
            return Err(missed(format!(
                "the accuracy is {accuracy:.4} on {n} rows, expected is {least} at least"
            )));
        }
        let (Some(most), Some(old)) = (self.max_drop, deployed) else {
            return Ok(());
        };
        if old.n != n || old.dataset != new.dataset {
            return Err(missed(format!(
                "the deployed bundle was measured on {} rows of `{}`, this one on {n} of `{}`: \
                 no drop can be told",
                old.n, old.dataset, new.dataset
            )));
        }
        let drop = old.accuracy - accuracy;
        match drop > most {
            true => Err(missed(format!(
                "the accuracy is {accuracy:.4}, that of the deployed bundle {:.4}: the drop of \
                 {drop:.4} is more than {most}",
                old.accuracy
            ))),
            false => Ok(()),
        }
    }

    /// Checks how fast the answers were.
    ///
    /// # Errors
    /// Gate, with the figures.
    pub(super) fn check_speed(&self, agreed: &Agreed) -> Result<(), StepError> {
        let ms = agreed.p95.as_secs_f64() * 1e3;
        match self.max_p95_ms {
            Some(most) if ms > most => Err(missed(format!(
                "95 % of {} answers took up to {ms:.1} ms, expected are {most} ms at most",
                agreed.of
            ))),
            _ => Ok(()),
        }
    }
}

pub(super) fn missed(text: String) -> StepError {
    let text = format!("nothing was deployed: {text}");
    StepError::new(StepErrorKind::Gate, text).help(
        "what is deployed stays; change `expect` or `canary` of `deploy` only if this is meant",
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::scores::ProgramKind;
    use std::time::Duration;

    fn measured(correct: usize) -> Measured {
        Measured {
            dataset: "d".to_owned(),
            program: ProgramKind::Plain,
            n: 100,
            correct,
            accuracy: correct as f64 / 100.0,
            parse_failures: 0,
        }
    }

    #[test]
    fn accuracy_and_drop_have_their_bounds() {
        let expect = Expect {
            min_accuracy: Some(0.8),
            max_drop: Some(0.02),
            ..Expect::default()
        };
        assert!(expect.check_scores(&measured(80), None).is_ok());
        assert!(expect.check_scores(&measured(79), None).is_err());
        assert!(
            expect
                .check_scores(&measured(85), Some(&measured(86)))
                .is_ok()
        );
        let error = expect.check_scores(&measured(85), Some(&measured(90)));
        assert_eq!(error.unwrap_err().kind, StepErrorKind::Gate);
        let mut other = measured(80);
        other.n = 50;
        assert!(expect.check_scores(&measured(85), Some(&other)).is_err());
    }

    #[test]
    fn speed_has_its_bound() {
        let agreed = Agreed {
            right: 1,
            of: 1,
            p95: Duration::from_millis(10),
        };
        let expect = |ms| Expect {
            max_p95_ms: Some(ms),
            ..Expect::default()
        };
        assert!(expect(11.0).check_speed(&agreed).is_ok());
        assert!(expect(9.0).check_speed(&agreed).is_err());
    }
}
