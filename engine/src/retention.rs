//! Which results the cache must keep: those that the last runs of each pipeline used. Runs that
//! ended well are counted apart from the others, so that a row of failures displaces nothing.
//!
//! [`uses`] reads it from the runs' records, [`collect`] removes the rest as far as the bounds
//! ask, and [`tidy`] does so at the end of a run, when it is worth a look: once a day for what is
//! old, and when the size at the last look (none, of a new cache) and what runs wrote since are
//! together over the bound, but so that looking takes at most a hundredth of the time between two
//! looks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::{
    ActionKey, ActionResult, Bounds, Cache, CacheError, CacheReader, Garbage, Remover, Share,
    Survey, Uses,
};
use serde::{Deserialize, Serialize};

use crate::record::REPLACED;
use crate::run_keys::{RunKeys, Used};

/// The longest time between two looks at what is old.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// One look may take this share of the time since the last one.
const SHARE: u32 = 100;
/// The note in the cache folder about the last look.
const NOTE: &str = "gc.json";

/// What the cache keeps.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Runs of each pipeline whose results stay, whatever the bounds say: so many that ended
    /// well, and so many that did not.
    pub keep_runs: usize,
    /// How large and how old the rest may grow.
    pub bounds: Bounds,
}

/// The last look.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// When the size was looked at, or the cache was new.
    looked: SystemTime,
    /// How long that took.
    took: Duration,
    /// When everything was looked at.
    swept: SystemTime,
    /// Bytes of the cache then, and what runs wrote since.
    #[serde(default)]
    size: Option<u64>,
}

/// Who uses what, by the runs' records. See [`Retention::keep_runs`] for what is needed.
#[must_use]
pub fn uses(cache: &CacheReader, keep_runs: usize) -> Uses {
    let mut uses = Uses::default();
    let mut seen: BTreeMap<(String, bool), usize> = BTreeMap::new();
    for dir in cache.runs() {
        if !dir.is_dir() {
            continue;
        }
        let Some(run) = RunKeys::read(&dir, None) else {
            let changed = std::fs::metadata(&dir).and_then(|m| m.modified());
            uses.spare_runs
                .push((dir, changed.unwrap_or(SystemTime::UNIX_EPOCH)));
            continue;
        };
        let number = seen.entry((run.pipeline, run.ok)).or_default();
        *number += 1;
        let kept = *number <= keep_runs;
        for Used { key, .. } in run.keys.into_values() {
            let last = uses.last.entry(key).or_insert(run.at);
            *last = (*last).max(run.at);
            if kept {
                uses.needed.insert(key);
            }
        }
        // What a published output replaced is nowhere else.
        if !kept && !dir.join(REPLACED).exists() {
            uses.spare_runs.push((dir, run.at));
        }
    }
    uses
}

/// The keys that a run used.
#[must_use]
pub fn keys_of(run_dir: &Path) -> BTreeSet<ActionKey> {
    let run = RunKeys::read(run_dir, None);
    run.into_iter()
        .flat_map(|run| run.keys.into_values())
        .map(|used| used.key)
        .collect()
}

/// What steps of these runs worked out on the way and kept as results of their own, such as the
/// candidates of a search: as far as steps of these names asked for it first.
#[must_use]
pub fn parts_of<'a>(
    cache: &CacheReader,
    run_dirs: impl IntoIterator<Item = &'a Path>,
) -> BTreeSet<ActionKey> {
    let runs = run_dirs.into_iter();
    let steps: BTreeSet<String> = runs
        .filter_map(|dir| RunKeys::read(dir, None))
        .flat_map(|run| run.keys.into_keys())
        .collect();
    let is_theirs = |part: &ActionResult| part.part_of().is_some_and(|step| steps.contains(step));
    let parts = cache.actions().all().filter(is_theirs);
    parts.map(|part| part.key).collect()
}

/// What could be removed; nothing is.
#[must_use]
pub fn garbage(cache: &CacheReader, retention: &Retention) -> Garbage {
    let uses = uses(cache, retention.keep_runs);
    Garbage::find(cache, &uses, retention.bounds, SystemTime::now())
}

/// Removes what the bounds ask to and no kept run needs.
///
/// # Errors
/// When something cannot be removed.
pub fn collect(cache: &Cache, retention: &Retention) -> Result<Garbage, CacheError> {
    collect_for(cache, retention, Remover::Collection, &|| false)
}

fn collect_for(
    cache: &Cache,
    retention: &Retention,
    by: Remover,
    stop: &dyn Fn() -> bool,
) -> Result<Garbage, CacheError> {
    let garbage = garbage(&CacheReader::open(cache.dir()), retention);
    garbage.remove(cache, by, stop)?;
    Ok(garbage)
}

/// Does so at the end of a run, if it is time. `made` is the folder of the run, if it made anything;
/// once `stop` says so, the rest is left to the end of the next run.
///
/// # Errors
/// As [`collect`].
pub fn tidy(
    cache: &Cache,
    retention: &Retention,
    made: Option<&Path>,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Garbage>, CacheError> {
    let now = SystemTime::now();
    let path = cache.dir().join(NOTE);
    let text = std::fs::read(&path).ok();
    let last: Option<Note> = text.and_then(|text| serde_json::from_slice(&text).ok());
    // A new cache holds nothing old. A clock that was set back makes every look due.
    let swept = last.as_ref().map_or(now, |note| note.swept);
    let is_since = |then: SystemTime, time| now.duration_since(then).map_or(true, |t| t >= time);
    let old = is_since(swept, DAY);
    let Some(run) = made.map(Share::of).or(old.then(Share::default)) else {
        return Ok(None);
    };
    let max = retention.bounds.max_size;
    let counted = match &last {
        Some(note) => note.size,
        None => cache.is_new().then_some(0),
    };
    let counted = counted.map(|size| size + cache.written() + run.bytes);
    let grown = max.is_some_and(|max| counted.is_none_or(|size| size > max))
        && last
            .as_ref()
            .is_none_or(|note| is_since(note.looked, note.took * SHARE));
    let write = |note: &Note| {
        let text = serde_json::to_vec(note).unwrap_or_default();
        std::fs::write(&path, text).map_err(|e| CacheError::io(&path, e))
    };
    if !grown && !old {
        let note = last.unwrap_or(Note {
            looked: now,
            took: Duration::ZERO,
            swept,
            size: None,
        });
        write(&Note {
            size: counted,
            ..note
        })?;
        return Ok(None);
    }
    let started = Instant::now();
    let size = Survey::of(cache.dir()).total().bytes;
    let over = max.is_some_and(|max| size > max);
    let collected = match over || old {
        true => Some(collect_for(cache, retention, Remover::Run, stop)?),
        false => None,
    };
    if stop() {
        return Ok(None);
    }
    write(&Note {
        looked: now,
        took: started.elapsed(),
        swept: if collected.is_some() { now } else { swept },
        size: Some(collected.as_ref().map_or(size, |garbage| garbage.left)),
    })?;
    Ok(collected.filter(|garbage| !garbage.is_empty()))
}
