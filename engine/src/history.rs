//! [`History`]: what a step id had in earlier runs, to explain what changed since.
//!
//! Read only when something is stale, newest run first, and no further than needed:
//! a run's events say what each step used, also when it came from the cache. For a
//! step that the newest runs do not know, all results are asked.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use flowrun_cache::{ActionCache, ActionKey, ActionResult, CacheReader, Removal};

use crate::run_keys::RunLog;

/// Runs of the pipeline that are looked at.
const RUNS: usize = 10;

/// Earlier results by step id.
pub(crate) struct History {
    pipeline: String,
    reader: CacheReader,
    /// The run that is going on: its own record says nothing about before.
    current: Option<PathBuf>,
    runs: Mutex<Runs>,
    all: OnceLock<BTreeMap<String, (String, ActionKey)>>,
    removed: OnceLock<HashMap<ActionKey, Removal>>,
}

/// What a step id had once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Earlier {
    pub(crate) key: ActionKey,
    /// The run that used it, if that is known.
    pub(crate) run: Option<String>,
    /// There was a result under the key then.
    pub(crate) had_result: bool,
}

/// Runs of the pipeline, newest first, as far as they were read.
#[derive(Default)]
struct Runs {
    /// Folders that were not looked at; `None` before the first look.
    left: Option<std::vec::IntoIter<PathBuf>>,
    read: Vec<RunLog>,
}

impl History {
    pub(crate) fn new(pipeline: &str, cache_dir: &Path, current: Option<PathBuf>) -> Self {
        Self {
            pipeline: pipeline.to_owned(),
            reader: CacheReader::open(cache_dir),
            current,
            runs: Mutex::default(),
            all: OnceLock::new(),
            removed: OnceLock::new(),
        }
    }

    /// That the result of a key was taken out of the cache, where that is remembered.
    pub(crate) fn removal(&self, key: &ActionKey) -> Option<Removal> {
        let removed = self.removed.get_or_init(|| Removal::all(self.reader.dir()));
        removed.get(key).copied()
    }

    /// The label that results of a step carry.
    pub(crate) fn label(pipeline: &str, id: &str) -> String {
        format!("{pipeline} {id}")
    }

    /// What the step last had; its result may be gone, or it never gave one.
    pub(crate) fn last(&self, id: &str) -> Option<Earlier> {
        let in_run = (0..RUNS).map_while(|at| self.run(at, id)).flatten().next();
        in_run.or_else(|| self.of_all(id))
    }

    /// The nearest earlier result of the step that the cache still has.
    pub(crate) fn nearest(&self, id: &str) -> Option<(Earlier, ActionResult)> {
        let runs = (0..RUNS).map_while(|at| self.run(at, id)).flatten();
        let mut found = runs.chain(std::iter::once_with(|| self.of_all(id)).flatten());
        found.find_map(|earlier| {
            let result = self.reader.actions().get(&earlier.key)?;
            Some((earlier, result))
        })
    }

    /// What the step had in the run at this place; `None` when there is no such run.
    fn run(&self, at: usize, id: &str) -> Option<Option<Earlier>> {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        while runs.read.len() <= at {
            let left = runs
                .left
                .get_or_insert_with(|| self.reader.runs().into_iter());
            let folder = left.find(|folder| self.current.as_ref() != Some(folder))?;
            runs.read.extend(RunLog::read(&folder, &self.pipeline));
        }
        let run = &mut runs.read[at];
        Some(run.used(id).map(|used| Earlier {
            key: used.key,
            run: Some(run.run.clone()),
            had_result: used.has_result,
        }))
    }

    fn of_all(&self, id: &str) -> Option<Earlier> {
        let all = self.all.get_or_init(|| newest(self.reader.actions()));
        let (_, key) = all.get(&Self::label(&self.pipeline, id))?;
        Some(Earlier {
            key: *key,
            run: None,
            had_result: true,
        })
    }
}

fn newest(actions: &ActionCache) -> BTreeMap<String, (String, ActionKey)> {
    let mut newest: BTreeMap<String, (String, ActionKey)> = BTreeMap::new();
    for result in actions.all() {
        let this = (result.finished_at, result.key);
        let entry = newest.entry(result.label).or_insert_with(|| this.clone());
        if *entry < this {
            *entry = this;
        }
    }
    newest
}
