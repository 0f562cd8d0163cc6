//! [`History`]: the result that a step id had the last time, to explain what
//! changed since.
//!
//! Read only when something is stale, and at most once: first the newest runs'
//! events (which say what each step used, also when it came from the cache),
//! then, for a step that they do not know, all results.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use flowrun_cache::{ActionCache, ActionKey, ActionResult, CacheReader, Digest};

use crate::record::RunRecord;

/// Runs of the pipeline that are looked at.
const RUNS: usize = 3;

/// Earlier results by step id.
pub(crate) struct History {
    pipeline: String,
    reader: CacheReader,
    /// The run that is going on: its own record says nothing about before.
    current: Option<PathBuf>,
    runs: OnceLock<BTreeMap<String, ActionKey>>,
    all: OnceLock<BTreeMap<String, (String, ActionKey)>>,
}

impl History {
    pub(crate) fn new(pipeline: &str, cache_dir: &Path, current: Option<PathBuf>) -> Self {
        Self {
            pipeline: pipeline.to_owned(),
            reader: CacheReader::open(cache_dir),
            current,
            runs: OnceLock::new(),
            all: OnceLock::new(),
        }
    }

    /// The label that results of a step carry.
    pub(crate) fn label(pipeline: &str, id: &str) -> String {
        format!("{pipeline} {id}")
    }

    /// What the step last had, by key; the result itself may be gone.
    pub(crate) fn last(&self, id: &str) -> Option<(ActionKey, Option<ActionResult>)> {
        let label = Self::label(&self.pipeline, id);
        let key = match self.runs.get_or_init(|| self.read_runs()).get(id) {
            Some(key) => *key,
            None => {
                self.all
                    .get_or_init(|| newest(self.reader.actions()))
                    .get(&label)?
                    .1
            }
        };
        Some((key, self.reader.actions().get(&key)))
    }

    fn read_runs(&self) -> BTreeMap<String, ActionKey> {
        let mut keys = BTreeMap::new();
        let folders = self.reader.runs().into_iter();
        let records = folders
            .filter(|folder| self.current.as_ref() != Some(folder))
            .filter_map(|folder| RunRecord::load(&folder).ok())
            .filter(|record| record.pipeline == self.pipeline)
            .take(RUNS);
        for step in records.flat_map(|record| record.steps) {
            if let Some(key) = Digest::parse(&step.key) {
                keys.entry(step.step).or_insert(key);
            }
        }
        keys
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
