//! [`Shared`]: what calls and background work of a remote share.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OnceCell, Semaphore};

use super::AT_ONCE;
use super::bucket::Bucket;
use super::outbox::Outbox;
use super::policy::{Policy, Refusal};
use super::tally::Tally;
use crate::digest::Digest;

/// What calls and background work share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) bucket: Bucket,
    pub(super) policy: Policy,
    pub(super) read_only: bool,
    /// Below [`FOLDER`](super::FOLDER) of the cache folder.
    pub(super) folder: PathBuf,
    pub(super) outbox: Outbox,
    /// Requests with content under way.
    pub(super) transfers: Arc<Semaphore>,
    /// Results that are being sent.
    pub(super) results: Semaphore,
    /// Held while answers are sent.
    pub(super) packing: tokio::sync::Mutex<()>,
    /// Objects that are there, or on their way.
    pub(super) sent: Arc<SentObjects>,
    /// Objects and results that were found damaged, or without what belongs to them.
    spoilt: Mutex<BTreeSet<Digest>>,
    pub(super) tally: Tally,
}

/// Objects that were sent, or are being sent: whoever wants the same waits for that.
pub(super) type SentObjects = Mutex<HashMap<Digest, Arc<OnceCell<()>>>>;

impl Shared {
    pub(super) fn new(
        bucket: Bucket,
        read_only: bool,
        folder: PathBuf,
        transfers: Arc<Semaphore>,
        sent: Arc<SentObjects>,
    ) -> Self {
        Self {
            bucket,
            policy: Policy::default(),
            read_only,
            outbox: Outbox::new(&folder),
            folder,
            transfers,
            results: Semaphore::new(AT_ONCE),
            packing: tokio::sync::Mutex::default(),
            sent,
            spoilt: Mutex::default(),
            tally: Tally::default(),
        }
    }

    /// Counts one thing to send as under way, until what this gives is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> Pending {
        self.tally.begin();
        Pending(Arc::clone(self))
    }

    /// A read was refused: what that means for what was asked.
    pub(super) fn refused(&self, refusal: Refusal) {
        if let Refusal::Denied(why) | Refusal::Unreachable(why) = refusal {
            self.policy.no_more_reads(self.bucket.url(), &why);
        }
    }

    /// Notes that an object or a result there is to be written anew.
    pub(super) fn spoil(&self, digest: &Digest) {
        self.spoilt().insert(*digest);
    }

    pub(super) fn is_spoilt(&self, digest: &Digest) -> bool {
        self.spoilt().contains(digest)
    }

    pub(super) fn mended(&self, digest: &Digest) {
        self.spoilt().remove(digest);
    }

    fn spoilt(&self) -> MutexGuard<'_, BTreeSet<Digest>> {
        self.spoilt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One result on its way: also counts down when the work panics.
pub(super) struct Pending(Arc<Shared>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.tally.end();
    }
}
