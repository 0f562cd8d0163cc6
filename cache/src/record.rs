//! Small record files: written to a temporary name, renamed.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::CacheError;

/// How the name of a record begins that is being written.
const UNFINISHED: &str = ".tmp";

/// Writes `bytes` to `path` so that readers see the old file or the new one, never a
/// part. After a power cut it may be empty: its reader checks it.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
    write_parts(path, &[bytes])
}

/// As [`write_atomic`], of bytes that lie in several pieces.
pub(crate) fn write_parts(path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // Random, as on other machines others may write here. Each hasher has keys of its own.
    let random = RandomState::new().hash_one(path);
    let temp = folder.join(format!("{UNFINISHED}{random:016x}"));
    let create = || {
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600).open(&temp)
    };
    let file = create().or_else(|_| {
        std::fs::create_dir_all(folder)?;
        create()
    });
    let mut file = file.map_err(|e| CacheError::io(folder, e))?;
    let written = parts.iter().try_for_each(|part| file.write_all(part));
    drop(file);
    let placed = written.and_then(|()| std::fs::rename(&temp, path));
    placed.map_err(|e| {
        // The first error says more.
        let _ = std::fs::remove_file(&temp);
        CacheError::io(path, e)
    })
}

/// A record that is being written, or whose writer was killed.
pub(crate) fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes())
}

/// What lies in a folder, which need not exist.
pub(crate) fn folder(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_there_whole_or_nothing_is_left_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/record");
        write_parts(&path, &[b"one ", b"two"]).unwrap();
        write_atomic(&path, b"three").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        let taken = dir.path().join("new/taken");
        std::fs::create_dir_all(taken.join("by")).unwrap();
        write_atomic(&taken, b"four").unwrap_err();
        let mut left: Vec<PathBuf> = folder(&dir.path().join("new")).collect();
        left.sort();
        assert_eq!(left, [path, taken]);
    }
}
