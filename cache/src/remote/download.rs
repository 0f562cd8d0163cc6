//! Gets results and objects. An object has its name here only once its bytes have its digest,
//! and a result is put only after its objects, as everywhere.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt};
use tokio::task::JoinError;

use super::bucket::Bucket;
use super::{ABREAST, Fetched, PART, Shared};
use crate::action::{self, ACTION_VERSION, ActionKey, ActionResult, Parsed};
use crate::artifact::{Artifact, ArtifactKind};
use crate::cache::Cache;
use crate::digest::Digest;
use crate::error::CacheError;
use crate::store::ArtifactStore;

/// Bytes of a result or of the list of a folder's files that are read at most.
const SMALL: u64 = 256 << 20;

/// Why an object could not be had.
pub(super) enum Flaw {
    /// The remote says that it is not there.
    Missing(Digest),
    /// What is there is not what was stored.
    Damaged(Digest),
    /// The local cache cannot take it.
    Local(CacheError),
    /// The remote refuses: the policy knows.
    Refused,
}

impl From<CacheError> for Flaw {
    fn from(error: CacheError) -> Self {
        Self::Local(error)
    }
}

/// As [`super::RemoteCache::peek`].
pub(super) async fn peek(shared: &Shared, key: &ActionKey) -> Option<ActionResult> {
    let result = get_result(shared, key).await.ok()??;
    let artifacts: Vec<&Artifact> = artifacts(&result).collect();
    let there = stream::iter(artifacts).all(|artifact| async move {
        let path = shared.bucket.object(&artifact.digest);
        match shared.bucket.store.head(&path).await {
            Ok(meta) => artifact.kind == ArtifactKind::Tree || meta.size == artifact.size,
            Err(e) => {
                shared.refused(e.into());
                false
            }
        }
    });
    there.await.then_some(result)
}

/// The result under a key, if it is all there is to it: it has no outputs.
pub(super) async fn part(shared: &Shared, key: &ActionKey) -> Option<ActionResult> {
    let result = get_result(shared, key).await.ok()??;
    result.outputs.is_empty().then_some(result)
}

/// As [`super::RemoteCache::fetch`].
pub(super) async fn fetch(
    shared: &Shared,
    cache: &Cache,
    key: &ActionKey,
    fits: &dyn Fn(&ActionResult) -> bool,
) -> Fetched {
    let result = match get_result(shared, key).await {
        Ok(Some(result)) if fits(&result) => result,
        Ok(Some(_)) => {
            shared.spoil(key);
            return Fetched::Flawed("it lacks an output".to_owned());
        }
        Ok(None) => return Fetched::Nothing,
        Err(why) => return Fetched::Flawed(why),
    };
    let all = stream::iter(artifacts(&result).cloned().collect::<Vec<_>>())
        .map(|artifact| get_artifact(shared, cache, artifact))
        .buffer_unordered(ABREAST)
        .try_collect::<()>()
        .await;
    let flaw = match all {
        Ok(()) => match cache.actions().put(&result) {
            Ok(()) => return Fetched::Whole(Box::new(result)),
            Err(e) => e.into(),
        },
        Err(flaw) => flaw,
    };
    match flaw {
        Flaw::Missing(digest) => {
            shared.spoil(key);
            Fetched::Flawed(format!("its object {} is not there", digest.short()))
        }
        Flaw::Damaged(digest) => {
            shared.spoil(key);
            shared.spoil(&digest);
            Fetched::Flawed(format!("its object {} is damaged", digest.short()))
        }
        Flaw::Local(error) => Fetched::Flawed(error.to_string()),
        Flaw::Refused => Fetched::Nothing,
    }
}

/// As [`super::RemoteCache::pull`].
pub(super) async fn pull(shared: &Shared, cache: &Cache) -> Result<(usize, usize), String> {
    let list = shared.bucket.store.list(Some(&shared.bucket.results()));
    let all: Vec<_> = list
        .try_collect()
        .await
        .map_err(|e| super::policy::reason(&e))?;
    let keys = all.iter().filter_map(|meta| Bucket::key_of(&meta.location));
    let (mut fetched, mut flawed) = (0, 0);
    for key in keys.filter(|key| cache.actions().get(key).is_none()) {
        match fetch(shared, cache, &key, &|_| true).await {
            Fetched::Whole(_) => fetched += 1,
            Fetched::Flawed(why) => {
                flawed += 1;
                shared.policy.warn(format!("result {}: {why}", key.short()));
            }
            Fetched::Nothing if shared.policy.reads() => {}
            Fetched::Nothing => break,
        }
    }
    Ok((fetched, flawed))
}

fn artifacts(result: &ActionResult) -> impl Iterator<Item = &Artifact> {
    result.outputs.values().flat_map(|o| o.value.artifacts())
}

/// The result under a key, if it is whole and of this version; what is wrong with it otherwise.
async fn get_result(shared: &Shared, key: &ActionKey) -> Result<Option<ActionResult>, String> {
    let Some((bytes, _)) = get(shared, &shared.bucket.result(key), None, SMALL).await else {
        return Ok(None);
    };
    match action::parse(&bytes) {
        Parsed::Good(result) if result.key == *key => Ok(Some(*result)),
        Parsed::OtherVersion(version) => {
            // One of an older program may go; one of a newer stays.
            if version < u64::from(ACTION_VERSION) {
                shared.spoil(key);
            }
            Ok(None)
        }
        Parsed::Good(_) | Parsed::Damaged => {
            shared.spoil(key);
            Err("it cannot be read".to_owned())
        }
    }
}

/// The bytes in the range, `most` of them, and how many there are in all; `None` when there is
/// nothing, or the remote refuses.
pub(super) async fn get(
    shared: &Shared,
    path: &Path,
    range: Option<Range<u64>>,
    most: u64,
) -> Option<(Vec<u8>, u64)> {
    if !shared.policy.reads() {
        return None;
    }
    let options = GetOptions {
        range: range.map(GetRange::Bounded),
        ..GetOptions::default()
    };
    let read = async {
        let found = shared.bucket.store.get_opts(path, options).await?;
        let size = found.meta.size;
        first(found, most).await.map(|bytes| (bytes, size))
    };
    match read.await {
        Ok(read) => Some(read),
        Err(e) => {
            shared.refused(e.into());
            None
        }
    }
}

/// The bytes of an answer, `most` of them.
async fn first(found: GetResult, most: u64) -> object_store::Result<Vec<u8>> {
    let length = (found.range.end - found.range.start).min(most);
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    let mut chunks = found.into_stream();
    while let Some(chunk) = chunks.try_next().await? {
        let left = length - bytes.len() as u64;
        if chunk.len() as u64 >= left {
            bytes.extend_from_slice(&chunk[..usize::try_from(left).unwrap_or_default()]);
            break;
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Gets the objects of an artifact that the local cache lacks.
pub(super) async fn get_artifact(
    shared: &Shared,
    cache: &Cache,
    artifact: Artifact,
) -> Result<(), Flaw> {
    let store = cache.store();
    match artifact.kind {
        ArtifactKind::File => get_object(shared, cache, artifact.digest, Some(artifact.size)).await,
        ArtifactKind::Tree => {
            if store.verify_object(&artifact.digest).is_err() {
                get_object(shared, cache, artifact.digest, None).await?;
            }
            let tree = match store.tree(&artifact.digest) {
                Ok(tree) => tree,
                Err(CacheError::Missing { digest }) => return Err(Flaw::Damaged(digest)),
                Err(e) => return Err(e.into()),
            };
            stream::iter(tree.entries)
                .map(|entry| get_object(shared, cache, entry.digest, Some(entry.size)))
                .buffer_unordered(ABREAST)
                .try_collect()
                .await
        }
    }
}

/// Gets an object that the local cache lacks. Its size is known, or it is small.
async fn get_object(
    shared: &Shared,
    cache: &Cache,
    digest: Digest,
    size: Option<u64>,
) -> Result<(), Flaw> {
    let store = cache.store();
    if size.is_some_and(|size| store.has_object(&digest, size)) {
        return Ok(());
    }
    if !shared.policy.reads() {
        return Err(Flaw::Refused);
    }
    let path = shared.bucket.object(&digest);
    if size.is_some_and(|size| size > PART) {
        return get_large(shared, cache, &path, digest, size.unwrap_or_default()).await;
    }
    let _turn = shared.transfers.acquire().await;
    let Some((bytes, there)) = get(shared, &path, None, size.unwrap_or(SMALL)).await else {
        return Err(absent(shared, digest));
    };
    if size.is_some_and(|size| size != there) || Digest::of_bytes(&bytes) != digest {
        return Err(Flaw::Damaged(digest));
    }
    store.put_bytes(&bytes)?;
    Ok(())
}

/// The object was not given: it is not there, unless the remote refused.
fn absent(shared: &Shared, digest: Digest) -> Flaw {
    match shared.policy.reads() {
        true => Flaw::Missing(digest),
        false => Flaw::Refused,
    }
}

/// Gets a large object in pieces, several at once.
async fn get_large(
    shared: &Shared,
    cache: &Cache,
    path: &Path,
    digest: Digest,
    size: u64,
) -> Result<(), Flaw> {
    match shared.bucket.store.head(path).await {
        Ok(meta) if meta.size == size => {}
        Ok(_) => return Err(Flaw::Damaged(digest)),
        Err(e) => {
            shared.refused(e.into());
            return Err(absent(shared, digest));
        }
    }
    let scratch = cache.scratch()?;
    let place = scratch.path().join("object");
    let file = File::create_new(&place).map_err(|e| CacheError::io(&place, e))?;
    let file = Arc::new(file);
    let starts = (0..size).step_by(usize::try_from(PART).unwrap_or(usize::MAX));
    stream::iter(starts)
        .map(|from| {
            let (file, place) = (Arc::clone(&file), &place);
            async move {
                let most = PART.min(size - from);
                let _turn = shared.transfers.acquire().await;
                let Some((bytes, _)) = get(shared, path, Some(from..from + most), most).await
                else {
                    return Err(absent(shared, digest));
                };
                if bytes.len() as u64 != most {
                    return Err(Flaw::Damaged(digest));
                }
                blocking(move || file.write_all_at(&bytes, from))
                    .await
                    .map_err(|e| CacheError::io(place, e).into())
            }
        })
        .buffer_unordered(ABREAST)
        .try_collect::<()>()
        .await?;
    drop(file);
    take(cache.store().clone(), place, digest).await
}

/// Gives a file its name as an object if it has the digest.
async fn take(store: ArtifactStore, place: PathBuf, digest: Digest) -> Result<(), Flaw> {
    let taken = blocking(move || match Digest::of_file(&place) {
        Ok(found) if found == digest => store.take_path(&place).map(|a| a.digest == digest),
        Ok(_) => Ok(false),
        Err(e) => Err(CacheError::io(&place, e)),
    });
    match taken.await? {
        true => Ok(()),
        false => Err(Flaw::Damaged(digest)),
    }
}

/// Does work that blocks beside the requests.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work)
        .await
        .map_err(JoinError::try_into_panic)
    {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The program ends: nobody waits for this.
        Err(Err(_)) => std::future::pending().await,
    }
}
