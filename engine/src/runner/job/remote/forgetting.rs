//! Has the job system forget the jobs that are over: with the ends of others, the last ones when
//! the runner goes.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::{GRACE, LOOK_EVERY, Remote};
use crate::runner::job::{JobError, JobSystem};

impl Remote {
    /// Its process may not have ended yet, and nobody waits for that here. The job system is
    /// asked without the lock: other steps do not wait for its answers.
    pub(super) fn forget_with_others(&self, id: &str) {
        let over = || self.over.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = std::mem::take(&mut *over());
        ids.push(id.to_owned());
        forget(self.system.as_ref(), &mut ids);
        over().append(&mut ids);
    }
}

impl Drop for Remote {
    /// Forgets the jobs that are over.
    fn drop(&mut self) {
        let over = self.over.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut over = std::mem::take(over);
        let system = Arc::clone(&self.system);
        // Clients that block may not be used on the run's own thread.
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            while forget(system.as_ref(), &mut over)
                && !over.is_empty()
                && started.elapsed() < GRACE
            {
                std::thread::sleep(LOOK_EVERY);
            }
        });
        // It has nothing to tell.
        let _ = thread.join();
    }
}

/// Removes those that are gone, or that the job system will not let go. False when it does not
/// answer: the others are not tried then.
fn forget(system: &dyn JobSystem, over: &mut Vec<String>) -> bool {
    let mut answers = true;
    over.retain(|id| {
        if !answers {
            return true;
        }
        match system.forget(id) {
            Ok(gone) => !gone,
            Err(JobError::Unreachable(_) | JobError::Busy(_)) => {
                answers = false;
                true
            }
            Err(JobError::Refused { .. }) => false,
        }
    });
    answers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::runner::job::{JobOrder, JobState};

    /// A job system that went away.
    struct Gone(AtomicUsize);

    impl JobSystem for Gone {
        fn name(&self) -> String {
            "gone".to_owned()
        }
        fn submit(&self, _: &JobOrder<'_>) -> Result<(), JobError> {
            Err(JobError::Unreachable("gone".to_owned()))
        }
        fn state(&self, _: &JobOrder<'_>) -> Result<JobState, JobError> {
            Err(JobError::Unreachable("gone".to_owned()))
        }
        fn stop(&self, _: &str) -> Result<(), JobError> {
            Err(JobError::Unreachable("gone".to_owned()))
        }
        fn forget(&self, _: &str) -> Result<bool, JobError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Err(JobError::Unreachable("gone".to_owned()))
        }
    }

    #[test]
    fn one_that_went_away_is_asked_once_to_forget() {
        let gone = Gone(AtomicUsize::new(0));
        let mut over = vec!["a".to_owned(), "b".to_owned()];
        assert!(!forget(&gone, &mut over));
        assert_eq!((gone.0.load(Ordering::SeqCst), over.len()), (1, 2));
    }
}
