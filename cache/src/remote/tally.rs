//! [`Tally`]: how much is sent, and how much is still under way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// How far sending is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sending {
    /// Objects that are there by now.
    pub objects: u64,
    /// Of so many that are known of.
    pub of_objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of so many.
    pub of_bytes: u64,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// Results.
    pub results: u64,
    /// Objects; those that were there already do not count.
    pub objects: u64,
    /// Bytes that were moved; parts that an earlier run had sent do not count.
    pub bytes: u64,
    /// Results that are still to be sent.
    pub waiting: u64,
}

/// Counts of what is sent.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) objects: AtomicU64,
    pub(super) of_objects: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) of_bytes: AtomicU64,
    /// Bytes less those of parts that an earlier run had sent.
    moved: AtomicU64,
    pub(super) results: AtomicU64,
    /// Results under way; tells when it sinks.
    pending: Mutex<usize>,
    sunk: Condvar,
}

impl Tally {
    /// One more is under way.
    pub(super) fn begin(&self) {
        *self.pending() += 1;
    }

    /// It is no more.
    pub(super) fn end(&self) {
        *self.pending() -= 1;
        self.sunk.notify_all();
    }

    /// Waits until nothing is under way, or until `stop`.
    pub(super) fn wait(&self, stop: &dyn Fn() -> bool, tell: &mut dyn FnMut(Sending)) {
        let mut pending = self.pending();
        let mut told = None;
        while *pending > 0 && !stop() {
            let waited = self.sunk.wait_timeout(pending, TELL_EVERY);
            pending = waited.unwrap_or_else(PoisonError::into_inner).0;
            let now = self.sending();
            if *pending > 0 && told.replace(now) != Some(now) {
                tell(now);
            }
        }
    }

    /// What was sent until now; `waiting` are the results that still are to be.
    pub(super) fn sent(&self, waiting: u64) -> Sent {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Sent {
            results: of(&self.results),
            objects: of(&self.objects),
            bytes: of(&self.moved),
            waiting,
        }
    }

    fn pending(&self) -> MutexGuard<'_, usize> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes were sent.
    pub(super) fn moved(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sending(&self) -> Sending {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Sending {
            objects: of(&self.objects),
            of_objects: of(&self.of_objects),
            bytes: of(&self.bytes),
            of_bytes: of(&self.of_bytes),
        }
    }
}
