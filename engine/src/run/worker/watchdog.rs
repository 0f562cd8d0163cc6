//! [`Watchdog`]: stops a step that takes longer than its `timeout`.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::step::Cancel;

/// Sets a cancel flag when time is up.
pub(super) struct Watchdog {
    limit: Duration,
    tell: Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

impl Watchdog {
    pub(super) fn start(limit: Duration, cancel: Cancel) -> Self {
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            let late = told.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                cancel.cancel();
            }
            late
        });
        Self {
            limit,
            tell,
            thread,
        }
    }

    /// The limit, if it was passed.
    pub(super) fn stop(self) -> Option<Duration> {
        // It may have ended already.
        let _ = self.tell.send(());
        self.thread.join().unwrap_or(false).then_some(self.limit)
    }
}
