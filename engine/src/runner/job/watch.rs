//! [`Watch`]: from what is heard of an attempt to what it means. Pure: time is handed in.

use std::time::Duration;

use super::{JobEnd, JobError, JobState};

/// The other end counts up this often.
pub(super) const BEAT: Duration = Duration::from_secs(2);
/// One that did not count for so long is gone.
pub(super) const SILENCE: Duration = Duration::from_secs(20);
/// How long the response of a job that ended may take to be seen here.
const SETTLE: Duration = Duration::from_secs(5);

/// What was heard of an attempt so far. Times are since it began to be watched.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The last count, and when it was new.
    beat: Option<(u64, Duration)>,
    /// Since when the job system does not answer.
    unreached: Option<Duration>,
    /// Since when it does not know the job.
    unknown: Option<Duration>,
    /// How it ended, and when that was told.
    ended: Option<(JobEnd, Duration)>,
    /// The other end said that it stopped.
    stopped: bool,
    /// It was said that the job system is away.
    told: bool,
}

/// What it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing new.
    Wait,
    /// Wait, and say this once.
    Tell(String),
    /// It will not be done, but may be done by another attempt.
    Lost(String),
    /// It was never begun: order it again.
    Again,
    /// It failed without a response.
    Failed(String),
    /// It can never be begun.
    Hopeless(String),
    /// Somebody stopped it.
    Stopped,
    /// The job system refuses, and nothing shows that the work goes on.
    Refused(JobError),
}

impl Watch {
    /// The other end counted this far.
    pub(super) fn beats(&mut self, count: Option<u64>, now: Duration) {
        if let Some(count) = count
            && self.beat.is_none_or(|(last, _)| last != count)
        {
            self.beat = Some((count, now));
        }
    }

    /// The other end said that it stopped, because somebody else told it to.
    pub(super) fn stops(&mut self) {
        self.stopped = true;
    }

    /// The other end shows that it is at work.
    pub(super) fn is_alive(&self, now: Duration) -> bool {
        !self.stopped
            && self
                .beat
                .is_some_and(|(_, at)| now.saturating_sub(at) < SILENCE)
    }

    /// What the job system said; `None` when it was not asked this time.
    pub(super) fn judge(
        &mut self,
        said: Option<Result<JobState, JobError>>,
        now: Duration,
        patience: Duration,
    ) -> Verdict {
        match said {
            None => {}
            Some(Ok(JobState::Ended(end))) => {
                self.heard();
                self.ended.get_or_insert((end, now));
            }
            Some(Ok(JobState::Unknown)) => {
                self.unreached = None;
                self.unknown.get_or_insert(now);
            }
            Some(Ok(JobState::Waiting {
                why,
                hopeless: true,
            })) => return Verdict::Hopeless(why),
            Some(Ok(JobState::Waiting { .. } | JobState::Running)) => self.heard(),
            Some(Err(JobError::Unreachable(why) | JobError::Busy(why))) => {
                self.unreached.get_or_insert(now);
                if !self.told {
                    self.told = true;
                    return Verdict::Tell(format!("{why}; waiting for it"));
                }
            }
            Some(Err(refused @ JobError::Refused { .. })) => {
                if !self.is_alive(now) {
                    return Verdict::Refused(refused);
                }
                if !self.told {
                    self.told = true;
                    return Verdict::Tell(format!("{refused}; the work goes on"));
                }
            }
        }
        self.verdict(now, patience)
    }

    fn verdict(&self, now: Duration, patience: Duration) -> Verdict {
        let since = |at: Duration| now.saturating_sub(at);
        if let Some((end, at)) = &self.ended {
            // Its response may come a little later than the news.
            return match end {
                JobEnd::NotStarted(_) => Verdict::Again,
                _ if since(*at) < SETTLE => Verdict::Wait,
                JobEnd::Killed(why) => Verdict::Lost(why.clone()),
                JobEnd::Failed(why) => Verdict::Failed(why.clone()),
                // A job system that began the job twice: the second process found the work
                // taken, and ended well.
                JobEnd::Well if self.is_alive(now) => Verdict::Wait,
                JobEnd::Well => Verdict::Lost("it ended without a result".to_owned()),
                JobEnd::Stopped => Verdict::Stopped,
            };
        }
        // While the work goes on it does not matter who remembers it.
        if self.is_alive(now) {
            return Verdict::Wait;
        }
        match (self.unknown, self.unreached) {
            (Some(at), _) if since(at) >= SILENCE => {
                Verdict::Lost("the job system does not know the job any more".to_owned())
            }
            (_, Some(at)) if since(at) >= patience => Verdict::Lost(format!(
                "the job system did not answer for {} s",
                since(at).as_secs()
            )),
            _ => Verdict::Wait,
        }
    }

    fn heard(&mut self) {
        self.unreached = None;
        self.unknown = None;
        self.told = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// What a watch says after hearing these, a second apart, counting on while `beats`.
    fn hear(said: &[Result<JobState, JobError>], beats: bool) -> Vec<Verdict> {
        let mut watch = Watch::default();
        let mut all = Vec::new();
        for (second, said) in (0..).zip(said) {
            let now = Duration::from_secs(second);
            watch.beats(beats.then_some(second), now);
            all.push(watch.judge(Some(said.clone()), now, PATIENCE));
        }
        all
    }

    fn unreachable() -> Result<JobState, JobError> {
        Err(JobError::Unreachable("nobody at home".to_owned()))
    }

    #[test]
    fn work_that_goes_on_needs_nobody_who_remembers_it() {
        let mut said = vec![Ok(JobState::Running)];
        said.extend(std::iter::repeat_n(Ok(JobState::Unknown), 100));
        assert!(hear(&said, true).iter().all(|v| *v == Verdict::Wait));
        let silent = hear(&said, false);
        assert_eq!(silent[20], Verdict::Wait);
        assert!(matches!(silent[21], Verdict::Lost(_)), "{silent:?}");
    }

    #[test]
    fn one_that_does_not_answer_is_waited_for_and_told_of_once() {
        let mut said = vec![Ok(JobState::Running)];
        said.extend(std::iter::repeat_n(unreachable(), 70));
        let all = hear(&said, false);
        assert!(matches!(&all[1], Verdict::Tell(text) if text.contains("nobody at home")));
        assert!(all[2..61].iter().all(|v| *v == Verdict::Wait));
        assert!(matches!(&all[61], Verdict::Lost(text) if text.contains("60 s")));
        let alive = hear(&said, true);
        assert!(alive[2..].iter().all(|v| *v == Verdict::Wait));
        // It came back: the patience begins anew.
        said[40] = Ok(JobState::Running);
        assert!(
            !hear(&said, false)
                .iter()
                .any(|v| matches!(v, Verdict::Lost(_)))
        );
    }

    #[test]
    fn a_refusal_ends_no_work_that_goes_on() {
        let refused = JobError::refused("no token");
        let said = vec![Err(refused.clone()); 30];
        let alive = hear(&said, true);
        assert!(matches!(&alive[0], Verdict::Tell(text) if text.contains("no token")));
        assert!(alive[1..].iter().all(|v| *v == Verdict::Wait));
        assert_eq!(hear(&said, false)[0], Verdict::Refused(refused));
    }

    #[test]
    fn an_end_without_a_response_is_what_the_job_system_says() {
        let after = |end: JobEnd| {
            let said = vec![Ok(JobState::Ended(end)); 7];
            hear(&said, true).pop()
        };
        let text = || "why".to_owned();
        assert_eq!(after(JobEnd::Killed(text())), Some(Verdict::Lost(text())));
        assert_eq!(after(JobEnd::Failed(text())), Some(Verdict::Failed(text())));
        assert_eq!(after(JobEnd::Stopped), Some(Verdict::Stopped));
        assert_eq!(after(JobEnd::NotStarted(text())), Some(Verdict::Again));
        let early = hear(&[Ok(JobState::Ended(JobEnd::Killed(text())))], false);
        assert_eq!(early, [Verdict::Wait], "the response may still come");
    }

    #[test]
    fn one_that_was_begun_twice_is_lost_with_the_process_that_had_the_work() {
        let well = vec![Ok(JobState::Ended(JobEnd::Well)); 40];
        assert!(hear(&well, true).iter().all(|v| *v == Verdict::Wait));
        let silent = hear(&well, false);
        assert_eq!(silent[4], Verdict::Wait, "the response may still come");
        assert!(matches!(silent[5], Verdict::Lost(_)), "{silent:?}");
        // What it counted before it said that it stops is no sign of life.
        let mut watch = Watch::default();
        watch.beats(Some(1), Duration::ZERO);
        watch.stops();
        let mut judge = |second, said| watch.judge(said, Duration::from_secs(second), PATIENCE);
        assert_eq!(judge(1, well.first().cloned()), Verdict::Wait);
        assert!(matches!(judge(6, None), Verdict::Lost(_)));
    }

    #[test]
    fn what_can_never_start_is_told_at_once() {
        let waits = |hopeless| JobState::Waiting {
            why: "no node has 64 CPUs".to_owned(),
            hopeless,
        };
        let all = hear(&[Ok(waits(false)), Ok(waits(true))], false);
        assert_eq!(all[0], Verdict::Wait);
        assert_eq!(all[1], Verdict::Hopeless("no node has 64 CPUs".to_owned()));
    }
}
