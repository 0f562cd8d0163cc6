//! Downloads by content: a file that is known by its sha256 is looked for in
//! the distribution folder, then in the user's cache, and only then fetched. What an interrupted
//! download left there is gone on from. Everything that waits here ends with the world's cancel
//! flag.
//!
//! Knows nothing of data sets or models.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, TryLockError};

use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};
use reqwest::StatusCode;
use reqwest::blocking::Response;
use reqwest::header::{CONTENT_RANGE, RANGE};
use sha2::{Digest as _, Sha256};

use crate::waiting::{self, Pieces, unless_stopped};

/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// How long one download may take in all.
const TOTAL_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(1800);

/// sha256 of a file, lower-case hex.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_of(path: &Path) -> std::io::Result<String> {
    hashed(path, &Cancel::default())
}

/// As [`sha256_of`], unless the work is to stop.
///
/// # Errors
/// Cancelled; failed when the file cannot be read.
pub(crate) fn sha256_unless_stopped(path: &Path, cancel: &Cancel) -> Result<String, StepError> {
    let hashed = hashed(path, cancel);
    waiting::check(cancel)?;
    hashed.map_err(|e| StepError::io(path, &e))
}

fn hashed(path: &Path, cancel: &Cancel) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        if cancel.is_cancelled() {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Where a file with this sha256 lies already, if anywhere: in the user's
/// cache, or in the distribution folder under any name. Nowhere, once the work is to stop.
#[must_use]
pub fn find_local(sha256: &str, world: &World) -> Option<PathBuf> {
    let cached = cache_path(sha256, world);
    if cached.is_file() {
        return Some(cached);
    }
    let dist = world.distdir.as_deref()?;
    find_in_folder(dist, sha256, 3, &world.cancel)
}

/// The user's cache holds downloads under their sha256. A file gets there only
/// after its digest was checked.
#[must_use]
pub(crate) fn cache_path(sha256: &str, world: &World) -> PathBuf {
    world.user_cache.join("downloads").join(sha256)
}

fn find_in_folder(folder: &Path, sha256: &str, depth: usize, cancel: &Cancel) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            if depth > 0
                && let Some(found) = find_in_folder(&path, sha256, depth - 1, cancel)
            {
                return Some(found);
            }
        } else if hashed(&path, cancel).is_ok_and(|digest| digest == sha256) {
            return Some(path);
        }
    }
    None
}

/// The file with this sha256: local, else fetched from `url` into the user's cache.
///
/// # Errors
/// Transient when the network fails; invalid when what arrived has another digest; unseen when it
/// would have to be fetched and the world is only looked at; cancelled.
pub fn fetch(url: &str, sha256: &str, world: &World) -> Result<PathBuf, StepError> {
    if let Some(path) = find_local(sha256, world) {
        return Ok(path);
    }
    // Not all of the folder may have been looked at.
    waiting::check(&world.cancel)?;
    if world.offline {
        return Err(StepError::new(
            StepErrorKind::Transient,
            format!("`{url}` is not at hand and `--offline` forbids fetching it"),
        )
        .help("put the file into the folder named by --distdir"));
    }
    if world.look_only {
        return Err(StepError::unseen(url));
    }
    let cancel = &world.cancel;
    let _one = one_at_a_time(cancel)?;
    let dest = cache_path(sha256, world);
    let folder = dest.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
    // Two processes must not write to one file.
    let lock = dest.with_extension("lock");
    let held = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock);
    let mut held = held.map_err(|e| StepError::io(&lock, &e))?;
    waiting::lock(&mut held, &lock, &format!("`{url}`"), cancel)?;
    if let Some(path) = find_local(sha256, world) {
        return Ok(path);
    }
    let temp = dest.with_extension("part");
    fetch_to_temp(url, sha256, &temp, cancel)?;
    adopt(&temp, &dest, sha256, url, cancel)?;
    Ok(dest)
}

/// Held while something is fetched: steps that want the same file fetch it once, and their
/// temporary files do not meet.
///
/// # Errors
/// Cancelled.
pub(crate) fn one_at_a_time(cancel: &Cancel) -> Result<MutexGuard<'static, ()>, StepError> {
    static FETCHING: Mutex<()> = Mutex::new(());
    waiting::until(cancel, || match FETCHING.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    })
}

/// Checks a file against its declared sha256.
///
/// # Errors
/// Invalid on another digest; cancelled.
pub(crate) fn check_content(
    path: &Path,
    sha256: &str,
    origin: &str,
    cancel: &Cancel,
) -> Result<(), StepError> {
    let actual = sha256_unless_stopped(path, cancel)?;
    if actual == sha256 {
        return Ok(());
    }
    Err(StepError::invalid(format!(
        "`{origin}` has sha256 {actual}, but {sha256} is declared"
    ))
    .help("the file changed at its source, or the declared sha256 is wrong"))
}

/// Moves a finished temporary file to `dest` if its digest is the declared one.
///
/// # Errors
/// Invalid on another digest; the file is removed. Cancelled; it stays.
pub(crate) fn adopt(
    temp: &Path,
    dest: &Path,
    sha256: &str,
    origin: &str,
    cancel: &Cancel,
) -> Result<(), StepError> {
    if let Err(error) = check_content(temp, sha256, origin, cancel) {
        if error.kind != StepErrorKind::Cancelled {
            // Best effort: a leftover is harmless, its name is not a digest.
            let _ = std::fs::remove_file(temp);
        }
        return Err(error);
    }
    std::fs::rename(temp, dest).map_err(|e| StepError::io(dest, &e))
}

/// Makes `temp` whole, from what is there of it.
fn fetch_to_temp(url: &str, sha256: &str, temp: &Path, cancel: &Cancel) -> Result<(), StepError> {
    let io = |e: std::io::Error| StepError::io(temp, &e);
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(temp)
        .map_err(io)?;
    let have = file.metadata().map_err(io)?.len();
    if have > 0 && sha256_unless_stopped(temp, cancel)? == sha256 {
        return Ok(());
    }
    let client = reqwest::blocking::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(TOTAL_TIMEOUT)
        .build()
        .map_err(|e| transient(url, &e))?;
    let ask = |from: u64| {
        let request = client.get(url);
        let request = match from {
            0 => request,
            from => request.header(RANGE, format!("bytes={from}-")),
        };
        let answer = unless_stopped(cancel, move || request.send())?;
        answer.map_err(|e| transient(url, &root_cause(&e)))
    };
    let mut response = ask(have)?;
    if have > 0 && !begins_at(&response, have) {
        let status = response.status().as_u16();
        if [200, 206, 416].contains(&status) {
            file.set_len(0).map_err(io)?;
        }
        // Other bytes than those that were asked for, or none: it is another file now.
        if [206, 416].contains(&status) {
            response = ask(0)?;
        }
    }
    let status = response.status();
    if status.is_client_error() && ![408, 429].contains(&status.as_u16()) {
        return Err(
            StepError::invalid(format!("{url}: the server says {status}"))
                .help("check the URL; it may have moved"),
        );
    }
    if !status.is_success() {
        return Err(transient(url, &format!("the server says {status}")));
    }
    let pieces = Pieces::of(move || response, cancel)?;
    loop {
        // Reading may pass, a full disk will not.
        let piece = pieces.take()?;
        let piece =
            piece.map_err(|e| transient(url, &e).help("the next run goes on from what came"))?;
        if piece.is_empty() {
            break;
        }
        file.write_all(&piece).map_err(io)?;
    }
    file.sync_all().map_err(io)
}

fn transient(url: &str, error: &dyn std::fmt::Display) -> StepError {
    StepError::new(StepErrorKind::Transient, format!("{url}: {error}"))
}

/// Whether it is the rest from this byte on.
fn begins_at(response: &Response, start: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE);
    let range = range.and_then(|range| range.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
}

/// The innermost source of an error: "connection refused" says more than
/// "error sending request".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn world(dir: &Path) -> World {
        World {
            user_cache: dir.join("user"),
            offline: true,
            ..World::default()
        }
    }

    #[test]
    fn a_file_is_found_by_its_digest_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let dist = dir.path().join("dist/deep");
        std::fs::create_dir_all(&dist).unwrap();
        std::fs::write(dist.join("whatever"), "hello").unwrap();
        let sha = sha256_of(&dist.join("whatever")).unwrap();
        let mut world = world(dir.path());
        assert!(find_local(&sha, &world).is_none());
        let error = fetch("http://127.0.0.1:9/x", &sha, &world).unwrap_err();
        assert!(error.message.contains("--offline"));
        world.distdir = Some(dir.path().join("dist"));
        assert_eq!(
            fetch("http://127.0.0.1:9/x", &sha, &world).unwrap(),
            dist.join("whatever")
        );
    }

    /// A server of `content` that knows ranges; the first answer breaks off after `breaks` bytes.
    /// Gives its URL, and a place where the ranges are that it was asked for.
    fn serve(content: &'static [u8], breaks: usize) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).unwrap_or(0);
                let head = String::from_utf8_lossy(&buffer[..n]).to_lowercase();
                let range = head
                    .lines()
                    .find_map(|line| line.strip_prefix("range: bytes="));
                let from: usize = range.map_or(0, |r| r.trim_end_matches('-').parse().unwrap());
                let first = seen.lock().unwrap().is_empty();
                seen.lock().unwrap().push(range.unwrap_or("all").to_owned());
                let (rest, length) = (&content[from..], content.len());
                let status = match from {
                    0 => "200 OK".to_owned(),
                    _ => format!(
                        "206 Partial Content\r\nContent-Range: bytes {from}-{}/{length}",
                        length - 1
                    ),
                };
                let sent = if first { &rest[..breaks] } else { rest };
                let length = rest.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                );
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(sent);
            }
        });
        (url, asked)
    }

    #[test]
    fn an_interrupted_download_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let content = b"0123456789";
        let whole = dir.path().join("whole");
        std::fs::write(&whole, content).unwrap();
        let sha = sha256_of(&whole).unwrap();
        let world = World {
            offline: false,
            ..world(dir.path())
        };
        let (url, asked) = serve(content, 4);
        let error = fetch(&url, &sha, &world).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Transient, "{}", error.message);
        let path = fetch(&url, &sha, &world).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), content);
        assert_eq!(*asked.lock().unwrap(), ["all", "4-"]);
        // All of it was there when the process was killed.
        let part = path.with_extension("part");
        std::fs::rename(&path, &part).unwrap();
        assert_eq!(fetch(&url, &sha, &world).unwrap(), path);
        assert_eq!(asked.lock().unwrap().len(), 2);
        // Something else was there: it is refused, and the next download is a new one.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&part, "xxxx").unwrap();
        assert!(fetch(&url, &sha, &world).is_err());
        assert_eq!(fetch(&url, &sha, &world).unwrap(), path);
        assert_eq!(*asked.lock().unwrap(), ["all", "4-", "4-", "all"]);
    }

    #[test]
    fn a_download_that_is_stopped_keeps_what_came() {
        let dir = tempfile::tempdir().unwrap();
        let content = b"0123456789";
        let whole = dir.path().join("whole");
        std::fs::write(&whole, content).unwrap();
        let sha = sha256_of(&whole).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        let cancel = Cancel::default();
        let world = World {
            offline: false,
            cancel: cancel.clone(),
            ..world(dir.path())
        };
        let part = cache_path(&sha, &world).with_extension("part");
        let fetching = std::thread::spawn(move || fetch(&url, &sha, &world));
        // It says the first four bytes, and then nothing more.
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123";
        stream.write_all(head.as_bytes()).unwrap();
        while !std::fs::read(&part).is_ok_and(|came| came.len() == 4) {
            assert!(!fetching.is_finished());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        cancel.cancel();
        let error = fetching.join().unwrap().unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled, "{}", error.message);
        assert_eq!(std::fs::read(&part).unwrap(), content[..4]);
    }

    #[test]
    fn who_only_looks_fetches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let world = World {
            offline: false,
            look_only: true,
            ..world(dir.path())
        };
        let error = fetch("http://127.0.0.1:9/x", &"0".repeat(64), &world).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Unseen, "{}", error.message);
        assert!(!world.user_cache.exists(), "nothing is written");
    }

    #[test]
    fn a_wrong_digest_is_refused_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let temp = dir.path().join("temp");
        std::fs::write(&temp, "hello").unwrap();
        let error = adopt(
            &temp,
            &dir.path().join("dest"),
            &"0".repeat(64),
            "http://x",
            &Cancel::default(),
        )
        .unwrap_err();
        assert!(error.message.contains("declared"));
        assert!(!temp.exists() && !dir.path().join("dest").exists());
    }
}
