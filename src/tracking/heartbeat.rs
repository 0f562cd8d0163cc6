//! [`Heartbeat`]: shows that work gets on. Knows no tracker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Time between two beats while work goes on elsewhere.
const EVERY: Duration = Duration::from_secs(1);

/// Shows that a tracker gets something done.
#[derive(Clone, Default)]
pub(crate) struct Heartbeat(Arc<AtomicUsize>);

impl Heartbeat {
    pub(crate) fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Has work done on a thread of its own, and beats meanwhile. The work shows that it gets on
    /// with the heartbeat that it is given. `None` once it did not for `limit`, or panicked; what
    /// goes on then is left to itself.
    pub(crate) fn during<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Option<T> {
        let moves = Self::default();
        let mover = moves.clone();
        let (tell, done) = channel();
        std::thread::spawn(move || {
            // It may have been left to itself.
            let _ = tell.send(work(&mover));
        });
        let mut moved = (moves.count(), Instant::now());
        loop {
            match done.recv_timeout(EVERY.min(limit)) {
                Ok(value) => return Some(value),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.beat();
            let count = moves.count();
            if count != moved.0 {
                moved = (count, Instant::now());
            } else if moved.1.elapsed() >= limit {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_gets_on_is_waited_for_and_work_that_does_not_is_left() {
        let beat = Heartbeat::default();
        let long = Duration::from_secs(3600);
        let done = beat.during(long, |moves| {
            moves.beat();
            7
        });
        assert_eq!(done, Some(7));
        let (hold, held) = channel::<()>();
        let before = beat.count();
        let stuck = beat.during(Duration::ZERO, move |_| held.recv().is_ok());
        assert_eq!(stuck, None);
        assert!(beat.count() > before);
        drop(hold);
    }
}
