//! [`Index`]: what makes the cache quick, kept in sled and never trusted.
//!
//! It holds the stat cache only: path, size and times of a file, and its digest.
//! Everything in it can be computed again. sled 0.34 may error, panic or spin for
//! ever on damaged files, so the folder is opened only when a clean-close
//! marker matches it; otherwise it is thrown away and begun anew. Without sled
//! the cache works, slower.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use crate::digest::Digest;
use crate::error::CacheError;
use crate::stamp::FileStamp;

/// sled's memory for pages, in bytes.
const PAGE_CACHE: u64 = 16 << 20;
/// A file of fewer bytes is hashed each time: that costs less than to ask sled.
const SMALL: u64 = 16 << 10;
/// Bytes of a stat record: a digest, then its blake3 prefix.
const RECORD_LEN: usize = 32 + 8;

/// The stat cache. Opened at first use.
#[derive(Debug)]
pub struct Index {
    folder: PathBuf,
    db: OnceLock<Option<sled::Db>>,
    warnings: Mutex<Vec<String>>,
}

impl Index {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            db: OnceLock::new(),
            warnings: Mutex::default(),
        }
    }

    /// Digest of a file, from the stat cache when size, times and inode are as they were.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn file_digest(&self, path: &Path) -> io::Result<Digest> {
        let meta = std::fs::metadata(path)?;
        if meta.len() < SMALL {
            return Digest::of_file(path);
        }
        let key = stat_key(path, &meta);
        if let Some(digest) = self.get(&key) {
            return Ok(digest);
        }
        let digest = Digest::of_file(path)?;
        let settled = FileStamp::of(&meta).is_settled(SystemTime::now());
        if settled && stat_key(path, &std::fs::metadata(path)?) == key {
            self.put(&key, &digest);
        }
        Ok(digest)
    }

    fn get(&self, key: &[u8]) -> Option<Digest> {
        let value = guarded(|| self.db()?.get(key).ok()?)?;
        let (hex, sum) = (value.get(..32)?, value.get(32..RECORD_LEN)?);
        if blake3::hash(hex).as_bytes()[..8] != *sum {
            return None;
        }
        Digest::parse(&blake3::Hash::from_slice(hex).ok()?.to_hex())
    }

    fn put(&self, key: &[u8], digest: &Digest) {
        let Ok(hash) = blake3::Hash::from_hex(digest.to_hex()) else {
            return;
        };
        let mut value = hash.as_bytes().to_vec();
        value.extend_from_slice(&blake3::hash(hash.as_bytes()).as_bytes()[..8]);
        // A stat record that is lost costs one hash of one file.
        let _ = guarded(|| self.db()?.insert(key, value).ok());
    }

    /// The database; opened once. `None` when sled cannot be used.
    fn db(&self) -> Option<&sled::Db> {
        self.db.get_or_init(|| self.open()).as_ref()
    }

    fn open(&self) -> Option<sled::Db> {
        if self.folder.exists() && !self.was_closed_cleanly() {
            self.warn("the index was not closed cleanly; it is built anew");
            self.remove().ok()?;
        }
        // From here on a crash leaves no marker, so the next run starts anew.
        let _ = std::fs::remove_file(self.marker());
        let db = guarded(|| {
            sled::Config::new()
                .path(&self.folder)
                .mode(sled::Mode::LowSpace)
                .cache_capacity(PAGE_CACHE)
                .open()
                .ok()
        });
        if db.is_none() {
            self.warn("the index cannot be opened; files are hashed without it");
        }
        db
    }

    fn marker(&self) -> PathBuf {
        self.folder.with_extension("closed")
    }

    fn was_closed_cleanly(&self) -> bool {
        let noted = std::fs::read_to_string(self.marker()).ok();
        noted.is_some() && noted == describe(&self.folder).ok()
    }

    /// Flushes, closes, and notes what the folder looked like.
    pub(crate) fn close(&mut self) {
        let Some(Some(db)) = self.db.take() else {
            return;
        };
        let flushed = guarded(|| db.flush().ok()).is_some();
        drop(db);
        if flushed && let Ok(text) = describe(&self.folder) {
            // Without the marker the next run begins a new index.
            let _ = crate::record::write_atomic(&self.marker(), text.as_bytes());
        }
    }

    /// Throws the index away, unless it is open already.
    pub(crate) fn discard(&self) -> Result<(), CacheError> {
        if self.db.get().is_some() || !self.folder.exists() {
            return Ok(());
        }
        self.remove().map_err(|e| CacheError::io(&self.folder, e))
    }

    fn remove(&self) -> io::Result<()> {
        // It may be anything but a folder.
        std::fs::remove_dir_all(&self.folder)
            .or_else(|e| std::fs::remove_file(&self.folder).map_err(|_| e))
    }

    fn warn(&self, text: &str) {
        tracing::warn!(folder = %self.folder.display(), "{text}");
        self.warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text.to_owned());
    }

    pub(crate) fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        self.close();
    }
}

/// Runs a call into sled; a panic inside it is a miss.
fn guarded<T>(call: impl FnOnce() -> Option<T>) -> Option<T> {
    catch_unwind(AssertUnwindSafe(call)).ok().flatten()
}

fn stat_key(path: &Path, meta: &Metadata) -> Vec<u8> {
    let stat = (path.to_string_lossy(), meta.dev(), FileStamp::of(meta));
    Digest::of_record("stat", &stat).to_hex().into_bytes()
}

/// Every file of the folder with its bytes' digest: the index is small, so all
/// of it is hashed, and no damaged byte reaches sled.
fn describe(folder: &Path) -> io::Result<String> {
    let mut lines = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(folder)
                    .unwrap_or(&path)
                    .display()
                    .to_string();
                lines.push(format!("{name} {}", Digest::of_file(&path)?));
            }
        }
    }
    lines.sort();
    Ok(lines.join("\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// One that has been left alone for a while: no program can set the time of the inode's change.
    fn old_file(dir: &Path, word: &str) -> PathBuf {
        let path = dir.join("file");
        std::fs::write(&path, long(word)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(3100));
        path
    }

    /// Enough of a word for the index to bother.
    fn long(word: &str) -> Vec<u8> {
        word.as_bytes().repeat(SMALL as usize)
    }

    fn digest(word: &str) -> Digest {
        Digest::of_bytes(&long(word))
    }

    #[test]
    fn a_small_file_is_hashed_without_sled() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().join("index.sled"));
        std::fs::write(&file, "one").unwrap();
        let index = Index::new(folder.clone());
        assert_eq!(index.file_digest(&file).unwrap(), Digest::of_bytes(b"one"));
        drop(index);
        assert!(!folder.exists());
    }

    #[test]
    fn a_digest_is_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let file = old_file(dir.path(), "one");
        let folder = dir.path().join("index.sled");
        let index = Index::new(folder.clone());
        assert_eq!(index.file_digest(&file).unwrap(), digest("one"));
        drop(index);
        let index = Index::new(folder);
        let key = stat_key(&file, &std::fs::metadata(&file).unwrap());
        assert_eq!(index.get(&key), Some(digest("one")));
        let file = old_file(dir.path(), "two");
        assert_eq!(index.file_digest(&file).unwrap(), digest("two"));
        assert!(index.take_warnings().is_empty());
    }

    #[test]
    fn what_is_no_folder_is_thrown_away_too() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("index.sled");
        std::fs::write(&folder, "no index").unwrap();
        let index = Index::new(folder.clone());
        index.discard().unwrap();
        assert!(!folder.exists());
        index.discard().unwrap();
    }

    #[test]
    fn damage_anywhere_never_reaches_sled() {
        let dir = tempfile::tempdir().unwrap();
        let file = old_file(dir.path(), "one");
        let folder = dir.path().join("index.sled");
        for trial in 0..12u8 {
            Index::new(folder.clone()).file_digest(&file).unwrap();
            let db = folder.join("db");
            let mut bytes = std::fs::read(&db).unwrap();
            if trial % 2 == 0 {
                bytes.truncate(bytes.len() * usize::from(trial) / 12);
            } else {
                let at = bytes.len() * usize::from(trial) / 12;
                bytes[at] ^= 0x55;
            }
            std::fs::write(&db, bytes).unwrap();
            let index = Index::new(folder.clone());
            assert_eq!(index.file_digest(&file).unwrap(), digest("one"));
            assert_eq!(index.take_warnings().len(), 1, "trial {trial}");
        }
    }
}
