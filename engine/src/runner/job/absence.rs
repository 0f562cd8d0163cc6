//! [`Absence`]: the store through which a job is heard does not answer. Only the job system can
//! tell then whether the job goes on, and its result is worth a long wait.

use std::time::Duration;

use super::collect::Collector;
use super::folder::AttemptFolder;
use super::patience::{A_DAY, Patience};
use super::remote::{Errand, Remote};
use super::shipment::Shipment;
use super::watch::Verdict;
use super::way::Way;
use super::{JobError, JobOrder, JobState};
use crate::step::{StepError, StepErrorKind};

/// Wait between two questions to the job system.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// What is known meanwhile. Times are since the store does not answer. Pure.
#[derive(Debug, Default)]
pub(super) struct Absence {
    /// When the job system was asked last.
    asked: Option<Duration>,
    /// When it showed last that the job waits or runs; it did so at the beginning.
    shown: Duration,
    /// It was said that the store is waited for, and that the job is followed for longer.
    told: bool,
    followed: bool,
}

impl Absence {
    /// The store answers again.
    pub(super) fn ends(&mut self) {
        self.asked = None;
        self.shown = Duration::ZERO;
    }

    /// Whether the job system is to be asked now.
    fn asks(&mut self, away: Duration, patience: Duration) -> bool {
        let since = |at: Duration| away.saturating_sub(at);
        let due = self.asked.is_none_or(|at| since(at) >= ASK_EVERY);
        let asks = due || since(self.shown) > patience;
        if asks {
            self.asked = Some(away);
        }
        asks
    }

    /// What it means that the store has been away for so long, with what the job system said if it
    /// was asked.
    fn judge(
        &mut self,
        said: Option<&Result<JobState, JobError>>,
        why: &str,
        away: Duration,
        patience: Duration,
    ) -> Verdict {
        let goes_on = |state: &JobState| match state {
            JobState::Waiting { hopeless, .. } => !hopeless,
            JobState::Running => true,
            JobState::Ended(_) | JobState::Unknown => false,
        };
        if said.is_some_and(|said| said.as_ref().is_ok_and(goes_on)) {
            self.shown = away;
        }
        let seconds = away.as_secs();
        if away.saturating_sub(self.shown) > patience {
            return Verdict::Lost(format!("{why}, for {seconds} s"));
        }
        if !self.told {
            self.told = true;
            return Verdict::Tell(format!("{why}; waiting for it"));
        }
        if away > patience && !self.followed {
            self.followed = true;
            return Verdict::Tell(format!(
                "{why}, for {seconds} s; the job is followed as long as the job system shows it"
            ));
        }
        Verdict::Wait
    }
}

impl Remote {
    /// Waits on for a job of which nothing is heard; why it is lost, if it is.
    pub(super) fn unheard(
        &self,
        errand: &Errand<'_>,
        order: &JobOrder<'_>,
        collector: &mut Collector,
        absence: &mut Absence,
    ) -> Option<String> {
        let patience = Duration::from_secs(self.settings.patience);
        let (away, why) = collector.away()?;
        // One that refuses for good is not waited for longer.
        let asks = collector.may_come_back() && absence.asks(away, patience);
        let said = asks.then(|| self.system.state(order));
        if let Some(said) = &said {
            self.hear(said, errand);
        }
        match absence.judge(said.as_ref(), why, away, patience) {
            Verdict::Tell(text) => errand.reporter.warning(&text),
            Verdict::Lost(why) => {
                // A job that has ended said all before: it may be there by now.
                collector.look_now();
                return collector.away().map(|_| why);
            }
            _ => {}
        }
        None
    }

    /// Brings here what the job made. It costs no work to wait for it: not even a store that is
    /// away for long makes it worth nothing.
    pub(super) fn bring(
        &self,
        errand: &Errand<'_>,
        way: &Way,
        shipment: &Shipment,
        attempt: &AttemptFolder,
    ) -> Result<(), StepError> {
        let stop = || errand.cancel.is_cancelled();
        let patience = self.patience(&stop);
        match shipment.bring(&way.cache, attempt, patience) {
            Err(error) if error.kind == StepErrorKind::Transient && !stop() => {
                let text = format!("what the job made is asked for again: {error}");
                errand.reporter.warning(&text);
                let patience = Patience {
                    longest: A_DAY,
                    ..patience
                };
                shipment.bring(&way.cache, attempt, patience)
            }
            brought => brought,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::JobEnd;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// What comes of a store that is away for so many seconds, while the job system says this of
    /// the job in each of them.
    fn through(seconds: u64, says: impl Fn(u64) -> Result<JobState, JobError>) -> Vec<Verdict> {
        let mut absence = Absence::default();
        let verdicts = (0..seconds).map(|second| {
            let away = Duration::from_secs(second);
            let said = absence.asks(away, PATIENCE).then(|| says(second));
            absence.judge(said.as_ref(), "gone", away, PATIENCE)
        });
        verdicts.collect()
    }

    fn lost(verdicts: &[Verdict]) -> Option<usize> {
        let is_lost = |verdict: &Verdict| matches!(verdict, Verdict::Lost(_));
        verdicts.iter().position(is_lost)
    }

    #[test]
    fn a_job_that_is_shown_is_followed_for_as_long() {
        let verdicts = through(1000, |_| Ok(JobState::Running));
        let told = verdicts.iter().filter_map(|verdict| match verdict {
            Verdict::Tell(text) => Some(text.as_str()),
            _ => None,
        });
        let expected = [
            "gone; waiting for it",
            "gone, for 61 s; the job is followed as long as the job system shows it",
        ];
        assert_eq!(told.collect::<Vec<_>>(), expected);
        assert_eq!(lost(&verdicts), None);
    }

    #[test]
    fn one_that_is_not_shown_is_lost_after_a_while() {
        let away = || Err(JobError::Unreachable("nobody at home".to_owned()));
        assert_eq!(lost(&through(1000, |_| away())), Some(61));
        assert_eq!(lost(&through(1000, |_| Ok(JobState::Unknown))), Some(61));
        // The wait begins anew each time that it is shown.
        let ends = |second: u64| match second {
            0..=500 => Ok(JobState::Running),
            _ => Ok(JobState::Ended(JobEnd::Well)),
        };
        assert_eq!(lost(&through(1000, ends)), Some(561));
        let flickers = |second: u64| match second % 50 {
            0..10 => Ok(JobState::Running),
            _ => away(),
        };
        assert_eq!(lost(&through(1000, flickers)), None);
    }
}
