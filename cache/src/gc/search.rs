//! [`Search`]: finds what may be removed, in the order in which it goes. Removes nothing.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Bounds, Garbage, Uses};
use crate::action::{ActionKey, ActionResult};
use crate::cache::CacheReader;
use crate::completion;
use crate::digest::Digest;
use crate::survey::{Share, Survey};

/// No result takes so long to be written.
const WRITTEN_WITHIN: Duration = Duration::from_secs(3600);

/// A result with what removing it frees.
struct Held {
    key: ActionKey,
    bytes: u64,
    objects: Vec<Digest>,
    last: SystemTime,
}

/// Looks through a cache.
pub(super) struct Search<'a> {
    cache: &'a CacheReader,
    bounds: Bounds,
    now: SystemTime,
    sizes: HashMap<Digest, u64>,
    /// How many results hold an object.
    holders: HashMap<Digest, usize>,
    found: Garbage,
}

impl<'a> Search<'a> {
    pub(super) fn new(cache: &'a CacheReader, bounds: Bounds, now: SystemTime) -> Self {
        let (sizes, leftovers) = cache.store().objects();
        let total = Survey::of(cache.dir()).total().bytes;
        Self {
            cache,
            bounds,
            now,
            sizes,
            holders: HashMap::new(),
            found: Garbage {
                leftovers,
                left: total,
                ..Garbage::default()
            },
        }
    }

    pub(super) fn run(mut self, uses: &Uses) -> Garbage {
        let mut results = self.results(uses);
        let orphans: Vec<Digest> = self
            .sizes
            .keys()
            .filter(|d| !self.holders.contains_key(d))
            .copied()
            .collect();
        for digest in orphans {
            self.drop_object(digest);
        }
        for path in self.found.leftovers.clone() {
            self.freed(Share::of(&path).bytes);
        }
        self.unfinished();
        self.partial(uses);
        self.set_aside();
        self.answers_of_others();
        results.sort_by(|a, b| a.last.cmp(&b.last).then(a.key.cmp(&b.key)));
        for held in results
            .into_iter()
            .filter(|h| !uses.needed.contains(&h.key))
        {
            if !self.goes(held.last) {
                break;
            }
            self.drop_result(&held);
        }
        let mut runs = uses.spare_runs.clone();
        runs.sort_by_key(|(_, at)| *at);
        for (dir, at) in runs {
            if !self.goes(at) {
                break;
            }
            self.freed(Share::of(&dir).bytes);
            self.found.runs.push(dir);
        }
        self.found
    }

    fn results(&mut self, uses: &Uses) -> Vec<Held> {
        let mut members = HashMap::new();
        let mut all = Vec::new();
        for result in self.cache.actions().all() {
            let objects = self.objects_of(&result, &mut members);
            for digest in &objects {
                *self.holders.entry(*digest).or_default() += 1;
            }
            let meta = std::fs::metadata(self.cache.actions().path(&result.key)).ok();
            let stored = meta.as_ref().and_then(|m| m.modified().ok());
            all.push(Held {
                key: result.key,
                bytes: meta.map_or(0, |m| m.len()),
                objects,
                last: uses
                    .last
                    .get(&result.key)
                    .copied()
                    .or(stored)
                    .unwrap_or(self.now),
            });
        }
        all
    }

    /// The outputs' objects, and those of its inputs that are in the store: the project's own
    /// files, which lineage may want to show. Each once.
    fn objects_of(
        &self,
        result: &ActionResult,
        members: &mut HashMap<Digest, Vec<Digest>>,
    ) -> Vec<Digest> {
        let mut all = HashSet::new();
        for digest in result.digests() {
            if self.sizes.contains_key(&digest) && all.insert(digest) {
                let members = members
                    .entry(digest)
                    .or_insert_with(|| self.cache.store().members(&digest));
                all.extend(members.iter().copied());
            }
        }
        all.retain(|digest| self.sizes.contains_key(digest));
        all.into_iter().collect()
    }

    /// Saved state of unfinished actions, and their jobs elsewhere: only age removes it, for it may
    /// be hours of training. A job whose folder is gone stops.
    fn partial(&mut self, uses: &Uses) {
        let needed = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Digest::parse(&name).is_some_and(|key| uses.needed.contains(&key))
        };
        let folders = ["partial", "jobs"].map(|name| self.cache.dir().join(name));
        for path in folders
            .iter()
            .flat_map(|folder| crate::record::folder(folder))
        {
            let changed = std::fs::metadata(&path).and_then(|m| m.modified());
            if !needed(&path) && self.is_old(changed.unwrap_or(self.now)) {
                self.freed(Share::of(&path).bytes);
                self.found.partial.push(path);
            }
        }
    }

    /// Results that nobody writes any more. A process of a step or a job writes some without holding
    /// the cache, and may outlive its run.
    fn unfinished(&mut self) {
        for path in self.cache.actions().unfinished() {
            let changed = std::fs::metadata(&path).and_then(|m| m.modified());
            let age = self.now.duration_since(changed.unwrap_or(self.now));
            if age.is_ok_and(|age| age >= WRITTEN_WITHIN) {
                self.freed(Share::of(&path).bytes);
                self.found.leftovers.push(path);
            }
        }
    }

    /// Damaged objects and results, kept to be looked at: they go before anything that is of use.
    fn set_aside(&mut self) {
        let objects = crate::record::folder(&self.cache.store().quarantine_path());
        for path in objects.chain(self.cache.actions().set_aside_files()) {
            let changed = std::fs::metadata(&path).and_then(|m| m.modified());
            if self.goes(changed.unwrap_or(self.now)) {
                self.freed(Share::of(&path).bytes);
                self.found.leftovers.push(path);
            }
        }
    }

    /// What came from remotes goes before what was made here.
    fn answers_of_others(&mut self) {
        for log in completion::of_remotes(&self.cache.dir().join("completions")) {
            let changed = std::fs::metadata(&log).and_then(|m| m.modified());
            if !self.goes(changed.unwrap_or(self.now)) {
                continue;
            }
            // The list first: after a kill in between, the packs in it are fetched again.
            for path in [log.with_extension("packs"), log] {
                self.freed(Share::of(&path).bytes);
                self.found.leftovers.push(path);
            }
        }
    }

    fn goes(&self, last: SystemTime) -> bool {
        self.is_old(last)
            || self
                .bounds
                .max_size
                .is_some_and(|max| self.found.left > max)
    }

    fn is_old(&self, last: SystemTime) -> bool {
        // A time to come (a clock that was set back) is no age.
        let age = self.now.duration_since(last).unwrap_or_default();
        self.bounds.max_age.is_some_and(|max| age >= max)
    }

    fn drop_result(&mut self, held: &Held) {
        self.freed(held.bytes);
        self.found.results.push(held.key);
        for digest in &held.objects {
            let left = self.holders.get_mut(digest).map(|n| {
                *n -= 1;
                *n
            });
            if left == Some(0) {
                self.drop_object(*digest);
            }
        }
    }

    fn drop_object(&mut self, digest: Digest) {
        self.freed(self.sizes.get(&digest).copied().unwrap_or(0));
        self.found.objects.push(digest);
    }

    fn freed(&mut self, bytes: u64) {
        self.found.bytes += bytes;
        self.found.left = self.found.left.saturating_sub(bytes);
    }
}
