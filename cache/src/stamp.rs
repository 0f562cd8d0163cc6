//! [`FileStamp`]: what the system says of a file that a change of its bytes changes too.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A file changed this recently may change again within the clock's grain.
const RACY: Duration = Duration::from_secs(2);

/// Size, times and number of a file. No program can set the time of the last change
/// of the inode, so equal stamps mean equal bytes, once the file is [settled](FileStamp::is_settled).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Bytes.
    pub size: u64,
    /// Time of the last write: seconds, nanoseconds.
    pub mtime: (i64, i64),
    /// Time of the last change of the inode.
    pub ctime: (i64, i64),
    /// Number of the inode.
    pub inode: u64,
}

impl FileStamp {
    /// The stamp of a file.
    #[must_use]
    pub fn of(meta: &Metadata) -> Self {
        Self {
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
            inode: meta.ino(),
        }
    }

    /// The file was left alone for so long that a change from now on shows in its times.
    #[must_use]
    pub fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let old = |(seconds, _): (i64, i64)| {
            u64::try_from(seconds).is_ok_and(|at| at + RACY.as_secs() < now.as_secs())
        };
        old(self.mtime) && old(self.ctime)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_young_file_and_one_from_the_future_are_not_settled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let stamp = FileStamp::of(&std::fs::metadata(&path).unwrap());
        let now = SystemTime::now();
        assert!(!stamp.is_settled(now));
        assert!(stamp.is_settled(now + Duration::from_secs(4)));
        assert!(!stamp.is_settled(now - Duration::from_secs(3600)));
    }
}
