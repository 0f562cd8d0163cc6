//! [`Unsynced`]: files that were renamed into place and may not be on the disk yet.
//!
//! A kill loses nothing that the system has; only a power cut can. So small files
//! are synced in batches: some at a time, in a thread of its own so that nobody waits
//! for the disk, and all before a run ends. Until then a note says so. When a cache is opened that was left with the note and the machine
//! was started again since, what was written last is verified before it is used.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::error::CacheError;

/// Name of the note, which holds the id of the machine's start.
const NOTE: &str = "unsynced";
/// Longest time between two syncs while results come in.
const EVERY: Duration = Duration::from_secs(1);
/// From this many files on, the whole file system is synced instead of each.
const MANY: usize = 64;
/// How far the clocks of files may lie apart.
const SLACK: Duration = Duration::from_secs(5);

/// Files that may not be on the disk yet.
#[derive(Debug)]
pub(crate) struct Unsynced {
    folder: PathBuf,
    state: Mutex<State>,
    /// Held over a whole sync: who waits for it knows that all files before it are on the disk.
    syncing: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<PathBuf>,
    since: Option<Instant>,
    /// Bytes of all files so far.
    written: u64,
    /// A thread is syncing.
    busy: bool,
    /// Why files could not be synced, until somebody is told: the system says it only once.
    failed: Option<CacheError>,
    noted: bool,
    /// The note was there: files are meant that are not among these.
    inherited: bool,
}

impl Unsynced {
    pub(crate) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            state: Mutex::default(),
            syncing: Mutex::default(),
        }
    }

    /// The time from which on files were perhaps lost by a power cut.
    pub(crate) fn lost_since(&self) -> Option<SystemTime> {
        let note = self.folder.join(NOTE);
        let written = std::fs::metadata(&note).and_then(|m| m.modified()).ok()?;
        let now = boot_id();
        // Where the system does not say, it may be another start.
        let other = now.is_empty() || std::fs::read_to_string(&note).ok()? != now;
        other.then(|| written.checked_sub(SLACK).unwrap_or(written))
    }

    /// What may have been lost was verified.
    pub(crate) fn forget(&self) {
        // A note that stays costs one more verification.
        let _ = std::fs::remove_file(self.folder.join(NOTE));
    }

    /// A file of so many bytes was put into its place.
    pub(crate) fn add(&self, file: &Path, bytes: u64) {
        let mut state = self.lock();
        state.written += bytes;
        if !state.noted {
            let note = self.folder.join(NOTE);
            // An older one of this start of the machine covers more.
            if note.exists() {
                state.inherited = true;
            } else {
                // Where no note can be written, no object can.
                let _ = std::fs::write(note, boot_id());
            }
            state.noted = true;
        }
        state.since.get_or_insert_with(Instant::now);
        state.files.push(file.to_owned());
    }

    /// Bytes of all files that were put into their places.
    pub(crate) fn written(&self) -> u64 {
        self.lock().written
    }

    /// Lets a thread sync when the oldest file has waited long enough.
    ///
    /// # Errors
    /// When the disk refused the last time.
    pub(crate) fn sync_if_due(self: &Arc<Self>) -> Result<(), CacheError> {
        let mut state = self.lock();
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        if state.busy || state.since.is_none_or(|at| at.elapsed() <= EVERY) {
            return Ok(());
        }
        state.busy = true;
        drop(state);
        let this = Arc::clone(self);
        let thread = std::thread::Builder::new().name("sync".to_owned());
        let work = move || {
            this.sync_files();
            this.lock().busy = false;
        };
        if thread.spawn(work).is_err() {
            self.lock().busy = false;
            self.sync_files();
            return self.tell();
        }
        Ok(())
    }

    /// Syncs everything, and takes the note away.
    ///
    /// # Errors
    /// When the disk refuses, or refused a thread since the last call.
    pub(crate) fn sync(&self) -> Result<(), CacheError> {
        if self.lock().inherited {
            if !sync_all(&self.folder)? {
                // What another process left cannot be synced here: the note stays.
                self.sync_files();
                return self.tell();
            }
            self.lock().inherited = false;
        }
        self.sync_files();
        self.tell()?;
        let mut state = self.lock();
        if state.noted && state.files.is_empty() {
            self.forget();
            state.noted = false;
        }
        Ok(())
    }

    /// Syncs the files, after those of a thread that is at it. What fails is told by
    /// [`Unsynced::tell`].
    fn sync_files(&self) {
        let _turn = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let files = {
            let mut state = self.lock();
            state.since = None;
            std::mem::take(&mut state.files)
        };
        if let Err(error) = self.sync_each(&files) {
            let mut state = self.lock();
            // They are still to be synced.
            state.files.splice(..0, files);
            // Before the turn ends: who waits for it must find this.
            state.failed = Some(error);
        }
    }

    /// Why files could not be synced, once.
    fn tell(&self) -> Result<(), CacheError> {
        self.lock().failed.take().map_or(Ok(()), Err)
    }

    fn sync_each(&self, files: &[PathBuf]) -> Result<(), CacheError> {
        if files.len() >= MANY && sync_all(&self.folder)? {
            return Ok(());
        }
        for file in files {
            match File::open(file).and_then(|f| f.sync_all()) {
                // It was set aside meanwhile.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                synced => synced.map_err(|e| CacheError::io(file, e))?,
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Syncs the file system that holds `folder`; false where there is no such call.
#[cfg(target_os = "linux")]
fn sync_all(folder: &Path) -> Result<bool, CacheError> {
    let open = File::open(folder).map_err(|e| CacheError::io(folder, e))?;
    nix::unistd::syncfs(&open).map_err(|e| CacheError::io(folder, e.into()))?;
    Ok(true)
}

#[cfg(not(target_os = "linux"))]
fn sync_all(_: &Path) -> Result<bool, CacheError> {
    Ok(false)
}

/// Differs each time the machine starts; empty where the system does not say.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_note_stays_until_everything_is_synced() {
        let dir = tempfile::tempdir().unwrap();
        let unsynced = Arc::new(Unsynced::new(dir.path()));
        let note = dir.path().join(NOTE);
        for i in 0..MANY + 1 {
            let file = dir.path().join(i.to_string());
            std::fs::write(&file, "x").unwrap();
            unsynced.add(&file, 1);
        }
        assert_eq!(unsynced.written(), MANY as u64 + 1);
        unsynced.add(&dir.path().join("gone"), 0);
        unsynced.sync_if_due().unwrap();
        assert!(note.exists());
        assert_eq!(unsynced.lost_since(), None, "the machine is still up");
        unsynced.sync().unwrap();
        assert!(!note.exists());
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        unsynced.add(&folder.join("\0"), 0);
        assert!(unsynced.sync().is_err() && unsynced.sync().is_err());
        assert!(note.exists(), "what could not be synced is not forgotten");
        unsynced.lock().files.clear();
        unsynced.sync().unwrap();
        std::fs::write(&note, "another start").unwrap();
        assert!(
            unsynced
                .lost_since()
                .is_some_and(|at| at < SystemTime::now())
        );
    }

    #[test]
    fn a_thread_syncs_meanwhile_and_tells_why_it_could_not() {
        let dir = tempfile::tempdir().unwrap();
        let unsynced = Arc::new(Unsynced::new(dir.path()));
        let add = |name: &str| {
            unsynced.add(&dir.path().join(name), 0);
            unsynced.lock().since = Instant::now().checked_sub(2 * EVERY);
        };
        let wait = || {
            while unsynced.lock().busy {
                std::thread::yield_now();
            }
        };
        std::fs::write(dir.path().join("file"), "x").unwrap();
        add("file");
        unsynced.sync_if_due().unwrap();
        wait();
        assert!(unsynced.lock().files.is_empty());
        add("\0");
        unsynced.sync_if_due().unwrap();
        wait();
        assert!(unsynced.sync_if_due().is_err());
        assert_eq!(unsynced.lock().files.len(), 1, "it is still to be synced");
        unsynced.lock().files.clear();
        // The disk refuses once, and no more when it is asked again.
        std::fs::write(dir.path().join("plain"), "x").unwrap();
        add("plain/file");
        unsynced.sync_if_due().unwrap();
        wait();
        std::fs::remove_file(dir.path().join("plain")).unwrap();
        assert!(unsynced.sync().is_err(), "what the thread met is told");
        assert!(dir.path().join(NOTE).exists());
        unsynced.sync().unwrap();
        assert!(!dir.path().join(NOTE).exists());
    }
}
