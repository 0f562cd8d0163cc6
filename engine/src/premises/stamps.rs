//! [`Stamps`]: what files of the project hold, as far as a remembered run tells it without their being
//! read: for a plan, which holds no cache and so no stat cache either.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::{Path, PathBuf};

use flowrun_cache::{Digest, FileStamp};

use super::{Remembered, RunName};

/// The digests of files that a run with nothing to do hashed and found settled; other runs leave none.
#[derive(Debug, Default)]
pub(crate) struct Stamps(BTreeMap<PathBuf, (FileStamp, Digest)>);

impl Stamps {
    /// Those of the run of this name; none when none is remembered.
    pub(crate) fn of(cache_dir: &Path, name: RunName) -> Self {
        let bytes = std::fs::read(cache_dir.join(name.path())).ok();
        let Some(remembered) = bytes.and_then(|bytes| Remembered::parse(name, bytes)) else {
            return Self::default();
        };
        let head = remembered.head;
        let root = head.root;
        let files = head.files.into_iter().filter_map(|file| {
            let digest = file.held.file_digest()?;
            Some((root.join(&file.path), (file.stamp?, digest)))
        });
        Self(files.collect())
    }

    /// Digest of the file at `path`, while it has the stamp that it was hashed with.
    pub(crate) fn digest(&self, path: &Path, meta: &Metadata) -> Option<Digest> {
        let (stamp, digest) = self.0.get(path)?;
        (*stamp == FileStamp::of(meta)).then_some(*digest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_cache::{Artifact, Cache, CacheReader, OpenOptions};

    use super::super::{FilePremise, Held, Premises, VERSION, write};
    use super::*;
    use crate::lookup::Lookup;
    use crate::step::World;
    use crate::tracking::Tracking;

    #[test]
    fn a_file_is_not_read_while_it_is_as_the_last_run_left_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let path = dir.path().join("r/f");
        std::fs::create_dir(dir.path().join("r")).unwrap();
        std::fs::write(&path, "abc").unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        // Not that of its bytes: then this is where it comes from.
        let digest = Digest::of_bytes(b"remembered");
        let file = |name: &str, stamp| FilePremise {
            path: PathBuf::from(name),
            held: Held::at_least(Artifact::of_file(digest, &meta)),
            stamp,
            steps: Vec::new(),
        };
        let head = Premises {
            version: VERSION,
            pipeline: "p".to_owned(),
            steps: 0,
            cached: 0,
            skipped: 0,
            root: dir.path().to_owned(),
            sources: Vec::new(),
            secrets: Vec::new(),
            hooks: BTreeMap::new(),
            tracking: Tracking::default(),
            environment: Digest::of_bytes(b""),
            files: vec![
                file("./r/f", Some(FileStamp::of(&meta))),
                file("r/unsettled", None),
            ],
            absent: Vec::new(),
            observed: Vec::new(),
            report: None,
            graph: Digest::of_bytes(b""),
            keys: 0,
            objects: 0,
            plan: 0,
            events: 0,
        };
        let name = RunName(Digest::of_bytes(b"name"));
        assert!(Stamps::of(&cache, name).0.is_empty());
        let held = Cache::open(&cache, &OpenOptions::no_wait("test")).unwrap();
        write(&held, name, &head, &[]);
        let stamps = Stamps::of(&cache, name);
        assert_eq!(stamps.digest(&path, &meta), Some(digest));
        assert_eq!(stamps.digest(&dir.path().join("r/unsettled"), &meta), None);
        // What is looked up for a plan goes by them.
        let reader = CacheReader::open(&cache);
        let lookup = Lookup::reading(dir.path(), World::default(), &reader, None, stamps);
        assert!(
            lookup.is_at(&Artifact::of_file(digest, &meta), &path),
            "read"
        );
        let stamps = Stamps::of(&cache, name);
        std::fs::write(&path, "abcd").unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(stamps.digest(&path, &meta), None);
    }
}
