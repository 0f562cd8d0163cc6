//! [`Unsynced`]: files that were renamed into place and may not be on the disk yet.
//!
//! A kill loses nothing that the system has; only a power cut can. So small files
//! are synced in batches: some at a time, and all before a run ends. Until then a
//! note says so. When a cache is opened that was left with the note and the machine
//! was started again since, what was written last is verified before it is used.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::error::CacheError;

/// Name of the note, which holds the id of the machine's start.
const NOTE: &str = "unsynced";
/// Longest time between two syncs while results come in.
const EVERY: Duration = Duration::from_millis(250);
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

    /// A file was put into its place.
    pub(crate) fn add(&self, file: &Path) {
        let mut state = self.lock();
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

    /// Syncs when the oldest file has waited long enough.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn sync_if_due(&self) -> Result<(), CacheError> {
        if self.lock().since.is_some_and(|at| at.elapsed() > EVERY) {
            self.sync_files()?;
        }
        Ok(())
    }

    /// Syncs everything, and takes the note away.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn sync(&self) -> Result<(), CacheError> {
        if self.lock().inherited {
            if !sync_all(&self.folder)? {
                // What another process left cannot be synced here: the note stays.
                return self.sync_files();
            }
            self.lock().inherited = false;
        }
        self.sync_files()?;
        let mut state = self.lock();
        if state.noted && state.files.is_empty() {
            self.forget();
            state.noted = false;
        }
        Ok(())
    }

    fn sync_files(&self) -> Result<(), CacheError> {
        let _turn = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let files = {
            let mut state = self.lock();
            state.since = None;
            std::mem::take(&mut state.files)
        };
        let synced = self.sync_each(&files);
        if synced.is_err() {
            // They are still to be synced.
            self.lock().files.splice(..0, files);
        }
        synced
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
        let unsynced = Unsynced::new(dir.path());
        let note = dir.path().join(NOTE);
        for i in 0..MANY + 1 {
            let file = dir.path().join(i.to_string());
            std::fs::write(&file, "x").unwrap();
            unsynced.add(&file);
        }
        unsynced.add(&dir.path().join("gone"));
        unsynced.sync_if_due().unwrap();
        assert!(note.exists());
        assert_eq!(unsynced.lost_since(), None, "the machine is still up");
        unsynced.sync().unwrap();
        assert!(!note.exists());
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        unsynced.add(&folder.join("\0"));
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
}
