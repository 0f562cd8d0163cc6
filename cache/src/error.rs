//! [`CacheError`]: why the cache could not do something.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// Why the cache could not do something.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// An input or output error.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No room is left.
    #[error("{}: no space left on the disk; the cache is intact, free some space and run again", path.display())]
    Full {
        /// Where.
        path: PathBuf,
    },
    /// The folder cannot be written.
    #[error("{}: the cache cannot be written; choose another with `--cache-dir`", path.display())]
    ReadOnly {
        /// Where.
        path: PathBuf,
    },
    /// No such object.
    #[error("object {digest} is not in the cache")]
    Missing {
        /// Which.
        digest: Digest,
    },
    /// The object's bytes do not have its digest. It was set aside.
    #[error("object {digest} is damaged; it was moved to {}", path.display())]
    Damaged {
        /// Which.
        digest: Digest,
        /// Where it lies now.
        path: PathBuf,
    },
    /// Another run holds the cache.
    #[error("the cache is in use by {holder}")]
    Locked {
        /// Who.
        holder: String,
    },
    /// The folder's file system has no locks.
    #[error("{}: the cache cannot be locked ({source}): its file system has no locks; choose a folder of this machine with `--cache-dir`", path.display())]
    Unlockable {
        /// The lock.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A path that cannot be stored (not Unicode, or neither file nor folder).
    #[error("{}: {reason}", path.display())]
    Unstorable {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
}

impl CacheError {
    /// An input or output error on a path that is not the cache's.
    #[must_use]
    pub fn outside(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        Self::Io { path, source }
    }

    /// An input or output error on `path`, with the full disk and the read-only folder told apart.
    #[must_use]
    pub fn io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path },
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                Self::ReadOnly { path }
            }
            _ => Self::Io { path, source },
        }
    }
}
