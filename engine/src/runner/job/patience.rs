//! [`Patience`]: how a remote store that does not answer is asked again.

use std::time::{Duration, Instant};

use flowrun_cache::DepotError;

use super::shipment::step_error;
use crate::step::StepError;

/// How long the result of a job is offered to a store that does not answer, or asked of it, where
/// the step has no `timeout`.
pub(super) const A_DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Wait between two tries; doubles up to the second one.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_AT_MOST: Duration = Duration::from_secs(30);

/// For how long a store that does not answer is asked, and what ends that sooner.
#[derive(Clone, Copy)]
pub(super) struct Patience<'a> {
    pub(super) longest: Duration,
    pub(super) stop: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    /// Does it again, after waits that grow, while that may help and `stop` does not say otherwise.
    pub(super) fn with<T>(
        self,
        mut work: impl FnMut() -> Result<T, DepotError>,
    ) -> Result<T, StepError> {
        let started = Instant::now();
        let mut pause = AGAIN;
        loop {
            match work() {
                Err(error)
                    if error.passes() && !(self.stop)() && started.elapsed() < self.longest =>
                {
                    let left = self.longest.saturating_sub(started.elapsed());
                    rest(pause.min(left), self.stop);
                    pause = (pause * 2).min(AGAIN_AT_MOST);
                }
                ended => return ended.map_err(step_error),
            }
        }
    }
}

/// Sleeps, unless `stop` says so meanwhile.
fn rest(pause: Duration, stop: &dyn Fn() -> bool) {
    let started = Instant::now();
    while !stop() {
        let left = pause.saturating_sub(started.elapsed());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(AGAIN));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_may_help_is_done_again_until_it_does_or_nobody_wants_it() {
        let away = |passes| DepotError::There {
            url: "file:///store".to_owned(),
            reason: "gone".to_owned(),
            passes,
        };
        let tries = Cell::new(0);
        let tried = || tries.replace(tries.get() + 1);
        let day = |stop: &dyn Fn() -> bool, passes: bool, works_after: u32| {
            tries.set(0);
            let patience = Patience {
                longest: A_DAY,
                stop,
            };
            let done = patience.with(|| match tried() {
                n if n >= works_after => Ok(n),
                _ => Err(away(passes)),
            });
            (done.is_ok(), tries.get())
        };
        assert_eq!(day(&|| false, true, 1), (true, 2));
        assert_eq!(day(&|| false, false, 1), (false, 1));
        assert_eq!(day(&|| tries.get() > 1, true, 9), (false, 2));
        let none = Patience {
            longest: Duration::ZERO,
            stop: &|| false,
        };
        assert!(none.with(|| Err::<(), _>(away(true))).is_err());
    }
}
