//! What outlives the server: ids of the things in its folders, and files that are written whole.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flowrun_cache::Digest;

use crate::exit::{Exit, Failure};

/// Digits of a random id.
const ID: usize = 24;
/// How the name of a file that is being written ends.
const PART: &str = "part";
/// Nobody writes any more to what was not touched for so long.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// An id that no other thing of this server has.
pub(super) fn new_id(prefix: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = since.map_or(0, |since| since.as_nanos());
    let digest = Digest::of_bytes(format!("{nanos} {count} {}", std::process::id()).as_bytes());
    let hex = digest.to_hex();
    format!("{prefix}{}", &hex[..ID])
}

/// Whether a caller's id is one of ours by its looks: it becomes part of a path.
pub(super) fn is_id(id: &str, prefix: &str) -> bool {
    let digits = id.strip_prefix(prefix);
    digits.is_some_and(|digits| digits.len() == ID && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Writes a file whole: after a power cut it is the old one or the new one.
pub(super) fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let part = path.with_extension(PART);
    let written = fill(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        // A disk that is full is not to be kept full by it.
        let _ = std::fs::remove_file(&part);
    }
    written
}

fn fill(part: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(part)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Removes what kills left half-written in a folder. What another server is writing there stays.
pub(super) fn sweep(folder: &Path) {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let parts = paths.filter(|path| path.extension().is_some_and(|ending| ending == PART));
    for path in parts.filter(|path| is_abandoned(path)) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!("{}: {error}", path.display());
        }
    }
}

fn is_abandoned(path: &Path) -> bool {
    let touched = std::fs::metadata(path).and_then(|about| about.modified());
    let age = touched.ok().and_then(|touched| touched.elapsed().ok());
    age.is_some_and(|age| age > ABANDONED)
}

/// Makes a folder of the server's.
///
/// # Errors
/// When it cannot be made.
pub(super) fn make(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)
        .map_err(|e| Failure::new(Exit::Internal, format!("{}: {e}", folder.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_callers_lead_nowhere_else() {
        let id = new_id("file-");
        assert!(is_id(&id, "file-"));
        assert_ne!(id, new_id("file-"));
        for id in [
            "",
            "file-",
            "file-../../../../etc/passwd00",
            "job-0",
            "file",
        ] {
            assert!(!is_id(id, "file-"), "{id}");
        }
    }

    #[test]
    fn what_is_half_written_goes_but_for_what_is_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        // A folder cannot be replaced by a file.
        std::fs::create_dir(at("a.json")).unwrap();
        assert!(write(&at("a.json"), b"1").is_err());
        assert!(!at("a.part").exists());
        let long_ago = SystemTime::now() - ABANDONED * 2;
        for (name, touched) in [
            ("old.part", long_ago),
            ("old.json", long_ago),
            ("new.part", SystemTime::now()),
        ] {
            let file = File::create(at(name)).unwrap();
            file.set_modified(touched).unwrap();
        }
        sweep(dir.path());
        assert!(!at("old.part").exists());
        assert!(at("old.json").exists() && at("new.part").exists());
    }
}
