//! [`Depot`]: a remote store as the place where two processes hand things to each other: objects
//! by digest, and small notes by name.
//!
//! Unlike [`RemoteCache`](super::RemoteCache), which does without a remote that fails, this tells
//! of each failure: who uses it cannot do without. Invariant: what [`Depot::get`] gives was
//! checked against its digest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use super::bucket::Bucket;
use super::download::{self, Flaw};
use super::policy::Refusal;
use super::shared::{SentObjects, Shared};
use super::upload::{self, Unsent};
use super::{ABREAST, AT_ONCE, FOLDER, RemoteError, RemoteOptions};
use crate::artifact::Artifact;
use crate::cache::Cache;
use crate::digest::Digest;
use crate::error::CacheError;
use crate::store::ArtifactStore;

/// Why something was not handed over.
#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    /// Of the local cache.
    #[error(transparent)]
    Here(#[from] CacheError),
    /// An object is not in the store.
    #[error("the object {} is not in the remote store {url}", digest.short())]
    Missing {
        /// Which.
        digest: Digest,
        /// Of the store.
        url: String,
    },
    /// What the store has under an object's name is not that object.
    #[error("the object {} is damaged in the remote store {url}: remove it there", digest.short())]
    Damaged {
        /// Which.
        digest: Digest,
        /// Of the store.
        url: String,
    },
    /// The store refuses, or does not answer.
    #[error("the remote store {url} cannot be used ({reason})")]
    There {
        /// Of the store.
        url: String,
        /// What it said.
        reason: String,
        /// Asking again may help.
        passes: bool,
    },
}

impl DepotError {
    /// Asking again may help.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::There { passes: true, .. })
    }
}

/// A remote store, opened to hand things over. Calls block, and must not be made from threads
/// that serve a runtime.
pub struct Depot {
    bucket: Bucket,
    /// Where uploads under way are noted.
    folder: PathBuf,
    transfers: Arc<Semaphore>,
    sent: Arc<SentObjects>,
    runtime: Option<Runtime>,
}

impl std::fmt::Debug for Depot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Depot({})", self.url())
    }
}

impl Drop for Depot {
    fn drop(&mut self) {
        // As with `RemoteCache`: it may be dropped on a thread that must not wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Depot {
    /// Opens it. No server is asked anything yet.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn open(options: &RemoteOptions, cache_dir: &Path) -> Result<Self, RemoteError> {
        Self::of(Bucket::open(&options.url, true, &options.env)?, cache_dir)
    }

    pub(super) fn of(bucket: Bucket, cache_dir: &Path) -> Result<Self, RemoteError> {
        Ok(Self {
            // Not that of the remote cache, which may send the same object at this moment.
            folder: cache_dir.join(FOLDER).join(&bucket.id).join("depot"),
            bucket,
            transfers: Arc::new(Semaphore::new(AT_ONCE)),
            sent: Arc::default(),
            runtime: Some(super::runtime()?),
        })
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> &str {
        self.bucket.url()
    }

    /// Sends the objects of artifacts that the store lacks.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn send(&self, store: &ArtifactStore, artifacts: Vec<Artifact>) -> Result<(), DepotError> {
        let shared = Arc::new(self.shared());
        let sent = self.wait(upload::objects(&shared, store, artifacts));
        sent.map_err(|unsent| match unsent {
            Unsent::Here(error) => error.into(),
            Unsent::There(refusal) => self.refused(refusal),
        })
    }

    /// Gets the objects of an artifact that the cache lacks.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn get(&self, cache: &Cache, artifact: &Artifact) -> Result<(), DepotError> {
        // What was refused before may be allowed now: each call begins with a fresh mind.
        let shared = self.shared();
        let got = self.wait(download::get_artifact(&shared, cache, artifact.clone()));
        let url = || self.url().to_owned();
        got.map_err(|flaw| match flaw {
            Flaw::Local(error) => error.into(),
            Flaw::Missing(digest) => DepotError::Missing { digest, url: url() },
            Flaw::Damaged(digest) => DepotError::Damaged { digest, url: url() },
            Flaw::Refused => DepotError::There {
                url: url(),
                reason: shared.policy.trouble().unwrap_or_default(),
                passes: true,
            },
        })
    }

    /// Writes the note `<id>/<name>`, in place of one that is there.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn write(&self, name: &str, bytes: Vec<u8>) -> Result<(), DepotError> {
        let path = self.bucket.note(name);
        let put = self.bucket.store.put(&path, PutPayload::from(bytes));
        self.wait(put)
            .map(drop)
            .map_err(|e| self.refused(Refusal::from(e)))
    }

    /// Writes a note unless there is one: then false.
    ///
    /// # Errors
    /// [`DepotError`]; also where the store cannot do this.
    pub fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, DepotError> {
        let path = self.bucket.note(name);
        let payload = PutPayload::from(bytes);
        let put = self
            .bucket
            .store
            .put_opts(&path, payload, PutMode::Create.into());
        match self.wait(put).map_err(Refusal::from) {
            Ok(_) => Ok(true),
            Err(Refusal::Exists) => Ok(false),
            Err(Refusal::Unable) => Err(DepotError::There {
                url: self.url().to_owned(),
                reason: "it cannot write a file only if there is none".to_owned(),
                passes: false,
            }),
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// A note; `None` when there is none.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, DepotError> {
        let path = self.bucket.note(name);
        let read = async { self.bucket.store.get(&path).await?.bytes().await };
        match self.wait(read).map_err(Refusal::from) {
            Ok(bytes) => Ok(Some(bytes.to_vec())),
            Err(Refusal::Missing) => Ok(None),
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// Whether there is such a note.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn has(&self, name: &str) -> Result<bool, DepotError> {
        let path = self.bucket.note(name);
        match self
            .wait(self.bucket.store.head(&path))
            .map_err(Refusal::from)
        {
            Ok(_) => Ok(true),
            Err(Refusal::Missing) => Ok(false),
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// Removes a note, if it is there.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn remove(&self, name: &str) -> Result<(), DepotError> {
        let path = self.bucket.note(name);
        let removed = self.wait(self.bucket.store.delete(&path));
        match removed.map_err(Refusal::from) {
            Ok(()) | Err(Refusal::Missing) => Ok(()),
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// Removes all notes of an id.
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn clear(&self, id: &str) -> Result<(), DepotError> {
        let folder = self.bucket.note(id);
        let store = &self.bucket.store;
        let cleared = async {
            store
                .list(Some(&folder))
                .map(|found| async move {
                    match store.delete(&found?.location).await {
                        // Both ends may tidy up at once.
                        Err(object_store::Error::NotFound { .. }) => Ok(()),
                        done => done,
                    }
                })
                .buffer_unordered(ABREAST)
                .try_collect::<()>()
                .await
        };
        match self.wait(cleared).map_err(Refusal::from) {
            Ok(()) | Err(Refusal::Missing) => {}
            Err(refusal) => return Err(self.refused(refusal)),
        }
        // A store has no folders, a folder has.
        if let Some(folder) = self.bucket.local(&folder) {
            let _ = std::fs::remove_dir_all(folder);
        }
        Ok(())
    }

    fn shared(&self) -> Shared {
        Shared::new(
            self.bucket.clone(),
            false,
            self.folder.clone(),
            Arc::clone(&self.transfers),
            Arc::clone(&self.sent),
        )
    }

    fn refused(&self, refusal: Refusal) -> DepotError {
        refused(self.url(), refusal)
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.runtime {
            Some(runtime) => runtime.block_on(work),
            // Only while it is dropped.
            None => futures::executor::block_on(work),
        }
    }
}

/// What a refusal of the store at `url` means for who cannot do without it.
pub(super) fn refused(url: &str, refusal: Refusal) -> DepotError {
    let (reason, passes) = match refusal {
        Refusal::Unreachable(why) => (why, true),
        Refusal::Left => ("it refused before".to_owned(), true),
        Refusal::Denied(why) => (why, false),
        Refusal::Missing => ("there is no such place".to_owned(), false),
        Refusal::Exists | Refusal::Unable => ("it does not take files".to_owned(), false),
    };
    DepotError::There {
        url: url.to_owned(),
        reason,
        passes,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::OpenOptions;

    fn cache(dir: &Path) -> Cache {
        Cache::open(dir, &OpenOptions::no_wait("test")).unwrap()
    }

    fn notes_and_objects_pass(bucket: &Bucket) {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (cache(&dir.path().join("a")), cache(&dir.path().join("b")));
        let sender = Depot::of(bucket.clone(), here.dir()).unwrap();
        let taker = Depot::of(bucket.clone(), there.dir()).unwrap();
        let folder = dir.path().join("folder");
        std::fs::create_dir_all(folder.join("deep")).unwrap();
        std::fs::write(folder.join("deep/file"), "x").unwrap();
        let tree = here.store().put_path(&folder).unwrap();
        let large = here.store().put_bytes(&vec![7; 9 << 20]).unwrap();
        let missing = taker.get(&there, &tree);
        assert!(matches!(missing, Err(DepotError::Missing { .. })));
        let both = vec![tree.clone(), large.clone()];
        sender.send(here.store(), both).unwrap();
        // What failed before is asked for again.
        for artifact in [&tree, &large] {
            taker.get(&there, artifact).unwrap();
            there.store().verify(artifact).unwrap();
        }
        assert_eq!(taker.read("id/note").unwrap(), None);
        assert!(sender.create("id/note", b"first".to_vec()).unwrap());
        assert!(!taker.create("id/note", b"second".to_vec()).unwrap());
        assert_eq!(taker.read("id/note").unwrap().unwrap(), b"first");
        sender.write("id/note", b"third".to_vec()).unwrap();
        sender.write("id/more/1", Vec::new()).unwrap();
        assert_eq!(taker.read("id/note").unwrap().unwrap(), b"third");
        assert!(taker.has("id/more/1").unwrap() && !taker.has("id/more/2").unwrap());
        sender.write("other/note", Vec::new()).unwrap();
        taker.remove("id/note").unwrap();
        taker.remove("id/note").unwrap();
        taker.clear("id").unwrap();
        taker.clear("id").unwrap();
        assert!(!sender.has("id/more/1").unwrap());
        assert!(sender.has("other/note").unwrap());
    }

    #[test]
    fn notes_and_objects_pass_through_a_store_and_through_a_folder() {
        notes_and_objects_pass(&Bucket::memory());
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}/shared", dir.path().display());
        let bucket = Bucket::open(&url, true, &std::collections::BTreeMap::new()).unwrap();
        notes_and_objects_pass(&bucket);
        assert!(!dir.path().join("shared/jobs/id").exists());
    }
}
