//! Sends a large file in parts, several at once. What was sent is noted beside the outbox, so
//! that after a kill only the parts under way are sent again.
//!
//! The note: a line with the upload's id and how the file was cut, then a line a part. A line
//! that was cut off is passed over. In a folder there are no parts: the file is written
//! under a temporary name and renamed, and a kill means that it is written again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::multipart::PartId;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};

use super::bucket::Parts;
use super::download::blocking;
use super::policy::Refusal;
use super::upload::{Unsent, going_on};
use super::{AT_ONCE, PART, Shared};
use crate::digest::Digest;
use crate::error::CacheError;

/// Version of the note. Another one means that the upload begins anew.
const VERSION: u32 = 1;
/// Parts of a file at most: S3's bound.
const MOST: u64 = 10_000;

/// The first line of the note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    version: u32,
    upload: String,
    size: u64,
    part: u64,
}

/// A part that the remote has.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    part: usize,
    id: String,
}

/// Sends the file.
pub(super) async fn send(
    shared: &Shared,
    path: &Path,
    file: &FilePath,
    digest: Digest,
    size: u64,
) -> Result<(), Unsent> {
    let Some(parts) = &shared.bucket.parts else {
        return copy(shared, path, file, size).await;
    };
    let note = shared.folder.join("uploads").join(digest.to_hex());
    let upload = Upload {
        shared,
        parts: &**parts,
        path,
        file,
        note: &note,
        size,
        part: PART.max(size.div_ceil(MOST)),
    };
    if let Some((head, done)) = read(&note).filter(|(head, _)| upload.is_mine(head)) {
        match upload.go_on(head, done).await {
            // The remote forgot the upload, or what it was given.
            Err(Unsent::There(Refusal::Missing | Refusal::Unable)) => {}
            ended => return ended,
        }
    }
    upload.begin().await
}

struct Upload<'a> {
    shared: &'a Shared,
    parts: &'a dyn Parts,
    path: &'a Path,
    file: &'a FilePath,
    note: &'a FilePath,
    size: u64,
    /// Bytes of a part.
    part: u64,
}

impl Upload<'_> {
    fn is_mine(&self, head: &Head) -> bool {
        (head.version, head.size, head.part) == (VERSION, self.size, self.part)
    }

    async fn begin(&self) -> Result<(), Unsent> {
        let upload = self.parts.create_multipart(self.path).await?;
        let head = Head {
            version: VERSION,
            upload,
            size: self.size,
            part: self.part,
        };
        let text = line(&head);
        let written = crate::record::write_atomic(self.note, text.as_bytes());
        // Without a note a kill costs the whole upload, no more.
        written.unwrap_or_else(|e| tracing::debug!("{e}"));
        self.go_on(head, BTreeMap::new()).await
    }

    /// Sends the parts that are missing, then has them put together.
    async fn go_on(&self, head: Head, mut done: BTreeMap<usize, String>) -> Result<(), Unsent> {
        let shared = self.shared;
        let count = usize::try_from(self.size.div_ceil(self.part)).unwrap_or(usize::MAX);
        done.retain(|part, _| *part < count);
        let there: u64 = done.keys().map(|part| self.length(*part)).sum();
        shared.tally.bytes.fetch_add(there, Ordering::Relaxed);
        let file = File::open(self.file).map_err(|e| CacheError::io(self.file, e))?;
        let file = Arc::new(file);
        let note = Arc::new(Mutex::new(self.note()));
        let missing: Vec<usize> = (0..count).filter(|part| !done.contains_key(part)).collect();
        let sent: Vec<(usize, String)> = stream::iter(missing)
            .map(|part| self.send_part(&head.upload, part, &file, &note))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        done.extend(sent);
        let ids = done.into_values().map(|content_id| PartId { content_id });
        let put = self
            .parts
            .complete_multipart(self.path, &head.upload, ids.collect());
        put.await?;
        // One that stays is not gone on from: the object is there.
        let _ = std::fs::remove_file(self.note);
        Ok(())
    }

    /// The note, to be added to: on a new line, for the last one may have been cut off.
    fn note(&self) -> Option<File> {
        let mut note = OpenOptions::new().append(true).open(self.note).ok()?;
        note.write_all(b"\n").ok().map(|()| note)
    }

    fn length(&self, part: usize) -> u64 {
        self.part
            .min(self.size.saturating_sub(part as u64 * self.part))
    }

    async fn send_part(
        &self,
        upload: &String,
        part: usize,
        file: &Arc<File>,
        note: &Arc<Mutex<Option<File>>>,
    ) -> Result<(usize, String), Unsent> {
        let _turn = self.shared.transfers.acquire().await;
        going_on(self.shared)?;
        let length = self.length(part);
        let bytes = piece(Arc::clone(file), part as u64 * self.part, length).await;
        let bytes = bytes.map_err(|e| CacheError::io(self.file, e))?;
        let payload = PutPayload::from(bytes);
        let id = self
            .parts
            .put_part(self.path, upload, part, payload)
            .await?;
        let id = id.content_id;
        if let Some(note) = &mut *note.lock().unwrap_or_else(PoisonError::into_inner) {
            let done = Done {
                part,
                id: id.clone(),
            };
            // As without a note.
            let _ = note.write_all(line(&done).as_bytes());
        }
        self.shared.tally.moved(length);
        Ok((part, id))
    }
}

/// Writes the file into a folder.
async fn copy(shared: &Shared, path: &Path, file: &FilePath, size: u64) -> Result<(), Unsent> {
    let open = File::open(file).map_err(|e| CacheError::io(file, e))?;
    let open = Arc::new(open);
    let mut upload = shared.bucket.store.put_multipart(path).await?;
    let mut at = 0;
    while at < size {
        let _turn = shared.transfers.acquire().await;
        going_on(shared)?;
        let length = PART.min(size - at);
        let bytes = piece(Arc::clone(&open), at, length).await;
        let bytes = bytes.map_err(|e| CacheError::io(file, e))?;
        upload.put_part(PutPayload::from(bytes)).await?;
        shared.tally.moved(length);
        at += length;
    }
    upload.complete().await?;
    Ok(())
}

/// A stretch of a file.
pub(super) async fn piece(file: Arc<File>, at: u64, length: u64) -> std::io::Result<Vec<u8>> {
    blocking(move || {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        file.read_exact_at(&mut bytes, at).map(|()| bytes)
    })
    .await
}

fn line(value: &impl Serialize) -> String {
    format!("{}\n", crate::canonical_json(value))
}

/// What the note says: the upload, and the parts that are there.
fn read(note: &FilePath) -> Option<(Head, BTreeMap<usize, String>)> {
    let mut lines = BufReader::new(File::open(PathBuf::from(note)).ok()?).lines();
    let head = serde_json::from_str(&lines.next()?.ok()?).ok()?;
    let done = lines.filter_map(|line| serde_json::from_str::<Done>(&line.ok()?).ok());
    Some((head, done.map(|done| (done.part, done.id)).collect()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_up_to_where_it_was_cut() {
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("note");
        let head = Head {
            version: VERSION,
            upload: "u".into(),
            size: 30,
            part: 10,
        };
        let done = |part| Done {
            part,
            id: format!("id {part}"),
        };
        let text = [line(&head), line(&done(2)), line(&done(0))].concat();
        std::fs::write(&note, &text).unwrap();
        let (found, parts) = read(&note).unwrap();
        assert_eq!(found, head);
        assert_eq!(parts.into_keys().collect::<Vec<_>>(), [0, 2]);
        std::fs::write(&note, &text[..text.len() - 4]).unwrap();
        assert_eq!(read(&note).unwrap().1.into_keys().collect::<Vec<_>>(), [2]);
        let more = format!("{}\n{}", &text[..text.len() - 4], line(&done(1)));
        std::fs::write(&note, more).unwrap();
        assert_eq!(
            read(&note).unwrap().1.into_keys().collect::<Vec<_>>(),
            [1, 2]
        );
        std::fs::write(&note, &text[..10]).unwrap();
        assert!(read(&note).is_none());
    }
}
