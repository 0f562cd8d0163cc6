//! Sends results: their objects first, so that whoever finds a result finds what it names.
//!
//! Several machines may send the same at once: an object's name is its content's, and of two
//! results under one key the first stays.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use super::download::blocking;
use super::policy::Refusal;
use super::{ABREAST, PART, Shared, multipart};
use crate::action::{self, ActionResult};
use crate::artifact::Artifact;
use crate::digest::Digest;
use crate::error::CacheError;
use crate::store::ArtifactStore;

/// Why something was not sent.
pub(super) enum Unsent {
    /// What is here is damaged or gone: there is nothing to send.
    Here(CacheError),
    /// The remote does not take it.
    There(Refusal),
}

impl From<CacheError> for Unsent {
    fn from(error: CacheError) -> Self {
        Self::Here(error)
    }
}

impl From<Refusal> for Unsent {
    fn from(refusal: Refusal) -> Self {
        Self::There(refusal)
    }
}

impl From<object_store::Error> for Unsent {
    fn from(error: object_store::Error) -> Self {
        Self::There(error.into())
    }
}

/// Sends a result. When it cannot be sent it stays in the outbox.
pub(super) async fn result(
    shared: &Arc<Shared>,
    store: &ArtifactStore,
    result: &ActionResult,
    replace: bool,
) {
    let _turn = shared.results.acquire().await;
    match send(shared, store, result, replace).await {
        Ok(sent) => {
            shared
                .tally
                .results
                .fetch_add(u64::from(sent), Ordering::Relaxed);
            shared.outbox.remove(&result.key);
            shared.mended(&result.key);
        }
        Err(Unsent::Here(error)) => {
            tracing::debug!("a result was not sent: {error}");
            shared.outbox.remove(&result.key);
        }
        Err(Unsent::There(refusal)) => refused(shared, refusal),
    }
}

/// No more is written.
pub(super) fn refused(shared: &Shared, refusal: Refusal) {
    let url = shared.bucket.url();
    match refusal {
        Refusal::Left => {}
        // A folder that cannot be written may well be read.
        Refusal::Unreachable(why) if shared.bucket.is_folder() => {
            shared.policy.no_more_writes(url, &why);
        }
        Refusal::Unreachable(why) => shared.policy.no_more_reads(url, &why),
        Refusal::Denied(why) => shared.policy.no_more_writes(url, &why),
        Refusal::Missing => shared.policy.no_more_writes(url, "there is no such place"),
        Refusal::Exists | Refusal::Unable => {
            shared.policy.no_more_writes(url, "it does not take files");
        }
    }
}

/// Whether the result was written; false when there was one.
async fn send(
    shared: &Arc<Shared>,
    store: &ArtifactStore,
    result: &ActionResult,
    replace: bool,
) -> Result<bool, Unsent> {
    let outputs = result.outputs.values().flat_map(|o| o.value.artifacts());
    objects(shared, store, outputs.cloned().collect()).await?;
    let path = shared.bucket.result(&result.key);
    let text = action::to_text(result).into_bytes();
    let put = |mode: PutMode| {
        let payload = PutPayload::from(text.clone());
        shared.bucket.store.put_opts(&path, payload, mode.into())
    };
    going_on(shared)?;
    let mode = match replace {
        true => PutMode::Overwrite,
        false => PutMode::Create,
    };
    let put = match put(mode).await.map_err(Refusal::from) {
        // Some file systems have no hard links, which it takes to make a file once.
        Err(Refusal::Unreachable(_)) if shared.bucket.is_folder() => {
            put(PutMode::Overwrite).await.map_err(Refusal::from)
        }
        Err(Refusal::Unable) => put(PutMode::Overwrite).await.map_err(Refusal::from),
        put => put,
    };
    match put {
        Ok(_) => Ok(true),
        Err(Refusal::Exists) => Ok(false),
        Err(refusal) => Err(Unsent::There(refusal)),
    }
}

/// Sends the objects of artifacts.
pub(super) async fn objects(
    shared: &Arc<Shared>,
    store: &ArtifactStore,
    artifacts: Vec<Artifact>,
) -> Result<(), Unsent> {
    let parts = {
        let store = store.clone();
        blocking(move || {
            let mut all = Vec::new();
            for artifact in &artifacts {
                all.extend(store.parts(artifact)?);
            }
            all.sort();
            all.dedup();
            Ok::<_, CacheError>(all)
        })
    };
    stream::iter(parts.await?)
        .map(|digest| once(Arc::clone(shared), store.clone(), digest))
        .buffer_unordered(ABREAST)
        .try_collect::<()>()
        .await
}

/// Sends an object, unless that was done in this run, or is being done: then it waits for that.
async fn once(shared: Arc<Shared>, store: ArtifactStore, digest: Digest) -> Result<(), Unsent> {
    let cell = {
        let mut sent = shared.sent.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(sent.entry(digest).or_default())
    };
    cell.get_or_try_init(|| object(&shared, &store, digest))
        .await?;
    Ok(())
}

async fn object(shared: &Shared, store: &ArtifactStore, digest: Digest) -> Result<(), Unsent> {
    going_on(shared)?;
    let place = store.object_path(&digest);
    let meta = std::fs::metadata(&place).map_err(|e| CacheError::io(&place, e))?;
    let size = meta.len();
    let path = shared.bucket.object(&digest);
    if !shared.is_spoilt(&digest) {
        match shared.bucket.store.head(&path).await.map_err(Refusal::from) {
            // One of another length was cut short, or is being written.
            Ok(meta) if meta.size == size => return Ok(()),
            Ok(_) | Err(Refusal::Missing) => {}
            Err(refusal) => return Err(Unsent::There(refusal)),
        }
    }
    let tally = &shared.tally;
    tally.of_objects.fetch_add(1, Ordering::Relaxed);
    tally.of_bytes.fetch_add(size, Ordering::Relaxed);
    if size > PART {
        let (store, checked) = (store.clone(), digest);
        blocking(move || store.verify_object(&checked)).await?;
        multipart::send(shared, &path, &place, digest, size).await?;
    } else {
        let _turn = shared.transfers.acquire().await;
        let bytes = read(place, store.clone(), digest).await?;
        going_on(shared)?;
        shared
            .bucket
            .store
            .put(&path, PutPayload::from(bytes))
            .await?;
        tally.moved(size);
    }
    tally.objects.fetch_add(1, Ordering::Relaxed);
    shared.mended(&digest);
    Ok(())
}

/// The bytes of an object, verified: damage here is never sent.
async fn read(place: PathBuf, store: ArtifactStore, digest: Digest) -> Result<Vec<u8>, CacheError> {
    tracing::trace!("sending {}", place.display());
    blocking(move || store.read(&digest)).await
}

/// An error once the remote takes nothing more.
pub(super) fn going_on(shared: &Shared) -> Result<(), Unsent> {
    match shared.policy.writes() {
        true => Ok(()),
        false => Err(Unsent::There(Refusal::Left)),
    }
}
