//! [`RunKeys`]: the action keys that a run used, and [`RunLog`]: those of a few of its steps. Less
//! of a record is read than [`crate::record::RunRecord`] reads, because records are long.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::time::SystemTime;

use flowrun_cache::{ActionKey, Digest};
use memchr::{memchr, memmem, memrchr};
use serde::Deserialize;

use crate::event::StepStatus;

/// File of a run's events.
const EVENTS: &str = "events.jsonl";
/// Steps that are searched for one by one, before all of a record is read.
const SEARCHES: usize = 16;

/// The keys of a run.
#[derive(Debug)]
pub(crate) struct RunKeys {
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

/// What a line says of a step.
fn told(line: &[u8]) -> Option<(Line<'_>, Option<(String, Used)>)> {
    let starts = [&b"{\"event\":\"step_"[..], b"{\"event\":\"run_finished"];
    if !starts.iter().any(|start| line.starts_with(start)) {
        return None;
    }
    let mut line: Line<'_> = serde_json::from_slice(line).ok()?;
    let key = line.key.take().and_then(|k| Digest::parse(&k));
    let has_result = matches!(line.status, Some(StepStatus::Ran | StepStatus::Cached));
    let step = line.step.take();
    let used = step.zip(key.map(|key| Used { key, has_result }));
    let used = used.map(|(step, used)| (step.into_owned(), used));
    Some((line, used))
}

/// The pipeline of a run and when it began, by the first line of its events.
fn begun(bytes: &[u8], wanted: Option<&str>) -> Option<(String, SystemTime)> {
    let first: Line<'_> = serde_json::from_slice(bytes.split(|b| *b == b'\n').next()?).ok()?;
    let pipeline = first.pipeline?.into_owned();
    if wanted.is_some_and(|wanted| wanted != pipeline) {
        return None;
    }
    Some((pipeline, humantime::parse_rfc3339(&first.at?).ok()?))
}

impl RunKeys {
    /// Reads a run's folder; `None` when it cannot be read, or is of another pipeline than
    /// the one that is wanted.
    pub(crate) fn read(run_dir: &Path, wanted: Option<&str>) -> Option<Self> {
        let bytes = std::fs::read(run_dir.join(EVENTS)).ok()?;
        let (pipeline, at) = begun(&bytes, wanted)?;
        let mut keys = HashMap::new();
        let mut ok = false;
        for (line, used) in bytes.split(|b| *b == b'\n').filter_map(told) {
            ok |= line.ok;
            // A step that was made again in the same run stands as it ended last.
            keys.extend(used);
        }
        Some(Self {
            pipeline,
            at,
            ok,
            keys,
        })
    }
}

/// A run's events, searched for one step after the other.
#[derive(Debug)]
pub(crate) struct RunLog {
    /// Run id.
    pub(crate) run: String,
    bytes: Vec<u8>,
    /// Steps that were asked for.
    asked: usize,
    /// All of them, once there were many.
    keys: HashMap<String, Used>,
}

impl RunLog {
    /// As [`RunKeys::read`].
    pub(crate) fn read(run_dir: &Path, wanted: &str) -> Option<Self> {
        let bytes = std::fs::read(run_dir.join(EVENTS)).ok()?;
        begun(&bytes, Some(wanted))?;
        Some(Self {
            run: name(run_dir)?,
            bytes,
            asked: 0,
            keys: HashMap::new(),
        })
    }

    /// What a step id used.
    pub(crate) fn used(&mut self, id: &str) -> Option<Used> {
        if self.asked < SEARCHES {
            self.asked += 1;
            return self.search(id);
        }
        let bytes = std::mem::take(&mut self.bytes);
        let lines = bytes.split(|b| *b == b'\n').filter_map(told);
        self.keys.extend(lines.filter_map(|(_, used)| used));
        self.keys.get(id).copied()
    }

    fn search(&self, id: &str) -> Option<Used> {
        let field = format!("\"step\":{}", serde_json::Value::from(id));
        let lines = memmem::find_iter(&self.bytes, &field).filter_map(|at| {
            let start = memrchr(b'\n', &self.bytes[..at]).map_or(0, |end| end + 1);
            let end = memchr(b'\n', &self.bytes[at..])? + at;
            let (_, used) = told(&self.bytes[start..end])?;
            used.filter(|(step, _)| step == id)
        });
        lines.last().map(|(_, used)| used)
    }
}

fn name(run_dir: &Path) -> Option<String> {
    Some(run_dir.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_search_finds_what_reading_it_all_finds() {
        let dir = tempfile::tempdir().unwrap();
        let key = |i: usize| Digest::of_bytes(&i.to_le_bytes());
        let mut text = String::from(
            "{\"event\":\"run_started\",\"pipeline\":\"p\",\"at\":\"2026-01-02T03:04:05Z\"}\n",
        );
        let ids: Vec<String> = (0..2 * SEARCHES)
            .map(|i| format!("s[\"{}\\n\"]", i / 2))
            .collect();
        for (i, id) in ids.iter().enumerate() {
            let status = ["ran", "failed"][i % 3 % 2];
            let step = serde_json::Value::from(id.as_str());
            text += &format!(
                "{{\"event\":\"log\",\"step\":{step},\"key\":\"{}\"}}\n",
                key(0)
            );
            text += &format!(
                "{{\"event\":\"step_finished\",\"step\":{step},\"key\":\"{}\",\"status\":\"{status}\"}}\n",
                key(i)
            );
        }
        // A kill tore the last line.
        text += "{\"event\":\"step_finished\",\"step\":\"s[\\\"0";
        std::fs::write(dir.path().join(EVENTS), text).unwrap();
        let all = RunKeys::read(dir.path(), None).unwrap();
        assert_eq!(all.keys.len(), SEARCHES);
        let mut log = RunLog::read(dir.path(), "p").unwrap();
        for id in ids.iter().chain([&"none".to_owned()]) {
            assert_eq!(log.used(id), all.keys.get(id).copied(), "{id}");
        }
        assert!(RunLog::read(dir.path(), "q").is_none());
    }
}
