//! [`Verified`]: reads the whole cache and says what is damaged; [`repair`] sets it aside.
//!
//! Verifying needs no lock and changes nothing. Repairing needs the held cache; after it, what
//! was damaged is missing, and is made again by the next run that needs it.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde::Serialize;

use crate::action::{ActionKey, ActionResult};
use crate::cache::{Cache, CacheReader};
use crate::completion;
use crate::digest::Digest;
use crate::error::CacheError;
use crate::removal::{Removal, Remover};

/// What was read, and what is damaged.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verified {
    /// Objects that were hashed.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Results that were read.
    pub results: u64,
    /// Kept language-model answers that were read.
    pub completions: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
}

/// Something that is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Damage {
    /// An object whose bytes do not have its digest, or cannot be read.
    Object {
        /// Its digest.
        digest: Digest,
        /// Where it lies.
        path: PathBuf,
    },
    /// A result that cannot be read.
    Result {
        /// Where it lies.
        path: PathBuf,
    },
    /// A result whose object is missing or damaged.
    Incomplete {
        /// Its key.
        key: ActionKey,
        /// Who asked for it: pipeline and step.
        label: String,
        /// The object.
        digest: Digest,
    },
    /// Damaged lines of kept answers.
    Completions {
        /// The segment.
        path: PathBuf,
        /// How many lines.
        lines: usize,
    },
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Object { path, .. } => {
                write!(
                    f,
                    "object {}: its bytes are not what was stored",
                    path.display()
                )
            }
            Self::Result { path } => write!(f, "result {}: it cannot be read", path.display()),
            Self::Incomplete { label, digest, .. } => write!(
                f,
                "result of `{label}`: its object {} is missing or damaged",
                digest.short()
            ),
            Self::Completions { path, lines } => {
                write!(f, "{}: {lines} damaged lines", path.display())
            }
        }
    }
}

/// Reads the whole cache. While a run goes on, what it is just writing is left out.
#[must_use]
pub fn verify(cache: &CacheReader) -> Verified {
    let mut found = Verified::default();
    let (sizes, _) = cache.store().objects();
    let mut good = HashSet::new();
    let mut objects: Vec<(Digest, u64)> = sizes.into_iter().collect();
    objects.sort();
    for (digest, size) in objects {
        let path = cache.store().object_path(&digest);
        found.objects += 1;
        found.bytes += size;
        match Digest::of_file(&path) {
            Ok(actual) if actual == digest => drop(good.insert(digest)),
            // A collection removed it meanwhile.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            _ => found.damage.push(Damage::Object { digest, path }),
        }
    }
    results(cache, &good, &mut found);
    for segment in completion::check(&cache.dir().join("completions")) {
        found.completions += segment.good as u64;
        if segment.bad > 0 {
            found.damage.push(Damage::Completions {
                path: segment.path,
                lines: segment.bad,
            });
        }
    }
    found
}

fn results(cache: &CacheReader, good: &HashSet<Digest>, found: &mut Verified) {
    for path in cache.actions().damaged() {
        found.damage.push(Damage::Result { path });
    }
    let mut members = HashMap::new();
    let mut incomplete = Vec::new();
    for result in cache.actions().all() {
        found.results += 1;
        if let Some(digest) = missing(cache, &result, good, &mut members) {
            incomplete.push((result.label, result.key, digest));
        }
    }
    incomplete.sort();
    let damage = incomplete.into_iter();
    found
        .damage
        .extend(damage.map(|(label, key, digest)| Damage::Incomplete { key, label, digest }));
}

/// The first object of the outputs that is not good.
fn missing(
    cache: &CacheReader,
    result: &ActionResult,
    good: &HashSet<Digest>,
    members: &mut HashMap<Digest, Vec<Digest>>,
) -> Option<Digest> {
    let artifacts = result.outputs.values().flat_map(|o| o.value.artifacts());
    artifacts
        .flat_map(|artifact| {
            let digest = artifact.digest;
            let members = members
                .entry(digest)
                .or_insert_with(|| cache.store().members(&digest));
            std::iter::once(digest).chain(members.clone())
        })
        .find(|digest| !good.contains(digest))
}

/// Sets aside what is damaged, and throws the index away: it is built anew.
///
/// # Errors
/// When the cache cannot be written.
pub fn repair(cache: &Cache) -> Result<Verified, CacheError> {
    let found = verify(&CacheReader::open(cache.dir()));
    let results = found.damage.iter().filter_map(|damage| match damage {
        Damage::Result { path } => cache.actions().key_at(path),
        Damage::Incomplete { key, .. } => Some(*key),
        Damage::Object { .. } | Damage::Completions { .. } => None,
    });
    Removal::note(cache, Remover::Repair, &results.collect::<Vec<_>>());
    for damage in &found.damage {
        match damage {
            Damage::Object { digest, .. } => cache.store().set_aside(digest),
            Damage::Result { path } => cache.actions().set_aside(path),
            Damage::Incomplete { key, .. } => {
                let path = cache.actions().path(key);
                std::fs::remove_file(&path).map_err(|e| CacheError::io(&path, e))?;
            }
            Damage::Completions { path, .. } => completion::drop_damaged(path)?,
        }
    }
    cache.index().discard()?;
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;
    use crate::OpenOptions;
    use crate::action::{ACTION_VERSION, OutputRecord, OutputValue};

    fn open(dir: &Path) -> Cache {
        Cache::open(dir, &OpenOptions::no_wait("test")).unwrap()
    }

    fn flip(path: &Path) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        bytes[1] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    fn put(cache: &Cache, name: &str) -> (ActionKey, Digest) {
        let key = Digest::of_bytes(name.as_bytes());
        let folder = cache.dir().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("member"), name).unwrap();
        let tree = cache.store().put_path(&folder).unwrap();
        let output = OutputRecord {
            ty: "file".into(),
            value: OutputValue::One(tree),
        };
        let result = ActionResult {
            version: ACTION_VERSION,
            key,
            manifest: serde_json::json!({}),
            outputs: BTreeMap::from([("out".to_owned(), output)]),
            metrics: BTreeMap::new(),
            took_ms: 1,
            finished_at: String::new(),
            label: name.into(),
        };
        cache.actions().put(&result).unwrap();
        (key, Digest::of_bytes(name.as_bytes()))
    }

    #[test]
    fn all_damage_is_found_and_repair_leaves_none() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let (good, _) = put(&cache, "good");
        let (flipped, member) = put(&cache, "flipped");
        let (unread, _) = put(&cache, "unread");
        for i in 0..3u8 {
            let key = Digest::of_bytes(&[i]);
            cache
                .completions()
                .put(&key, &serde_json::json!(i))
                .unwrap();
        }
        let reader = CacheReader::open(dir.path());
        assert_eq!(verify(&reader).damage, []);

        flip(&cache.store().object_path(&member));
        flip(&cache.actions().path(&unread));
        flip(&dir.path().join("completions/000000.log"));
        let found = verify(&reader);
        assert_eq!((found.results, found.objects, found.completions), (2, 6, 2));
        assert_eq!(found.damage.len(), 4, "{:?}", found.damage);
        assert_eq!(verify(&reader).damage, found.damage, "nothing was changed");

        assert_eq!(repair(&cache).unwrap().damage, found.damage);
        let after = verify(&reader);
        assert_eq!(after.damage, []);
        assert_eq!((after.results, after.completions), (1, 2));
        assert!(cache.actions().get(&good).is_some());
        assert!(cache.actions().get(&flipped).is_none());
        drop(cache);
        assert_eq!(open(dir.path()).completions().len(), 2);
    }

    #[test]
    fn a_line_that_is_being_written_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let key = Digest::of_bytes(b"k");
        cache
            .completions()
            .put(&key, &serde_json::json!(1))
            .unwrap();
        let path = dir.path().join("completions/000000.log");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"torn");
        std::fs::write(&path, bytes).unwrap();
        let found = verify(&CacheReader::open(dir.path()));
        assert_eq!((found.completions, found.damage), (1, vec![]));
    }
}
