//! [`Outbox`]: which results were made here and are not in the remote yet. One empty file a
//! result, so that a run that is killed, or finds no server, leaves the next one to send them.

use std::path::{Path, PathBuf};

use crate::action::ActionKey;
use crate::digest::Digest;
use crate::error::CacheError;
use crate::record::{folder, write_atomic};

/// In a file of a result that is to replace the one in the remote.
const REPLACE: &[u8] = b"replace\n";

#[derive(Debug)]
pub(super) struct Outbox {
    folder: PathBuf,
}

impl Outbox {
    /// That of one remote, below `remotes/` of the cache folder.
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.join("outbox"),
        }
    }

    pub(super) fn add(&self, key: &ActionKey, replace: bool) -> Result<(), CacheError> {
        let text = if replace { REPLACE } else { b"" };
        write_atomic(&self.folder.join(key.to_hex()), text)
    }

    pub(super) fn remove(&self, key: &ActionKey) {
        // One that stays is sent again, and found to be there.
        let _ = std::fs::remove_file(self.folder.join(key.to_hex()));
    }

    /// What waits, and whether it is to replace what is there.
    pub(super) fn waiting(&self) -> Vec<(ActionKey, bool)> {
        let files = folder(&self.folder).filter_map(|path| {
            let key = Digest::parse(path.file_name()?.to_str()?)?;
            Some((key, std::fs::read(&path).is_ok_and(|text| text == REPLACE)))
        });
        let mut waiting: Vec<_> = files.collect();
        waiting.sort();
        waiting
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_found_by_the_next_run() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = Outbox::new(dir.path());
        assert_eq!(outbox.waiting(), []);
        let (a, b) = (Digest::of_bytes(b"a"), Digest::of_bytes(b"b"));
        outbox.add(&a, false).unwrap();
        outbox.add(&b, true).unwrap();
        let mut both = vec![(a, false), (b, true)];
        both.sort();
        assert_eq!(Outbox::new(dir.path()).waiting(), both);
        outbox.remove(&a);
        assert_eq!(outbox.waiting(), [(b, true)]);
    }
}
