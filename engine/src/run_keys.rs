//! [`RunKeys`]: the action keys that a run used. Less of a record is read than
//! [`crate::record::RunRecord`] reads, because records are long.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::time::SystemTime;

use flowrun_cache::{ActionKey, Digest};
use serde::Deserialize;

use crate::event::StepStatus;

/// The keys of a run.
#[derive(Debug)]
pub(crate) struct RunKeys {
    /// Run id.
    pub(crate) run: String,
    /// Pipeline name.
    pub(crate) pipeline: String,
    /// When it began.
    pub(crate) at: SystemTime,
    /// It ended, and well.
    pub(crate) ok: bool,
    /// What each step id used; of one that began and did not end, what it was about to make.
    pub(crate) keys: HashMap<String, Used>,
}

/// The key that a step id used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) key: ActionKey,
    /// There was a result: it was made, or it was there.
    pub(crate) has_result: bool,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    pipeline: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    at: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    step: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(default)]
    status: Option<StepStatus>,
    #[serde(default)]
    ok: bool,
}

impl RunKeys {
    /// Reads a run's folder; `None` when it cannot be read, or is of another pipeline than
    /// the one that is wanted.
    pub(crate) fn read(run_dir: &Path, wanted: Option<&str>) -> Option<Self> {
        let bytes = std::fs::read(run_dir.join("events.jsonl")).ok()?;
        let mut lines = bytes.split(|b| *b == b'\n');
        let first: Line<'_> = serde_json::from_slice(lines.next()?).ok()?;
        let pipeline = first.pipeline?.into_owned();
        if wanted.is_some_and(|wanted| wanted != pipeline) {
            return None;
        }
        let at = humantime::parse_rfc3339(&first.at?).ok()?;
        let mut keys = HashMap::new();
        let mut ok = false;
        let told = |line: &&[u8]| {
            let starts = [&b"{\"event\":\"step_"[..], b"{\"event\":\"run_finished"];
            starts.iter().any(|start| line.starts_with(start))
        };
        for line in lines.filter(told) {
            let Ok(line) = serde_json::from_slice::<Line<'_>>(line) else {
                continue;
            };
            ok |= line.ok;
            if let (Some(step), Some(key)) = (line.step, line.key.and_then(|k| Digest::parse(&k))) {
                let has_result = matches!(line.status, Some(StepStatus::Ran | StepStatus::Cached));
                // A step that was made again in the same run stands as it ended last.
                keys.insert(step.into_owned(), Used { key, has_result });
            }
        }
        Some(Self {
            run: run_dir.file_name()?.to_string_lossy().into_owned(),
            pipeline,
            at,
            ok,
            keys,
        })
    }
}
