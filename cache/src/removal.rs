//! [`Removal`]: which results were taken out of a cache, by whom and when, so that it can be told
//! why something is made again.
//!
//! Nothing rests on it: it is bounded, and where it cannot be written or read nothing is told.

use std::collections::HashMap;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::action::ActionKey;
use crate::cache::Cache;

/// The note in the cache folder, one JSON object a line.
const FILE: &str = "removed.jsonl";
/// Results that it names at most: those that were removed last.
const KEPT: usize = 10_000;

/// Who took results out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remover {
    /// A collection that somebody asked for.
    Collection,
    /// A collection at the end of a run, for the cache's bounds.
    Run,
    /// A repair.
    Repair,
}

/// That a result was taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// By whom.
    pub by: Remover,
    /// When.
    pub at: SystemTime,
}

#[derive(Serialize, Deserialize)]
struct Line {
    by: Remover,
    at: SystemTime,
    keys: Vec<ActionKey>,
}

impl Removal {
    /// The last removal of each result, as far as it is remembered.
    #[must_use]
    pub fn all(cache_dir: &Path) -> HashMap<ActionKey, Self> {
        let lines = read(cache_dir).into_iter();
        let each = lines.flat_map(|Line { by, at, keys }| {
            let removal = Self { by, at };
            keys.into_iter().map(move |key| (key, removal))
        });
        each.collect()
    }

    /// Remembers that results are about to be taken out.
    pub(crate) fn note(cache: &Cache, by: Remover, keys: &[ActionKey]) {
        if keys.is_empty() {
            return;
        }
        let mut lines = read(cache.dir());
        lines.push(Line {
            by,
            at: SystemTime::now(),
            keys: keys.to_vec(),
        });
        let mut room = KEPT;
        let mut kept = Vec::new();
        for mut line in lines.into_iter().rev() {
            line.keys.truncate(room);
            room -= line.keys.len();
            if !line.keys.is_empty() {
                kept.extend(serde_json::to_string(&line));
            }
        }
        kept.reverse();
        let text = kept.join("\n") + "\n";
        // Whoever asks later is told less.
        let _ = cache.write_file(Path::new(FILE), text.as_bytes());
    }
}

fn read(cache_dir: &Path) -> Vec<Line> {
    let text = std::fs::read(cache_dir.join(FILE)).unwrap_or_default();
    let lines = text.split(|b| *b == b'\n');
    lines
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::OpenOptions;
    use crate::digest::Digest;

    #[test]
    fn the_last_removals_are_remembered_and_damage_tells_less() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), &OpenOptions::no_wait("test")).unwrap();
        let key = |n: usize| Digest::of_bytes(&n.to_le_bytes());
        let by = |n: usize| Removal::all(dir.path()).get(&key(n)).map(|r| r.by);
        assert_eq!(by(0), None);
        Removal::note(&cache, Remover::Repair, &[]);
        assert!(!dir.path().join(FILE).exists());
        Removal::note(&cache, Remover::Repair, &[key(0), key(1)]);
        Removal::note(&cache, Remover::Collection, &[key(1)]);
        assert_eq!(by(0), Some(Remover::Repair));
        assert_eq!(by(1), Some(Remover::Collection));
        let many: Vec<ActionKey> = (2..KEPT + 2).map(key).collect();
        Removal::note(&cache, Remover::Run, &many);
        assert_eq!(by(2), Some(Remover::Run));
        assert_eq!(by(0), None, "older ones are forgotten");
        let mut text = std::fs::read(dir.path().join(FILE)).unwrap();
        text.truncate(text.len() / 2);
        std::fs::write(dir.path().join(FILE), text).unwrap();
        assert_eq!(by(2), None);
    }
}
