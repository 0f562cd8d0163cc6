//! Answers of language models in a remote: packs of lines as they stand in `completions/`, each
//! under the digest of its bytes.
//!
//! A pack is a stretch of a local segment. How far each segment was sent is noted, so a run that
//! is killed leaves the rest to the next one, and no answer is a request of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};

use super::bucket::Bucket;
use super::download::{self, blocking};
use super::policy::Refusal;
use super::{AT_ONCE, PART, Shared, upload};
use crate::completion::{LOOK_EVERY, known_packs, note_packs, packs_file, parse_line};
use crate::digest::Digest;
use crate::error::CacheError;
use crate::record::write_atomic;

/// Bytes of packs that are fetched at most: they are a means to save money, not a burden.
const MOST: u64 = 2 << 30;
/// Bytes of a pack at most: it is [`PART`] and the rest of a line. A larger one is not looked at.
const LARGEST: u64 = 4 * PART;
/// Bytes of packs from which on it is said by itself that they are fetched.
const MANY: u64 = 100 << 20;
/// Folder of the notes on what was sent.
const NOTES: &str = "answers";
/// The note of packs there that are damaged.
const DAMAGED: &str = "damaged";

/// Is handed a pack of answers.
pub(super) type TakePack<'a> = dyn FnMut(Digest, &[u8]) -> Result<(), CacheError> + 'a;

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
    send_but(shared, &folder, &BTreeMap::new()).await;
}

/// The same; everything that is not there when packs that were sent are there no more.
pub(super) async fn push(shared: &Arc<Shared>, folder: PathBuf) {
    let _one = shared.packing.lock().await;
    if !shared.policy.writes() {
        return;
    }
    let there: BTreeMap<Digest, u64> = match list(shared).await {
        Ok(all) => all
            .into_iter()
            .map(|(pack, meta)| (pack, meta.size))
            .collect(),
        Err(refusal) => return shared.refused(refusal),
    };
    let packs = packs_file(&folder, &shared.bucket.id);
    let known = known_packs(&packs);
    let (kept, lost): (Vec<Digest>, Vec<Digest>) =
        known.into_iter().partition(|pack| there.contains_key(pack));
    if !lost.is_empty() || there.is_empty() {
        tracing::debug!(
            "{} packs of answers are not in {} any more: all are compared",
            lost.len(),
            shared.bucket.url()
        );
        let lines: String = kept.iter().map(|pack| format!("{pack}\n")).collect();
        // In this order: after a kill in between, the next push finds the loss again.
        let forgotten = forget(&shared.folder.join(NOTES))
            .and_then(|()| write_atomic(&packs, lines.as_bytes()));
        if let Err(e) = forgotten {
            shared.policy.warn(format!(
                "answers that the remote cache {} lost cannot be sent again: {e}",
                shared.bucket.url()
            ));
        }
    }
    send_but(shared, &folder, &there).await;
}

/// Forgets what was sent.
fn forget(notes: &Path) -> Result<(), CacheError> {
    match std::fs::remove_dir_all(notes) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CacheError::io(notes, e)),
        _ => Ok(()),
    }
}

/// Sends what was not sent, but for packs that are `there`, with their sizes.
async fn send_but(shared: &Arc<Shared>, folder: &Path, there: &BTreeMap<Digest, u64>) {
    while shared.policy.writes() {
        let (from, notes) = (folder.to_owned(), shared.folder.join(NOTES));
        let Some(pack) = blocking(move || next(&from, &notes)).await else {
            return;
        };
        if !pack.lines.is_empty() {
            let digest = Digest::of_bytes(&pack.lines);
            let is_there = there.get(&digest) == Some(&(pack.lines.len() as u64));
            if !is_there && let Err(refusal) = put(shared, &digest, &pack).await {
                return upload::refused(shared, refusal);
            }
            // What was sent from here need not be fetched.
            let list = packs_file(folder, &shared.bucket.id);
            if let Err(e) = note_packs(&list, &[digest]) {
                tracing::debug!("{e}");
            }
        }
        if let Err(e) = write_atomic(&pack.note, pack.sent.as_bytes()) {
            tracing::debug!("what was sent cannot be noted: {e}");
            return;
        }
    }
}

async fn put(shared: &Shared, digest: &Digest, pack: &Pack) -> Result<(), Refusal> {
    let (size, tally) = (pack.lines.len() as u64, &shared.tally);
    tally.of_objects.fetch_add(1, Ordering::Relaxed);
    tally.of_bytes.fetch_add(size, Ordering::Relaxed);
    let _turn = shared.transfers.acquire().await;
    let payload = PutPayload::from(pack.lines.clone());
    let place = shared.bucket.pack(digest);
    shared.bucket.store.put(&place, payload).await?;
    tally.moved(size);
    tally.objects.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// The packs that are there.
async fn list(shared: &Shared) -> Result<Vec<(Digest, ObjectMeta)>, Refusal> {
    let list = shared.bucket.store.list(Some(&shared.bucket.packs()));
    let all: Vec<ObjectMeta> = list.try_collect().await?;
    let packs = all.into_iter();
    let packs = packs.filter_map(|meta| Some((Bucket::pack_of(&meta.location)?, meta)));
    Ok(packs.collect())
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
    let mut packs = match list(shared).await {
        Ok(packs) => packs,
        Err(refusal) => return shared.refused(refusal),
    };
    let damaged = shared.folder.join(DAMAGED);
    let noted = std::fs::read_to_string(&damaged).unwrap_or_default();
    let noted: BTreeSet<&str> = noted.lines().collect();
    packs.retain(|(digest, meta)| {
        let is_small = meta.size <= LARGEST;
        if !is_small {
            tracing::debug!("{} is too large for a pack of answers", meta.location);
        }
        is_small && !known.contains(digest) && !noted.contains(mark(digest, meta).as_str())
    });
    packs.sort_by_key(|(_, meta)| std::cmp::Reverse(meta.last_modified));
    let all: u64 = packs.iter().map(|(_, meta)| meta.size).sum();
    let mut bytes = 0;
    packs.retain(|(_, meta)| {
        let fits = bytes + meta.size <= MOST;
        bytes += if fits { meta.size } else { 0 };
        fits
    });
    let url = shared.bucket.url();
    if bytes < all {
        shared.policy.warn(format!(
            "the remote cache {url} has kept answers of {all} bytes that are not here; the newest {bytes} are used"
        ));
    }
    let text = format!("getting kept answers of {bytes} bytes from {url}");
    match bytes {
        0 => {}
        1..MANY => tracing::info!("{text}"),
        _ => tracing::warn!("{text}; Ctrl-C stops it"),
    }
    let mut got = stream::iter(packs)
        .map(|(digest, meta)| get(Arc::clone(shared), digest, meta))
        .buffer_unordered(AT_ONCE);
    while let Some(pack) = got.next().await {
        // Who does not listen any more has an error of its own to tell.
        if pack.is_some_and(|pack| tell.send(pack).is_err()) {
            return;
        }
    }
}

/// Hands on what comes until there is no more, or `stop`; false when that came first.
pub(super) fn hear(
    hear: &Receiver<(Digest, Vec<u8>)>,
    stop: &dyn Fn() -> bool,
    take: &mut TakePack<'_>,
) -> Result<bool, CacheError> {
    loop {
        if stop() {
            return Ok(false);
        }
        match hear.recv_timeout(LOOK_EVERY) {
            Ok((pack, bytes)) => take(pack, &bytes)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(true),
        }
    }
}

/// A pack as it is noted: one that is written anew is another.
fn mark(digest: &Digest, meta: &ObjectMeta) -> String {
    let written = meta.last_modified.timestamp_millis();
    format!("{digest} {} {written}", meta.size)
}

/// A pack, if it is there and whole.
async fn get(shared: Arc<Shared>, digest: Digest, meta: ObjectMeta) -> Option<(Digest, Vec<u8>)> {
    let _turn = shared.transfers.acquire().await;
    let (bytes, _) = download::get(&shared, &meta.location, None, LARGEST).await?;
    if Digest::of_bytes(&bytes) == digest {
        return Some((digest, bytes));
    }
    let text = format!(
        "the remote cache {} has a damaged pack of kept answers, {}; it is not used",
        shared.bucket.url(),
        digest.short()
    );
    shared.policy.warn(text);
    let noted = note_damaged(&shared.folder, &mark(&digest, &meta));
    if let Err(e) = noted {
        tracing::debug!("a damaged pack will be fetched again: {e}");
    }
    None
}

/// Notes that a pack is damaged, so that it is not fetched by each run.
fn note_damaged(folder: &Path, mark: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(folder.join(DAMAGED))?;
    file.write_all(format!("{mark}\n").as_bytes())
}
