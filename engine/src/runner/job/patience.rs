//! [`Patience`]: how a remote store that does not answer is asked again.

use std::time::{Duration, Instant};

use flowrun_cache::DepotError;

use super::shipment::step_error;
use crate::step::StepError;

/// Wait between two tries.
const AGAIN: Duration = Duration::from_secs(1);

/// For how long a store that does not answer is asked, and what ends that sooner.
#[derive(Clone, Copy)]
pub(super) struct Patience<'a> {
    pub(super) longest: Duration,
    pub(super) stop: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    /// Does it again while that may help and `stop` does not say otherwise.
    pub(super) fn with<T>(
        self,
        mut work: impl FnMut() -> Result<T, DepotError>,
    ) -> Result<T, StepError> {
        let started = Instant::now();
        loop {
            match work() {
                Err(error)
                    if error.passes() && !(self.stop)() && started.elapsed() < self.longest =>
                {
                    std::thread::sleep(AGAIN);
                }
                ended => return ended.map_err(step_error),
            }
        }
    }
}
