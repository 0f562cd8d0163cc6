//! [`Cache`]: one folder with objects, actions, completions, runs and the index,
//! held by one process; and [`CacheReader`], which needs no lock and no sled.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::action::{ActionCache, ActionKey};
use crate::completion::CompletionCache;
use crate::durability::Unsynced;
use crate::error::CacheError;
use crate::filesystem::FileSystem;
use crate::index::Index;
use crate::lock::{Lock, LockWait, lock};
use crate::store::ArtifactStore;

/// As the Cache Directory Tagging Specification (bford.info/cachedir) asks.
const TAG: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache made by flowrun.\n";

/// Hears who holds the cache before a wait.
pub type OnWait<'a> = &'a dyn Fn(&str);

/// How to open a cache.
pub struct OpenOptions<'a> {
    /// What to do when another process holds it.
    pub wait: LockWait,
    /// This process's command line, for the other's message.
    pub command: String,
    /// Hears who holds the cache before a wait.
    pub on_wait: Option<OnWait<'a>>,
}

impl OpenOptions<'_> {
    /// Fails when another process holds it. `command` is for the other's message.
    #[must_use]
    pub fn no_wait(command: impl Into<String>) -> Self {
        Self {
            wait: LockWait::NoWait,
            command: command.into(),
            on_wait: None,
        }
    }
}

/// A cache folder, held by this process.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    store: ArtifactStore,
    actions: ActionCache,
    completions: Arc<CompletionCache>,
    index: Index,
    warnings: Arc<Mutex<Vec<String>>>,
    unsynced: Arc<Unsynced>,
    scratches: Scratches,
    is_new: bool,
    _lock: Lock,
}

impl Cache {
    /// Opens a cache folder, making it if it is not there.
    ///
    /// # Errors
    /// [`CacheError::Locked`] when another process holds it and waiting is not
    /// wanted; else when the folder cannot be read or written.
    pub fn open(dir: &Path, options: &OpenOptions<'_>) -> Result<Self, CacheError> {
        std::fs::create_dir_all(dir).map_err(|e| CacheError::io(dir, e))?;
        let held = lock(
            &dir.join("lock"),
            options.wait,
            &options.command,
            options.on_wait,
        )?;
        let tag = dir.join("CACHEDIR.TAG");
        let held_before = |name: &str| dir.join(name).exists();
        let is_new = !["CACHEDIR.TAG", "objects", "actions"]
            .into_iter()
            .any(held_before);
        if !tag.exists() {
            std::fs::write(&tag, TAG).map_err(|e| CacheError::io(&tag, e))?;
        }
        remove_leftovers(&dir.join("tmp"));
        let warnings = Arc::new(Mutex::default());
        let completions = Arc::new(CompletionCache::open(dir.join("completions"))?);
        let unsynced = Arc::new(Unsynced::new(dir));
        let batch = || Some(Arc::clone(&unsynced));
        let cache = Self {
            store: ArtifactStore::new(dir.join("objects"), batch()),
            actions: ActionCache::new(dir.join("actions"), Arc::clone(&warnings), batch()),
            unsynced: Arc::clone(&unsynced),
            completions,
            index: Index::new(dir.join("index.sled")),
            scratches: Scratches(dir.join("tmp").join(unique())),
            dir: dir.to_owned(),
            is_new,
            warnings,
            _lock: held,
        };
        if let Some(danger) = FileSystem::of(dir).and_then(|found| found.danger()) {
            cache.warn(danger);
        }
        if let Some(since) = cache.unsynced.lost_since() {
            let damaged = cache.store.verify_since(since);
            cache.warn(format!(
                "the machine stopped before everything was on the disk; {damaged} damaged objects were set aside"
            ));
            cache.unsynced.forget();
        }
        Ok(cache)
    }

    /// It was made when it was opened: nothing is in it but what was stored since.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Bytes of the objects and results that were stored since the cache was opened.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.unsynced.written()
    }

    /// Brings what was stored some time ago to the disk, in a thread: called as results come in.
    ///
    /// # Errors
    /// When the disk refused the last time.
    pub fn sync_if_due(&self) -> Result<(), CacheError> {
        self.unsynced.sync_if_due()
    }

    /// Brings everything that was stored to the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<(), CacheError> {
        self.completions.sync()?;
        self.unsynced.sync()
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// Files and folders by digest.
    #[must_use]
    pub fn store(&self) -> &ArtifactStore {
        &self.store
    }
    /// Results by action key.
    #[must_use]
    pub fn actions(&self) -> &ActionCache {
        &self.actions
    }
    /// Language-model answers.
    #[must_use]
    pub fn completions(&self) -> Arc<CompletionCache> {
        Arc::clone(&self.completions)
    }
    /// The stat cache.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// What went wrong and was mended since the last call.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut all =
            std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner));
        all.extend(self.index.take_warnings());
        match self.completions.take_skipped() {
            0 => {}
            n => all.push(format!(
                "{n} damaged lines of the completion cache were skipped"
            )),
        }
        all
    }

    fn warn(&self, text: String) {
        self.warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text);
    }

    /// Writes a small file of the caller's into the cache's folder: readers see the old one or the new one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
        crate::record::write_atomic(&self.dir.join(path), bytes)
    }

    /// As [`Cache::write_file`], of bytes that lie in several pieces.
    ///
    /// # Errors
    /// As [`Cache::write_file`].
    pub fn write_parts(&self, path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
        crate::record::write_parts(&self.dir.join(path), parts)
    }

    /// Makes the folder of a run.
    ///
    /// # Errors
    /// When it cannot be made, or is there already: two runs never share one.
    pub fn new_run_dir(&self, run_id: &str) -> Result<PathBuf, CacheError> {
        let runs = self.dir.join("runs");
        std::fs::create_dir_all(&runs).map_err(|e| CacheError::io(&runs, e))?;
        let path = runs.join(run_id);
        std::fs::create_dir(&path).map_err(|e| CacheError::io(&path, e))?;
        let logs = path.join("logs");
        std::fs::create_dir(&logs).map_err(|e| {
            // Half a folder is no run.
            let _ = std::fs::remove_dir(&path);
            CacheError::io(&logs, e)
        })?;
        Ok(path)
    }

    /// Where an action may keep what its next attempt can go on from. Nothing is made here.
    #[must_use]
    pub fn partial_path(&self, key: &ActionKey) -> PathBuf {
        self.dir.join("partial").join(key.to_hex())
    }

    /// Where an action that is a job elsewhere is done. Nothing is made here.
    #[must_use]
    pub fn job_path(&self, key: &ActionKey) -> PathBuf {
        self.dir.join("jobs").join(key.to_hex())
    }

    /// A scratch folder on the cache's own file system, removed when dropped;
    /// one that a killed process left is removed when the cache is opened.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&self) -> Result<Scratch, CacheError> {
        let folder = &self.scratches.0;
        tempfile::tempdir_in(folder)
            .or_else(|_| {
                std::fs::create_dir_all(folder)?;
                tempfile::tempdir_in(folder)
            })
            .map(Scratch)
            .map_err(|e| CacheError::io(folder, e))
    }
}

/// Where this process's scratch folders lie: what watches over a killed process's folders never
/// meets those of the next one.
#[derive(Debug)]
struct Scratches(PathBuf);

impl Drop for Scratches {
    fn drop(&mut self) {
        // Empty, or never made; what is left is removed when the cache is opened again.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A name that no other opening of the cache had: process ids come again.
fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = now.unwrap_or_default().as_nanos();
    format!("{}-{nanos}", std::process::id())
}

/// A folder that is removed when dropped.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// Where.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

fn remove_leftovers(folder: &Path) {
    // Only the holder of the lock gets here, so nobody uses them.
    let _ = std::fs::remove_dir_all(folder);
}

/// A cache folder as a reader sees it: no lock, no sled, also while a run holds it.
#[derive(Debug)]
pub struct CacheReader {
    dir: PathBuf,
    store: ArtifactStore,
    actions: ActionCache,
}

impl CacheReader {
    /// Opens a folder, which need not exist: then it is empty.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        Self {
            store: ArtifactStore::new(dir.join("objects"), None),
            actions: ActionCache::new(dir.join("actions"), Arc::default(), None),
            dir: dir.to_owned(),
        }
    }
    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// Files and folders by digest.
    #[must_use]
    pub fn store(&self) -> &ArtifactStore {
        &self.store
    }
    /// Results by action key.
    #[must_use]
    pub fn actions(&self) -> &ActionCache {
        &self.actions
    }
    /// The answers that are kept; none where they cannot be read.
    #[must_use]
    pub fn completions(&self) -> Arc<CompletionCache> {
        let folder = self.dir.join("completions");
        Arc::new(CompletionCache::open(folder).unwrap_or_else(|_| CompletionCache::in_memory()))
    }
    /// Folders of the runs, newest first (run ids sort by time).
    #[must_use]
    pub fn runs(&self) -> Vec<PathBuf> {
        let mut runs: Vec<PathBuf> = std::fs::read_dir(self.dir.join("runs"))
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        runs.sort_by(|a, b| b.cmp(a));
        runs
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn options() -> OpenOptions<'static> {
        OpenOptions::no_wait("test")
    }

    #[test]
    fn one_process_holds_it_and_readers_read_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), &options()).unwrap();
        assert!(matches!(
            Cache::open(dir.path(), &options()),
            Err(CacheError::Locked { .. })
        ));
        let artifact = cache.store().put_bytes(b"x").unwrap();
        cache.new_run_dir("20260101-000000-aaaa").unwrap();
        let reader = CacheReader::open(dir.path());
        assert!(reader.store().contains(&artifact));
        assert_eq!(reader.runs().len(), 1);
        assert!(dir.path().join("CACHEDIR.TAG").exists());
        drop(cache);
        Cache::open(dir.path(), &options()).unwrap();
    }

    #[test]
    fn scratch_left_by_a_killed_process_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), &options()).unwrap();
        let kept = cache.scratch().unwrap();
        assert!(kept.path().is_dir());
        std::mem::forget(kept);
        drop(cache);
        Cache::open(dir.path(), &options()).unwrap();
        assert!(!dir.path().join("tmp").exists());
    }

    #[test]
    fn what_was_written_before_the_machine_stopped_is_verified_when_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("unsynced");
        let stopped = |cache: &Cache| -> Vec<String> {
            let warnings = cache.warnings().into_iter();
            warnings.filter(|w| w.contains("machine")).collect()
        };
        let cache = Cache::open(dir.path(), &options()).unwrap();
        let [whole, torn] = ["whole", "torn"].map(|text| {
            let stored = cache.store().put_bytes(text.as_bytes());
            stored.unwrap()
        });
        assert!(note.exists(), "nothing was synced yet");
        drop(cache);
        // The length got to the disk, the bytes did not.
        let object = CacheReader::open(dir.path())
            .store()
            .object_path(&torn.digest);
        std::fs::remove_file(&object).unwrap();
        std::fs::write(&object, [0; 4]).unwrap();
        let cache = Cache::open(dir.path(), &options()).unwrap();
        assert!(stopped(&cache).is_empty(), "the machine is still up");
        assert!(cache.store().contains(&torn), "nobody has read it");
        drop(cache);
        std::fs::write(&note, "another start").unwrap();
        let cache = Cache::open(dir.path(), &options()).unwrap();
        let told = stopped(&cache);
        assert!(
            told.len() == 1 && told[0].contains("; 1 damaged objects were set aside"),
            "{told:?}"
        );
        assert!(!cache.store().contains(&torn) && cache.store().contains(&whole));
        assert!(!note.exists(), "it is looked at once");
        drop(cache);
        let cache = Cache::open(dir.path(), &options()).unwrap();
        assert!(stopped(&cache).is_empty());
    }
}
