//! What outlives the server: ids of the things in its folders, files that are written whole, and
//! records that are read again.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use flowrun_cache::Digest;
use serde::de::DeserializeOwned;

use crate::exit::{Exit, Failure};

/// Digits of a random id.
const ID: usize = 24;

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
    let part = path.with_extension("part");
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&part, path)
}

/// Makes a folder of the server's.
///
/// # Errors
/// When it cannot be made.
pub(super) fn make(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)
        .map_err(|e| Failure::new(Exit::Internal, format!("{}: {e}", folder.display())))
}

/// Reads every `*.json` of a folder. One that is damaged is set aside under another name.
///
/// # Errors
/// When the folder cannot be read.
pub(super) fn read_all<T: DeserializeOwned>(folder: &Path) -> Result<Vec<T>, Failure> {
    let failed = |e: &dyn std::fmt::Display| {
        Failure::new(Exit::Internal, format!("{}: {e}", folder.display()))
    };
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| failed(&e))? {
        let path = entry.map_err(|e| failed(&e))?.path();
        if path.extension().is_none_or(|ending| ending != "json") {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(|e| failed(&e))?;
        match serde_json::from_slice(&bytes) {
            Ok(kept) => all.push(kept),
            Err(error) => {
                let aside = path.with_extension("damaged");
                tracing::warn!(
                    "{}: {error}; it was renamed to {}",
                    path.display(),
                    aside.display()
                );
                std::fs::rename(&path, &aside).map_err(|e| failed(&e))?;
            }
        }
    }
    Ok(all)
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
    fn a_damaged_record_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a.json"), b"1").unwrap();
        write(&dir.path().join("b.json"), b"{").unwrap();
        write(&dir.path().join("c.jsonl"), b"{").unwrap();
        assert_eq!(read_all::<u64>(dir.path()).unwrap(), [1]);
        assert!(dir.path().join("b.damaged").is_file());
        assert_eq!(read_all::<u64>(dir.path()).unwrap(), [1]);
    }
}
