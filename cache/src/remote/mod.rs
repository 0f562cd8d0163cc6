//! [`RemoteCache`]: the same objects and results in a folder or bucket that several machines share.
//!
//! | file | does |
//! |---|---|
//! | `answers` | sends and gets kept answers of language models, in packs |
//! | `bucket` | what a URL names, and the names of things there |
//! | `depot` | the same place as one where two processes hand things to each other |
//! | `prefix` | the same place as one where other programs find files by their names |
//! | `policy` | what is done about a remote that refuses |
//! | `shared` | what calls and background work share |
//! | `tally` | how much is sent |
//! | `download` | gets a result with its objects, each verified before it has its name |
//! | `upload` | sends objects, then the result |
//! | `multipart` | sends a large file in parts, and goes on where a kill left off |
//! | `outbox` | what is still to be sent |
//!
//! Its invariants: nothing that comes from a remote is used before its digest was checked, and
//! what is missing or wrong there is as if it had never been; a result is written only after all
//! its objects; and a remote that refuses never fails anything here.
//!
//! Calls block: requests run on a runtime of its own, whose connections outlive a call.

mod answers;
mod bucket;
mod depot;
mod download;
mod multipart;
mod outbox;
mod policy;
mod prefix;
mod shared;
mod tally;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod upload;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::ObjectStore;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use self::bucket::Bucket;
pub use self::bucket::{folder_of, folder_url, is_folder};
pub use self::depot::{Depot, DepotError};
pub use self::prefix::Prefix;
use self::shared::Shared;
pub use self::tally::{Sending, Sent};
use crate::action::{ActionKey, ActionResult};
use crate::cache::Cache;
use crate::completion::CompletionCache;
use crate::digest::Digest;
use crate::error::CacheError;
use crate::store::ArtifactStore;

/// Bytes that one request moves at most. S3 wants 5 MiB of a part at least.
const PART: u64 = 8 << 20;
/// Requests with content at once, which with [`PART`] bounds the memory they take.
const AT_ONCE: usize = 8;
/// Things that one call looks after at once.
const ABREAST: usize = 16;
/// Threads that serve the connections.
const THREADS: usize = 2;
/// How often answers are sent while a run is under way.
const ANSWERS_EVERY: Duration = Duration::from_secs(300);
/// Folder in the cache for what is kept about remotes.
const FOLDER: &str = "remotes";

/// Why a remote cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The URL is wrong, or the variables that go with it.
    #[error(
        "the remote cache `{url}`: {reason}; write `s3://bucket/path`, `gs://bucket/path`, `az://container/path`, `file:///folder` or a folder"
    )]
    Url {
        /// The URL.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The folder is not there, or cannot be made.
    #[error("the remote cache {url} cannot be used ({reason}); the run goes on without it")]
    Unreachable {
        /// Where.
        url: String,
        /// What the system said.
        reason: String,
    },
    /// The threads for it cannot be started.
    #[error("the remote cache cannot be used ({0}); the run goes on without it")]
    Threads(std::io::Error),
}

/// A shared cache in a folder or bucket.
pub struct RemoteCache {
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

/// What a remote has under a key.
#[derive(Debug)]
pub enum Fetched {
    /// The result; it and all its objects are in the local cache now.
    Whole(Box<ActionResult>),
    /// Something that cannot be used: why.
    Flawed(String),
    /// Nothing, or it was not asked.
    Nothing,
}

/// How a remote is used.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// `s3://bucket/path`, `gs://…`, `az://…`, `file:///folder`.
    pub url: String,
    /// Nothing is written there.
    pub read_only: bool,
    /// Environment variables: credentials and endpoints.
    pub env: BTreeMap<String, String>,
}

impl std::fmt::Debug for RemoteCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RemoteCache({})", self.url())
    }
}

impl Drop for RemoteCache {
    fn drop(&mut self) {
        // It may be dropped on a thread that must not wait. What is under way stays in the outbox.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl RemoteCache {
    /// Opens it. No server is asked anything yet.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn open(options: &RemoteOptions, cache_dir: &Path) -> Result<Self, RemoteError> {
        let bucket = Bucket::open(&options.url, !options.read_only, &options.env)?;
        Self::of(bucket, options.read_only, cache_dir)
    }

    fn of(bucket: Bucket, read_only: bool, cache_dir: &Path) -> Result<Self, RemoteError> {
        let folder = cache_dir.join(FOLDER).join(&bucket.id);
        let transfers = Arc::new(Semaphore::new(AT_ONCE));
        let shared = Shared::new(bucket, read_only, folder, transfers, Arc::default());
        Ok(Self {
            shared: Arc::new(shared),
            runtime: Some(runtime()?),
        })
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> &str {
        self.shared.bucket.url()
    }

    /// Nothing is written there.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.shared.read_only
    }

    /// How many results are still to be sent.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.outbox.waiting().len()
    }

    /// What the user must be told, once.
    #[must_use]
    pub fn take_warnings(&self) -> Vec<String> {
        self.shared.policy.take_warnings()
    }

    /// Asks for the first entry.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn check(&self) -> Result<(), String> {
        let results = self.shared.bucket.results();
        let first = async {
            let mut list = self.shared.bucket.store.list(Some(&results));
            list.try_next().await.map(drop)
        };
        self.wait(first).map_err(|e| policy::reason(&e))
    }

    /// The result under a key, when all its outputs seem to be there; nothing is written here.
    #[must_use]
    pub fn peek(&self, key: &ActionKey) -> Option<ActionResult> {
        self.wait(download::peek(&self.shared, key))
    }

    /// The result under a key, if it has no outputs. May be called wherever work waits for it.
    #[must_use]
    pub fn part(&self, key: &ActionKey) -> Option<ActionResult> {
        // Steps ask from threads that serve runtimes of their own, where `wait` must not be called.
        let (tell, hear) = std::sync::mpsc::channel();
        let (shared, key) = (Arc::clone(&self.shared), *key);
        self.runtime.as_ref()?.spawn(async move {
            // Who asked is waiting.
            let _ = tell.send(download::part(&shared, &key).await);
        });
        hear.recv().ok()?
    }

    /// Gets the result under a key with its objects, if it `fits`.
    #[must_use]
    pub fn fetch(
        &self,
        cache: &Cache,
        key: &ActionKey,
        fits: &dyn Fn(&ActionResult) -> bool,
    ) -> Fetched {
        self.wait(download::fetch(&self.shared, cache, key, fits))
    }

    /// Gets every result that the remote has and the local cache has not; how many, and how
    /// many could not be used.
    ///
    /// # Errors
    /// Why the remote cannot be used.
    pub fn pull(&self, cache: &Cache) -> Result<(usize, usize), String> {
        self.wait(download::pull(&self.shared, cache))
    }

    /// Sends a result in the background, objects first. `replace` what is there under its key.
    pub fn send(&self, store: &ArtifactStore, result: &ActionResult, replace: bool) {
        if self.shared.read_only {
            return;
        }
        let replace = replace || self.shared.is_spoilt(&result.key);
        if let Err(e) = self.shared.outbox.add(&result.key, replace) {
            tracing::debug!("the outbox cannot be written: {e}");
        }
        self.start(store, result.clone(), replace);
    }

    /// Sends what earlier runs left.
    pub fn send_waiting(&self, cache: &Cache) {
        if self.shared.read_only {
            return;
        }
        for (key, replace) in self.shared.outbox.waiting() {
            match cache.actions().get(&key) {
                Some(result) => self.start(cache.store(), result, replace),
                // It was collected meanwhile.
                None => self.shared.outbox.remove(&key),
            }
        }
    }

    /// Sends every result of the cache that is whole, if the remote has none under its key; how
    /// many there are.
    pub fn push(&self, cache: &Cache) -> usize {
        let whole = |result: &ActionResult| {
            let mut artifacts = result.outputs.values().flat_map(|o| o.value.artifacts());
            artifacts.all(|artifact| cache.store().contains(artifact))
        };
        let mut all = 0;
        for result in cache.actions().all().filter(whole) {
            self.send(cache.store(), &result, false);
            all += 1;
        }
        all
    }

    /// Sends the answers that were not sent yet, in the background.
    pub fn send_answers(&self, completions: &CompletionCache) {
        self.start_answers(completions, false);
    }

    /// The same, and all of them when the remote lost some that were sent.
    pub fn push_answers(&self, completions: &CompletionCache) {
        self.start_answers(completions, true);
    }

    fn start_answers(&self, completions: &CompletionCache, look: bool) {
        let runtime = self.runtime.as_ref();
        let runtime = runtime.filter(|_| !self.shared.read_only && self.shared.policy.writes());
        let (Some(runtime), Some(folder)) = (runtime, completions.folder()) else {
            return;
        };
        let done = self.shared.begin();
        let (shared, folder) = (Arc::clone(&self.shared), folder.to_owned());
        runtime.spawn(async move {
            match look {
                true => answers::push(&shared, folder).await,
                false => answers::send(&shared, folder).await,
            }
            drop(done);
        });
    }

    /// Sends them every few minutes: a machine that is lost loses no more to the others.
    pub(crate) fn keep_sending_answers(&self, folder: &Path) {
        let runtime = self.runtime.as_ref().filter(|_| !self.shared.read_only);
        let Some(runtime) = runtime else {
            return;
        };
        let (shared, folder) = (Arc::clone(&self.shared), folder.to_owned());
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(ANSWERS_EVERY).await;
                answers::send(&shared, folder.clone()).await;
            }
        });
    }

    /// Hands the packs of answers to `take` that are not in `known`, as they come, until it fails
    /// or `stop`; false when that came first. May be called wherever work waits for it.
    ///
    /// # Errors
    /// That of `take`.
    pub(crate) fn answers(
        &self,
        known: BTreeSet<Digest>,
        stop: &dyn Fn() -> bool,
        take: &mut answers::TakePack<'_>,
    ) -> Result<bool, CacheError> {
        let Some(runtime) = &self.runtime else {
            return Ok(true);
        };
        // As in `part`. What is not taken yet is bounded.
        let (tell, hear) = std::sync::mpsc::sync_channel(2);
        let shared = Arc::clone(&self.shared);
        let task = runtime.spawn(async move { answers::fetch(&shared, known, tell).await });
        let heard = answers::hear(&hear, stop, take);
        // Nobody waits for what has not come by now.
        task.abort();
        heard
    }

    /// Answers that came cannot be kept: that is worth a warning.
    pub(crate) fn cannot_keep(&self, why: &CacheError) {
        self.shared.policy.warn(format!(
            "answers of the remote cache {} cannot be kept: {why}",
            self.url()
        ));
    }

    /// Tells apart what is kept locally about different remotes.
    pub(crate) fn id(&self) -> &str {
        &self.shared.bucket.id
    }

    /// Why it was left alone, once it was.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.shared.policy.trouble()
    }

    fn start(&self, store: &ArtifactStore, result: ActionResult, replace: bool) {
        let Some(runtime) = self
            .runtime
            .as_ref()
            .filter(|_| self.shared.policy.writes())
        else {
            return;
        };
        let done = self.shared.begin();
        let (shared, store) = (Arc::clone(&self.shared), store.clone());
        runtime.spawn(async move {
            upload::result(&shared, &store, &result, replace).await;
            drop(done);
        });
    }

    /// Waits until everything is sent that can be, or until `stop`.
    pub fn flush(&self, stop: &dyn Fn() -> bool, tell: &mut dyn FnMut(Sending)) -> Sent {
        self.shared.tally.wait(stop, tell);
        self.sent()
    }

    /// What was sent until now.
    #[must_use]
    pub fn sent(&self) -> Sent {
        self.shared.tally.sent(self.waiting() as u64)
    }

    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    fn outbox_add(&self, key: &ActionKey) {
        self.shared.outbox.add(key, false).unwrap();
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.runtime {
            Some(runtime) => runtime.block_on(work),
            // Only while it is dropped.
            None => futures::executor::block_on(work),
        }
    }
}

/// The threads that serve the connections.
fn runtime() -> Result<Runtime, RemoteError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("remote")
        .enable_all()
        .build()
        .map_err(RemoteError::Threads)
}
