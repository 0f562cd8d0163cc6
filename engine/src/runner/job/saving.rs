//! [`Saving`]: when what a step saved for its next attempt is worth sending to a remote store: a
//! little at once, because it may say what was paid for; much from time to time. [`Stored`]: what
//! it takes of the store here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::{Artifact, ArtifactStore, CacheError, Digest};

/// Bytes that are sent whenever they changed.
const LITTLE: u64 = 1 << 20;
/// How often more is sent.
const EVERY: Duration = Duration::from_secs(60);

/// A file: where, how long, when written.
type Seen = (PathBuf, u64, SystemTime);

/// What was sent of a folder.
pub(super) struct Saving {
    folder: PathBuf,
    sent: Vec<Seen>,
    at: Option<Instant>,
}

impl Saving {
    pub(super) fn new(folder: PathBuf) -> Self {
        // What is there at the beginning came from the store.
        let sent = seen(&folder);
        Self {
            folder,
            sent,
            at: None,
        }
    }

    /// Has the folder sent if that is due; when it was, the same is not sent again.
    pub(super) fn pass(&mut self, send: impl FnOnce(&Path) -> bool) {
        let now = seen(&self.folder);
        let bytes: u64 = now.iter().map(|(_, length, _)| length).sum();
        let soon = self.at.is_some_and(|at| at.elapsed() < EVERY);
        if now.is_empty() || now == self.sent || (bytes > LITTLE && soon) {
            return;
        }
        self.at = Some(Instant::now());
        if send(&self.folder) {
            self.sent = now;
        }
    }
}

/// What was saved, in the store of a worker, which nobody else uses: of each time only the last
/// stays.
pub(super) struct Stored {
    store: ArtifactStore,
    /// Objects that are there for something else.
    others: BTreeSet<Digest>,
    last: BTreeSet<Digest>,
}

impl Stored {
    /// Nothing yet; the objects of `others` are not removed.
    pub(super) fn new<'a>(
        store: &ArtifactStore,
        others: impl IntoIterator<Item = &'a Artifact>,
    ) -> Self {
        let others = others.into_iter();
        let others = others.flat_map(|artifact| store.parts(artifact).unwrap_or_default());
        Self {
            store: store.clone(),
            others: others.collect(),
            last: BTreeSet::new(),
        }
    }

    pub(super) fn store(&self) -> &ArtifactStore {
        &self.store
    }

    /// Stores the folder, in place of what was stored before; `None` when it was written to
    /// meanwhile: its files may be of two moments, which do not go together.
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub(super) fn put(&mut self, folder: &Path) -> Result<Option<Artifact>, CacheError> {
        let before = seen(folder);
        let artifact = self.store.put_path(folder)?;
        let parts: BTreeSet<Digest> = self.store.parts(&artifact)?.into_iter().collect();
        for old in self.last.difference(&parts) {
            if !self.others.contains(old) {
                // What stays takes room, and goes with the store.
                let _ = self.store.remove(old);
            }
        }
        self.last = parts;
        Ok((seen(folder) == before).then_some(artifact))
    }
}

/// The files below a folder; those that cannot be seen are left out.
fn seen(folder: &Path) -> Vec<Seen> {
    let mut all = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else {
                continue;
            };
            if meta.is_dir() {
                left.push(entry.path());
            } else if let Ok(written) = meta.modified() {
                all.push((entry.path(), meta.len(), written));
            }
        }
    }
    all.sort();
    all
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_cache::{Cache, OpenOptions};

    use super::*;

    #[test]
    fn of_what_was_saved_only_the_last_is_stored_and_nothing_else_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), &OpenOptions::no_wait("test")).unwrap();
        let store = cache.store();
        let input = store.put_bytes(b"input").unwrap();
        let mut stored = Stored::new(store, [&input]);
        let folder = dir.path().join("saved");
        std::fs::create_dir(&folder).unwrap();
        let mut put = |state: &str| {
            std::fs::write(folder.join("same"), "same").unwrap();
            std::fs::write(folder.join("state"), state).unwrap();
            stored.put(&folder).unwrap().unwrap()
        };
        let first = put("input");
        let second = put("second");
        let third = put("third");
        store.verify(&input).unwrap();
        store.verify(&third).unwrap();
        assert!(!store.contains(&first) && !store.contains(&second));
        let gone = Digest::of_bytes(b"second");
        assert!(!store.object_path(&gone).exists());
    }

    #[test]
    fn a_little_is_sent_whenever_it_changed_and_much_from_time_to_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("saved");
        let mut saving = Saving::new(folder.clone());
        let sends = |saving: &mut Saving, takes: bool| {
            let mut sent = false;
            saving.pass(|_| {
                sent = true;
                takes
            });
            sent
        };
        assert!(!sends(&mut saving, true), "nothing is there");
        std::fs::create_dir_all(folder.join("deep")).unwrap();
        std::fs::write(folder.join("deep/state"), "a").unwrap();
        assert!(sends(&mut saving, false), "the store did not take it");
        assert!(sends(&mut saving, true));
        assert!(!sends(&mut saving, true), "it is there");
        std::fs::write(folder.join("deep/state"), "ab").unwrap();
        assert!(sends(&mut saving, true));
        std::fs::write(folder.join("weights"), vec![0; 2 << 20]).unwrap();
        assert!(!sends(&mut saving, true), "it was sent just now");
        assert!(!sends(&mut Saving::new(folder), true), "it came from there");
    }
}
