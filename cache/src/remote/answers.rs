//! Answers of language models in a remote: packs of lines as they stand in `completions/`, each
//! under the digest of its bytes.
//!
//! A pack is a stretch of a local segment. How far each segment was sent is noted, so a run that
//! is killed leaves the rest to the next one, and no answer is a request of its own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path as Place;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};

use super::bucket::Bucket;
use super::download::{self, SMALL, blocking};
use super::{AT_ONCE, PART, Refusal, Shared, upload};
use crate::completion::{note_pack, packs_file, parse_line};
use crate::digest::Digest;
use crate::error::CacheError;
use crate::record::write_atomic;

/// Bytes of packs that are fetched at most: they are a means to save money, not a burden.
const MOST: u64 = 2 << 30;
/// Folder of the notes on what was sent.
const NOTES: &str = "answers";

/// A stretch of a segment that was not sent yet.
struct Pack {
    /// Its whole and undamaged lines.
    lines: Vec<u8>,
    /// Where it is noted that it was sent.
    note: PathBuf,
    /// What is noted.
    sent: String,
}

/// Sends what the segments in `folder` hold that was not sent.
pub(super) async fn send(shared: &Arc<Shared>, folder: PathBuf) {
    let _one = shared.packing.lock().await;
    while shared.policy.writes() {
        let (from, notes) = (folder.clone(), shared.folder.join(NOTES));
        let Some(pack) = blocking(move || next(&from, &notes)).await else {
            return;
        };
        if !pack.lines.is_empty() {
            let digest = match put(shared, &pack).await {
                Ok(digest) => digest,
                Err(refusal) => return upload::refused(shared, refusal),
            };
            // What was sent from here need not be fetched.
            let list = packs_file(&folder, &shared.bucket.id);
            if let Err(e) = note_pack(&list, &digest) {
                tracing::debug!("{e}");
            }
        }
        if let Err(e) = write_atomic(&pack.note, pack.sent.as_bytes()) {
            tracing::debug!("what was sent cannot be noted: {e}");
            return;
        }
    }
}

async fn put(shared: &Shared, pack: &Pack) -> Result<Digest, Refusal> {
    let digest = Digest::of_bytes(&pack.lines);
    let (size, tally) = (pack.lines.len() as u64, &shared.tally);
    tally.of_objects.fetch_add(1, Ordering::Relaxed);
    tally.of_bytes.fetch_add(size, Ordering::Relaxed);
    let _turn = shared.transfers.acquire().await;
    let payload = PutPayload::from(pack.lines.clone());
    let place = shared.bucket.pack(&digest);
    shared.bucket.store.put(&place, payload).await?;
    tally.moved(size);
    tally.objects.fetch_add(1, Ordering::Relaxed);
    Ok(digest)
}

/// The next stretch, of [`PART`] bytes and the rest of a line.
fn next(folder: &Path, notes: &Path) -> Option<Pack> {
    let mut segments: Vec<PathBuf> = crate::record::folder(folder)
        .filter(|path| is_own(path))
        .collect();
    segments.sort();
    segments.iter().find_map(|segment| {
        let note = notes.join(segment.file_stem()?);
        let sent = std::fs::read_to_string(&note).unwrap_or_default();
        match stretch(segment, &sent) {
            Ok(found) => found.map(|(lines, sent)| Pack { lines, note, sent }),
            Err(e) => {
                tracing::debug!("{}", CacheError::io(segment, e));
                None
            }
        }
    })
}

/// Whether this machine's processes wrote it: others' are named by their remote.
fn is_own(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let number = stem.is_some_and(|stem| stem.bytes().all(|b| b.is_ascii_digit()));
    number && path.extension().is_some_and(|ending| ending == "log")
}

/// What follows in a segment what was sent of it, and the note for when this was sent, too: up to
/// which byte, and by what the segment begins (another one may have its name).
fn stretch(segment: &Path, sent: &str) -> std::io::Result<Option<(Vec<u8>, String)>> {
    let file = File::open(segment)?;
    let length = file.metadata()?.len();
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line)?;
    let begins = Digest::of_bytes(&line).to_hex();
    let noted = sent.split_once(' ').filter(|(_, of)| *of == begins);
    let noted = noted.and_then(|(end, _)| end.parse::<u64>().ok());
    let start = noted.filter(|end| *end <= length).unwrap_or(0);
    reader.seek(SeekFrom::Start(start))?;
    let (mut lines, mut end) = (Vec::new(), start);
    while (lines.len() as u64) < PART {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            break;
        }
        end += length as u64;
        // Damage here is not sent.
        if parse_line(&line).is_some() {
            lines.extend_from_slice(&line);
        }
    }
    Ok((end > start).then(|| (lines, format!("{end} {begins}"))))
}

/// Gives `tell` the packs that are not in `known`, each verified.
pub(super) async fn fetch(
    shared: &Arc<Shared>,
    known: BTreeSet<Digest>,
    tell: SyncSender<(Digest, Vec<u8>)>,
) {
    if !shared.policy.reads() {
        return;
    }
    let list = shared.bucket.store.list(Some(&shared.bucket.packs()));
    let all: Vec<_> = match list.try_collect().await {
        Ok(all) => all,
        Err(e) => return shared.refused(e.into()),
    };
    let packs = all
        .into_iter()
        .filter_map(|meta| Some((Bucket::pack_of(&meta.location)?, meta)));
    let mut packs: Vec<_> = packs
        .filter(|(digest, _)| !known.contains(digest))
        .collect();
    packs.sort_by_key(|(_, meta)| std::cmp::Reverse(meta.last_modified));
    let (mut bytes, there) = (0, packs.len());
    packs.retain(|(_, meta)| {
        bytes += meta.size;
        bytes <= MOST
    });
    if packs.len() < there {
        shared.policy.warn(format!(
            "the remote cache {} has kept answers of {bytes} bytes that are not here; the newest {MOST} are used",
            shared.bucket.url()
        ));
    }
    let mut got = stream::iter(packs)
        .map(|(digest, meta)| get(Arc::clone(shared), digest, meta.location))
        .buffer_unordered(AT_ONCE);
    while let Some(pack) = got.next().await {
        // Who does not listen any more has an error of its own to tell.
        if pack.is_some_and(|pack| tell.send(pack).is_err()) {
            return;
        }
    }
}

/// A pack, if it is there and whole.
async fn get(shared: Arc<Shared>, digest: Digest, place: Place) -> Option<(Digest, Vec<u8>)> {
    let _turn = shared.transfers.acquire().await;
    let (bytes, _) = download::get(&shared, &place, None, SMALL).await?;
    if Digest::of_bytes(&bytes) == digest {
        return Some((digest, bytes));
    }
    let text = format!(
        "the remote cache {} has a damaged pack of kept answers, {}; it is not used",
        shared.bucket.url(),
        digest.short()
    );
    shared.policy.warn(text);
    None
}
