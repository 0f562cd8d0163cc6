//! [`Turn`]: which of several servers goes on with what is in a folder. A `flock`, which the system
//! releases when its holder ends.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure};

/// Whose turn it is to go on with what is in a folder: one process's, until it ends.
#[derive(Debug)]
pub(super) struct Turn {
    path: PathBuf,
    file: File,
}

impl Turn {
    /// That of a folder.
    ///
    /// # Errors
    /// When its lock cannot be opened.
    pub(super) fn of(folder: &Path) -> Result<Self, Failure> {
        let path = folder.join("lock");
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path);
        let file = file.map_err(|e| unlocked(&path, &e))?;
        Ok(Self { path, file })
    }

    /// The lock's file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes it, unless another server has it.
    ///
    /// # Errors
    /// When the folder cannot be locked.
    pub(super) fn take(&self) -> Result<bool, Failure> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(e)) => Err(unlocked(&self.path, &e)),
        }
    }

    /// Waits until no other server has it.
    ///
    /// # Errors
    /// When the folder cannot be locked.
    pub(super) fn wait(&self) -> Result<(), Failure> {
        let taken = self.file.lock();
        taken.map_err(|e| unlocked(&self.path, &e))
    }

    /// Leaves it to others.
    pub(super) fn give_back(&self) {
        if let Err(error) = self.file.unlock() {
            tracing::warn!("{}: {error}", self.path.display());
        }
    }
}

fn unlocked(path: &Path, error: &std::io::Error) -> Failure {
    let text = format!(
        "{}: {error}; the folder must be on a file system with locks (`flock`)",
        path.display()
    );
    Failure::new(Exit::Internal, text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_turn_until_it_gives_it_back_or_ends() {
        let dir = tempfile::tempdir().unwrap();
        let turn = || Turn::of(dir.path()).unwrap();
        let (first, second) = (turn(), turn());
        assert!(first.take().unwrap());
        assert!(!second.take().unwrap());
        first.give_back();
        assert!(second.take().unwrap());
        assert!(!first.take().unwrap());
        drop(second);
        first.wait().unwrap();
    }
}
