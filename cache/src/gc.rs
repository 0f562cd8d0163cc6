//! [`Garbage`]: what may be removed from a cache, and its removal.
//!
//! Results go least recently used first, with the objects that no other result holds, until
//! the bounds are met. Who needs what is the caller's knowledge ([`Uses`]): what it calls
//! needed stays whatever the bounds say. Objects that no result holds always go: they are
//! what killed or failed runs left. Own completions are never removed: they were paid for. Those
//! of other machines go before any result: they can be had again. So does what was damaged and set
//! aside. What was never written to its end goes as soon as nobody can be writing it.
//!
//! A result goes before its objects, so a collection that is killed leaves no result without
//! them, only objects for the next one.

mod search;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use self::search::Search;
use crate::action::ActionKey;
use crate::cache::{Cache, CacheReader};
use crate::digest::Digest;
use crate::error::CacheError;
use crate::removal::{Removal, Remover};

/// How large and how old a cache may grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of the whole folder.
    pub max_size: Option<u64>,
    /// Time since the last use.
    pub max_age: Option<Duration>,
}

/// Who uses what.
#[derive(Clone, Debug, Default)]
pub struct Uses {
    /// Results that must stay.
    pub needed: HashSet<ActionKey>,
    /// When a result was last used; for one that is not here, the time when it was stored counts.
    pub last: HashMap<ActionKey, SystemTime>,
    /// Folders of runs that may go, with the time of the run.
    pub spare_runs: Vec<(PathBuf, SystemTime)>,
}

/// What may be removed.
#[derive(Clone, Debug, Default)]
pub struct Garbage {
    results: Vec<ActionKey>,
    objects: Vec<Digest>,
    runs: Vec<PathBuf>,
    partial: Vec<PathBuf>,
    leftovers: Vec<PathBuf>,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Bytes of the cache that stay.
    pub left: u64,
}

impl Garbage {
    /// Finds what may be removed, without removing it. What it finds is certain only while the
    /// cache is held: a run may be writing.
    #[must_use]
    pub fn find(cache: &CacheReader, uses: &Uses, bounds: Bounds, now: SystemTime) -> Self {
        Search::new(cache, bounds, now).run(uses)
    }

    /// Number of results.
    #[must_use]
    pub fn results(&self) -> usize {
        self.results.len()
    }

    /// Number of objects.
    #[must_use]
    pub fn objects(&self) -> usize {
        self.objects.len()
    }

    /// Number of runs' records.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// There is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.results.is_empty()
            && self.objects.is_empty()
            && self.runs.is_empty()
            && self.partial.is_empty()
            && self.leftovers.is_empty()
    }

    /// Removes it, and remembers who did. The cache is held, so no run needs what
    /// [`Garbage::find`] found meanwhile. `stop` is asked before each file; what is left then is
    /// there for the next collection.
    ///
    /// # Errors
    /// When something cannot be removed; what was removed until then was garbage.
    pub fn remove(
        &self,
        cache: &Cache,
        by: Remover,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), CacheError> {
        Removal::note(cache, by, &self.results);
        let results = self.results.iter().map(|key| cache.actions().path(key));
        let objects = self.objects.iter();
        let objects = objects.map(|digest| cache.store().object_path(digest));
        let leftovers = self.leftovers.iter().cloned();
        for path in results.chain(objects).chain(leftovers) {
            if stop() {
                return Ok(());
            }
            remove_file(&path)?;
        }
        for folder in self.runs.iter().chain(&self.partial) {
            if stop() {
                return Ok(());
            }
            std::fs::remove_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        }
        Ok(())
    }
}

fn remove_file(path: &Path) -> Result<(), CacheError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CacheError::io(path, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::OpenOptions;
    use crate::action::{ACTION_VERSION, ActionResult, OutputRecord, OutputValue};
    use crate::artifact::Artifact;
    use crate::survey::{Share, Survey};

    const EVERYTHING: Bounds = Bounds {
        max_size: None,
        max_age: Some(Duration::ZERO),
    };

    fn open(dir: &Path) -> Cache {
        Cache::open(dir, &OpenOptions::no_wait("test")).unwrap()
    }

    fn put(cache: &Cache, name: &str, outputs: &[&Artifact]) -> ActionKey {
        let key = Digest::of_bytes(name.as_bytes());
        let output = |artifact: &Artifact| OutputRecord {
            ty: "file".into(),
            value: OutputValue::One(artifact.clone()),
        };
        let outputs = outputs.iter().enumerate();
        let outputs: BTreeMap<String, OutputRecord> =
            outputs.map(|(i, a)| (format!("o{i}"), output(a))).collect();
        cache
            .actions()
            .put(&ActionResult {
                version: ACTION_VERSION,
                key,
                manifest: serde_json::json!({ "inputs": {} }),
                outputs,
                metrics: BTreeMap::new(),
                took_ms: 1,
                finished_at: String::new(),
                label: name.into(),
            })
            .unwrap();
        key
    }

    fn collect(cache: &Cache, uses: &Uses, bounds: Bounds) -> Garbage {
        let reader = CacheReader::open(cache.dir());
        let found = Garbage::find(&reader, uses, bounds, SystemTime::now());
        found.remove(cache, Remover::Collection, &|| false).unwrap();
        found
    }

    #[test]
    fn what_is_needed_stays_and_shared_objects_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("member"), "member").unwrap();
        let tree = cache.store().put_path(&source).unwrap();
        let shared = cache.store().put_bytes(b"shared").unwrap();
        let old = cache.store().put_bytes(b"old").unwrap();
        let orphan = cache.store().put_bytes(b"orphan").unwrap();
        let needed = put(&cache, "needed", &[&tree, &shared]);
        let spare = put(&cache, "spare", &[&shared, &old]);
        std::fs::write(dir.path().join("objects").join(".tmp1"), "torn").unwrap();
        let uses = Uses {
            needed: HashSet::from([needed]),
            ..Uses::default()
        };
        let found = collect(&cache, &uses, EVERYTHING);
        assert_eq!((found.results(), found.objects()), (1, 2));
        assert!(cache.actions().get(&spare).is_none());
        assert!(cache.actions().get(&needed).is_some());
        for kept in [&tree, &shared] {
            cache.store().verify(kept).unwrap();
        }
        for gone in [&old, &orphan] {
            assert!(!cache.store().contains(gone));
        }
        assert!(!dir.path().join("objects/.tmp1").exists());
        let note = Share::of(&dir.path().join("removed.jsonl")).bytes;
        assert!(note > 0);
        assert_eq!(found.left + note, Survey::of(dir.path()).total().bytes);
        assert!(collect(&cache, &uses, EVERYTHING).is_empty());
    }

    #[test]
    fn what_was_never_finished_goes_when_it_is_old_and_what_was_set_aside_by_the_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let kept = put(&cache, "kept", &[]);
        let record = cache.actions().path(&kept);
        // Its writer was killed just before it was renamed; one that is being written; a damaged one.
        let copies = [".tmp1", ".tmp2", "x.bad"].map(|name| record.with_file_name(name));
        for copy in &copies {
            std::fs::copy(&record, copy).unwrap();
        }
        let torn = std::fs::File::options().append(true).open(&copies[0]);
        let long_ago = SystemTime::now() - Duration::from_secs(7200);
        torn.unwrap().set_modified(long_ago).unwrap();
        let there = || [0, 1, 2].map(|i: usize| copies[i].exists());
        let uses = Uses {
            needed: HashSet::from([kept]),
            ..Uses::default()
        };
        assert_eq!(collect(&cache, &uses, Bounds::default()).results(), 0);
        assert_eq!(there(), [false, true, true]);
        assert_eq!(collect(&cache, &uses, EVERYTHING).results(), 0);
        assert_eq!(there(), [false, true, false]);
        assert!(cache.actions().get(&kept).is_some());
    }

    #[test]
    fn a_size_takes_the_least_recently_used_first_and_stops_when_it_is_met() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let at = |s: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        let mut uses = Uses::default();
        let mut keys = Vec::new();
        for (i, used) in [30, 10, 20].into_iter().enumerate() {
            let big = cache.store().put_bytes(&[i as u8; 1000]).unwrap();
            let key = put(&cache, &format!("k{i}"), &[&big]);
            uses.last.insert(key, at(used));
            keys.push(key);
        }
        let total = Survey::of(dir.path()).total().bytes;
        let bounds = Bounds {
            max_size: Some(total - 500),
            max_age: None,
        };
        assert_eq!(collect(&cache, &uses, bounds).results(), 1);
        let there = keys.iter().map(|k| cache.actions().get(k).is_some());
        assert_eq!(there.collect::<Vec<_>>(), [true, false, true]);
        let none = Bounds {
            max_size: Some(total),
            max_age: None,
        };
        assert!(collect(&cache, &uses, none).is_empty());
        let aged = Bounds {
            max_size: None,
            max_age: Some(Duration::from_secs(60)),
        };
        uses.last.insert(keys[0], SystemTime::now());
        assert_eq!(collect(&cache, &uses, aged).results(), 1);
        assert!(cache.actions().get(&keys[0]).is_some());
    }

    #[test]
    fn answers_of_others_go_before_own_results() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let kept = cache.store().put_bytes(b"kept").unwrap();
        let key = put(&cache, "kept", &[&kept]);
        let folder = dir.path().join("completions");
        let files = ["000000.log", "remote-ab.log", "remote-ab.packs"].map(|f| folder.join(f));
        std::fs::create_dir_all(&folder).unwrap();
        for file in &files {
            std::fs::write(file, vec![0; 1000]).unwrap();
        }
        let total = Survey::of(dir.path()).total().bytes;
        let size = |max| Bounds {
            max_size: Some(max),
            max_age: None,
        };
        assert!(collect(&cache, &Uses::default(), size(total)).is_empty());
        let found = collect(&cache, &Uses::default(), size(total - 1));
        assert_eq!((found.results(), found.bytes), (0, 2000));
        assert_eq!(files.map(|file| file.exists()), [true, false, false]);
        assert_eq!(found.left, Survey::of(dir.path()).total().bytes);
        assert!(cache.actions().get(&key).is_some());
        collect(&cache, &Uses::default(), size(0));
        assert!(folder.join("000000.log").exists(), "own answers stay");
    }

    #[test]
    fn saved_training_goes_by_age_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let key = Digest::of_bytes(b"k");
        std::fs::create_dir_all(cache.partial_path(&key)).unwrap();
        let tiny = Bounds {
            max_size: Some(0),
            max_age: Some(Duration::from_secs(3600)),
        };
        collect(&cache, &Uses::default(), tiny);
        assert!(cache.partial_path(&key).exists());
        let needed = Uses {
            needed: HashSet::from([key]),
            ..Uses::default()
        };
        collect(&cache, &needed, EVERYTHING);
        assert!(cache.partial_path(&key).exists());
        collect(&cache, &Uses::default(), EVERYTHING);
        assert!(!cache.partial_path(&key).exists());
    }
}
