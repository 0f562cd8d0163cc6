//! How a file of the hub gets into the cache: its bytes into `blobs/`, under the name that the
//! hub gives to the content, and a link in the commit's folder.
//!
//! Invariant: a blob has its name only when it is whole, and has the sha256 that it is named by,
//! where it is. What an interrupted download brought stays beside it, and the next one goes on
//! from there. One process fetches a blob at a time.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flowrun_engine::step::{StepError, StepErrorKind};
use ureq::Body;
use ureq::http::{Response, StatusCode};

use super::client::{Client, NoAnswer};
use super::refusal::{Asked, explained, no_answer};
use crate::download::sha256_unless_stopped;
use crate::waiting::{self, Pieces};

/// Requests for the content of one file.
const TRIES: u32 = 5;
/// The wait before the second of them; each next one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// What the hub says of a file before it gives it.
struct Meta {
    /// Names the content: the sha256 of a large file, git's id of a small one.
    etag: String,
    size: Option<u64>,
}

/// Why the content did not come.
enum Broken {
    /// Asking again may help; what came is kept.
    Passing(StepError),
    Final(StepError),
}

impl Broken {
    fn of(error: StepError) -> Self {
        match error.kind {
            StepErrorKind::Transient => Self::Passing(error),
            _ => Self::Final(error),
        }
    }

    fn unanswered(asked: &Asked<'_>, error: NoAnswer) -> Self {
        match error {
            NoAnswer::Stopped(error) => Self::Final(error),
            error => Self::Passing(no_answer(asked, error)),
        }
    }
}

/// Fetches `url` to `place`, a path in the snapshot of a commit in the cache's folder
/// `repository`.
pub(super) fn fetch(
    client: &Client<'_>,
    url: &str,
    asked: &Asked<'_>,
    repository: &Path,
    place: &Path,
) -> Result<(), StepError> {
    let answer = client.head(url).map_err(|e| no_answer(asked, e))?;
    if !answer.status().is_success() && !answer.status().is_redirection() {
        return Err(explained(asked, &answer));
    }
    let meta = described(&answer).ok_or_else(|| {
        let endpoint = &asked.settings.endpoint;
        StepError::failed(format!(
            "`{endpoint}` does not answer as the hub does: it gives no usable ETag for {asked}"
        ))
        .help("look at HF_ENDPOINT")
    })?;
    let blobs = repository.join("blobs");
    std::fs::create_dir_all(&blobs).map_err(|e| unwritable(&blobs, &e))?;
    let blob = blobs.join(&meta.etag);
    let lock = blobs.join(format!("{}.lock", meta.etag));
    let held = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock);
    let mut held = held.map_err(|e| unwritable(&lock, &e))?;
    let cancel = &asked.settings.cancel;
    waiting::lock(&mut held, &lock, &asked.to_string(), cancel)?;
    if !blob.is_file() {
        let part = blobs.join(format!("{}.part", meta.etag));
        content(client, url, asked, &meta, &part)?;
        check(asked, &meta, &part)?;
        std::fs::rename(&part, &blob).map_err(|e| StepError::io(&blob, &e))?;
    }
    link(repository, &blob, place)
}

fn unwritable(path: &Path, error: &std::io::Error) -> StepError {
    StepError::io(path, error)
        .help("the hub's cache must be writable; HF_HUB_CACHE names another one")
}

fn described(answer: &Response<Body>) -> Option<Meta> {
    let header = |name: &str| answer.headers().get(name)?.to_str().ok();
    let size = |name: &str| header(name)?.trim().parse::<u64>().ok();
    let linked = header("x-linked-etag");
    let etag = linked.or_else(|| header("etag"))?.trim();
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    // It becomes the name of a file.
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    if etag.is_empty() || !etag.bytes().all(fits) {
        return None;
    }
    let own = answer.status().is_success() && linked.is_none();
    Some(Meta {
        etag: etag.to_owned(),
        size: size("x-linked-size").or_else(|| own.then(|| size("content-length")).flatten()),
    })
}

/// Makes `part` whole.
fn content(
    client: &Client<'_>,
    url: &str,
    asked: &Asked<'_>,
    meta: &Meta,
    part: &Path,
) -> Result<(), StepError> {
    let mut wait = FIRST_WAIT;
    for number in 1.. {
        match more(client, url, asked, meta, part) {
            Ok(()) => break,
            Err(Broken::Final(error)) => return Err(error),
            Err(Broken::Passing(error)) if number == TRIES => return Err(error),
            Err(Broken::Passing(error)) => tracing::info!("{}", error.message),
        }
        waiting::pause(&asked.settings.cancel, wait)?;
        wait *= 2;
    }
    Ok(())
}

/// Asks for what `part` lacks.
fn more(
    client: &Client<'_>,
    url: &str,
    asked: &Asked<'_>,
    meta: &Meta,
    part: &Path,
) -> Result<(), Broken> {
    let io = |e: std::io::Error| Broken::Final(StepError::io(part, &e));
    let passing = |why: String| {
        let text = format!("{asked} did not come whole: {why}");
        let help = "the next run goes on from what came";
        Broken::Passing(StepError::new(StepErrorKind::Transient, text).help(help))
    };
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(part)
        .map_err(io)?;
    let mut have = file.metadata().map_err(io)?.len();
    if meta.size.is_some_and(|size| have > size) {
        file.set_len(0).map_err(io)?;
        have = 0;
    }
    if meta.size == Some(have) {
        return Ok(());
    }
    let answer = client.get(url, have);
    let answer = answer.map_err(|e| Broken::unanswered(asked, e))?;
    match answer.status() {
        StatusCode::PARTIAL_CONTENT if begins_at(&answer, have) => {}
        StatusCode::OK => file.set_len(0).map_err(io)?,
        StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
            file.set_len(0).map_err(io)?;
            return Err(passing("the server gave another part of it".to_owned()));
        }
        _ => {
            return Err(Broken::of(explained(asked, &answer)));
        }
    }
    let body = answer.into_body();
    let pieces = Pieces::of(move || body.into_reader(), &asked.settings.cancel);
    let pieces = pieces.map_err(Broken::Final)?;
    loop {
        let piece = pieces.take().map_err(Broken::Final)?;
        let piece = piece.map_err(|e| passing(e.to_string()))?;
        if piece.is_empty() {
            break;
        }
        file.write_all(&piece).map_err(io)?;
    }
    file.sync_all().map_err(io)?;
    let have = file.metadata().map_err(io)?.len();
    match meta.size {
        Some(size) if have < size => Err(passing(format!("{have} of {size} bytes"))),
        Some(size) if have > size => {
            file.set_len(0).map_err(io)?;
            Err(passing(format!("{have} bytes, {size} were announced")))
        }
        _ => Ok(()),
    }
}

fn begins_at(answer: &Response<Body>, start: u64) -> bool {
    let range = answer.headers().get("content-range");
    let range = range.and_then(|range| range.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
}

/// A large file is named by its sha256.
fn check(asked: &Asked<'_>, meta: &Meta, part: &Path) -> Result<(), StepError> {
    if meta.etag.len() != 64 || !meta.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(());
    }
    let sha256 = sha256_unless_stopped(part, &asked.settings.cancel)?;
    if sha256 == meta.etag.to_ascii_lowercase() {
        return Ok(());
    }
    std::fs::remove_file(part).map_err(|e| StepError::io(part, &e))?;
    let text = format!(
        "{asked} came damaged: its sha256 is {sha256}, the hub says {}",
        meta.etag
    );
    Err(StepError::new(StepErrorKind::Transient, text).help("what came was removed; try again"))
}

/// Gives the blob its name in the snapshot.
fn link(repository: &Path, blob: &Path, place: &Path) -> Result<(), StepError> {
    let folder = place.parent().unwrap_or(repository);
    std::fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
    // A link to a blob that somebody removed.
    if place.symlink_metadata().is_ok() {
        std::fs::remove_file(place).map_err(|e| unwritable(place, &e))?;
    }
    let inside = folder.strip_prefix(repository).unwrap_or(folder);
    let mut target: PathBuf = inside.components().map(|_| "..").collect();
    target.push("blobs");
    target.push(blob.file_name().unwrap_or_default());
    // Some disks have no links.
    std::os::unix::fs::symlink(&target, place)
        .or_else(|_| std::fs::hard_link(blob, place))
        .or_else(|_| std::fs::copy(blob, place).map(|_| ()))
        .map_err(|e| unwritable(place, &e))
}
