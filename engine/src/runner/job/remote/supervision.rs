//! Follows a job from its order to its end: hands on what it says, asks the job system, and stops
//! it when the run is to stop. What the answers mean is `watch`'s to judge.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Ended, Errand, GRACE, LOOK_EVERY, Remote, step_error};
use crate::runner::job::absence::Absence;
use crate::runner::job::collect::Collector;
use crate::runner::job::folder::AttemptFolder;
use crate::runner::job::follow::Follower;
use crate::runner::job::watch::{BEAT, Verdict, Watch};
use crate::runner::job::{JobError, JobOrder, JobState};
use crate::step::{StepError, StepErrorKind};

/// Wait between two looks into the folder; doubles up to [`LOOK_EVERY`].
const FIRST_LOOK: Duration = Duration::from_millis(50);
/// Wait between two questions to the job system, before the work shows that it goes on and after.
const ASK_EVERY: Duration = Duration::from_secs(1);
const ASK_EVERY_ALIVE: Duration = Duration::from_secs(5);

impl Remote {
    /// Returns when the attempt has an end, or the run is to stop.
    pub(super) fn follow(
        &self,
        errand: &Errand<'_>,
        order: &JobOrder<'_>,
        attempt: &AttemptFolder,
        mut collector: Option<&mut Collector>,
    ) -> Ended {
        let started = Instant::now();
        let patience = Duration::from_secs(self.settings.patience);
        let mut follower = Follower::new(attempt, errand.reporter);
        let mut watch = Watch::default();
        let mut asked = None;
        let mut looked = None;
        let mut pause = FIRST_LOOK;
        let mut absence = Absence::default();
        loop {
            if let Some(collector) = collector.as_deref_mut() {
                collector.look();
            }
            match follower.read() {
                // Not this runner told it to stop: the job system knows who did.
                Some(Err(error)) if is_foreign_stop(&error, errand) => watch.stops(),
                Some(answer) => return Ended::Answered(answer),
                None => {}
            }
            if errand.cancel.is_cancelled() {
                return self.stop(errand, order, attempt, &mut follower, collector);
            }
            if collector.as_deref().is_some_and(Collector::is_behind) {
                continue;
            }
            // Nothing that the job system says can be judged by one who does not hear the job.
            if let Some(collector) = collector.as_deref_mut() {
                if collector.away().is_some() {
                    if let Some(why) = self.unheard(errand, order, collector, &mut absence) {
                        return Ended::Lost(why);
                    }
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                }
                absence.ends();
            }
            let now = started.elapsed();
            if looked.is_none_or(|at| now.saturating_sub(at) > BEAT / 2) {
                looked = Some(now);
                watch.beats(attempt.last_beat(), now);
            }
            let every = match watch.is_alive(now) {
                true => ASK_EVERY_ALIVE,
                false => ASK_EVERY,
            };
            let said = asked
                .is_none_or(|at| now.saturating_sub(at) > every)
                .then(|| self.system.state(order));
            if let Some(said) = &said {
                asked = Some(now);
                self.hear(said, errand);
            }
            match watch.judge(said, now, patience) {
                Verdict::Wait => {}
                Verdict::Tell(text) => errand.reporter.warning(&text),
                Verdict::Lost(why) => return Ended::Lost(why),
                Verdict::Again => return Ended::Again,
                Verdict::Failed(why) => {
                    return Ended::Error(failed(order, &why, attempt, &mut follower));
                }
                Verdict::Hopeless(why) => {
                    let _ = self.system.stop(order.id);
                    let text = format!("{} cannot run the step: {why}", self.system.name());
                    let help = "change what it asks for (`resources`, the runner's settings), or the cluster";
                    return Ended::Error(StepError::failed(text).help(help));
                }
                Verdict::Stopped => {
                    let text = format!("the job {} was stopped by somebody", order.id);
                    return Ended::Error(StepError::failed(text));
                }
                Verdict::Refused(error) => {
                    // It may be stopped by one who may not look at it.
                    let _ = self.system.stop(order.id);
                    return Ended::Error(step_error(error));
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_EVERY);
        }
    }

    pub(in crate::runner::job) fn hear(
        &self,
        said: &Result<JobState, JobError>,
        errand: &Errand<'_>,
    ) {
        if said.is_ok() {
            self.reached.store(true, Ordering::Relaxed);
        }
        if let Ok(JobState::Waiting { why, .. }) = said {
            errand.reporter.progress(0, 0, "", &format!("waits: {why}"));
        }
    }

    /// Stops a job and waits for its end, not for ever.
    fn stop(
        &self,
        errand: &Errand<'_>,
        order: &JobOrder<'_>,
        attempt: &AttemptFolder,
        follower: &mut Follower,
        mut collector: Option<&mut Collector>,
    ) -> Ended {
        attempt.cancel();
        if let Some(collector) = &collector
            && let Err(error) = collector.shipment().withdraw()
        {
            let text = format!("the job {} could not be told to stop: {error}", order.id);
            errand.reporter.warning(&text);
        }
        let stopped = self.system.stop(order.id);
        if let Err(error) = &stopped {
            let text = format!("the job {} could not be stopped: {error}", order.id);
            errand.reporter.warning(&text);
        }
        let started = Instant::now();
        while stopped.is_ok() && started.elapsed() < GRACE && !errand.cancel.is_killed() {
            if let Some(collector) = collector.as_deref_mut() {
                collector.look();
            }
            match follower.read() {
                // What finished in the last moment is kept.
                Some(answer @ Ok(_)) => return Ended::Answered(answer),
                // It stopped, though the job system may see that much later.
                Some(Err(_)) => break,
                None => {}
            }
            let state = self.system.state(order);
            if matches!(state, Ok(JobState::Ended(_) | JobState::Unknown)) {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ended::Cancelled
    }
}

/// The other end was told to stop, and not by this runner: a preempted job, a drained node.
fn is_foreign_stop(error: &StepError, errand: &Errand<'_>) -> bool {
    error.kind == StepErrorKind::Cancelled && !errand.cancel.is_cancelled()
}

/// The error of a job that ended without a response.
fn failed(
    order: &JobOrder<'_>,
    why: &str,
    attempt: &AttemptFolder,
    follower: &mut Follower,
) -> StepError {
    let id = order.id;
    let begun = attempt.is_claimed();
    let last = match begun {
        true => follower.last_words(),
        false => attempt.console(),
    };
    let text = format!("the job {id} failed: {why}\n{last}");
    let error = StepError::failed(text.trim_end());
    match (begun, order.folder) {
        (true, _) => error,
        (false, Some(_)) => error.help(
            "the workers must have this program and see the cache folder; where their paths differ, say so with `program` and `shared` of the runner; where they see no folder of this machine, with `through: remote`",
        ),
        (false, None) => error.help(
            "the workers must have this program (`program` of the runner), reach the remote store, and have its credentials in their own environment",
        ),
    }
}
