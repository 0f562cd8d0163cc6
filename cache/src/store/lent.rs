//! [`Lent`]: whether objects were left as they were by whoever had them.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use super::ArtifactStore;
use crate::digest::Digest;
use crate::error::CacheError;

/// What a write to an object changes, and another link to it does not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    size: u64,
    mtime: (i64, i64),
}

impl Stamp {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            inode: meta.ino(),
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

/// Objects that were lent to somebody as hard links, which root can write through.
#[derive(Debug)]
pub struct Lent {
    pub(super) stamps: Vec<(Digest, Stamp)>,
}

impl Lent {
    /// Verifies what was written to meanwhile.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] or [`CacheError::Missing`].
    pub fn check(&self, store: &ArtifactStore) -> Result<(), CacheError> {
        for (digest, stamp) in &self.stamps {
            let now = store.stamp(digest)?;
            if now.inode != stamp.inode {
                // What was lent was set aside meanwhile, and made anew.
                return Err(CacheError::Missing { digest: *digest });
            }
            if now != *stamp {
                store.verify_object(digest)?;
            }
        }
        Ok(())
    }
}
