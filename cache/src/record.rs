//! Small record files: written to a temporary name, renamed.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::CacheError;

/// Writes `bytes` to `path` so that readers see the old file or the new one, never a
/// part. After a power cut it may be empty: its reader checks it.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
    write_parts(path, &[bytes])
}

/// As [`write_atomic`], of bytes that lie in several pieces.
pub(crate) fn write_parts(path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let temp = tempfile::NamedTempFile::new_in(folder).or_else(|_| {
        std::fs::create_dir_all(folder)?;
        tempfile::NamedTempFile::new_in(folder)
    });
    let mut temp = temp.map_err(|e| CacheError::io(folder, e))?;
    for part in parts {
        temp.write_all(part).map_err(|e| CacheError::io(path, e))?;
    }
    temp.persist(path)
        .map_err(|e| CacheError::io(path, e.error))?;
    Ok(())
}

/// What lies in a folder, which need not exist.
pub(crate) fn folder(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
}
