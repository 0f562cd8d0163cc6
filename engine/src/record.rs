//! The record of a run: its folder, its events, and the reader that folds them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use crate::event::{OutputInfo, RunEvent, StepStatus};

/// Appends every event to `events.jsonl` as it happens.
#[derive(Debug)]
pub struct RunRecorder {
    file: File,
}

impl RunRecorder {
    /// Starts the record in a run's folder.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(run_dir: &Path) -> std::io::Result<Self> {
        File::create(run_dir.join("events.jsonl")).map(|file| Self { file })
    }

    /// Appends one event.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&mut self, event: &RunEvent) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

/// A run as its events tell it.
#[derive(Debug, Clone, Default)]
pub struct RunRecord {
    /// Run id: the folder's name.
    pub run: String,
    /// Pipeline name.
    pub pipeline: String,
    /// When it began, RFC 3339.
    pub started_at: String,
    /// `None` when the run did not end: it goes on, or was killed.
    pub ok: Option<bool>,
    /// Steps in the order in which they ended.
    pub steps: Vec<StepRecord>,
}

/// A step of a run.
#[derive(Debug, Clone)]
pub struct StepRecord {
    /// Step id.
    pub step: String,
    /// Step kind.
    pub kind: String,
    /// How it ended.
    pub status: StepStatus,
    /// Action key, hex.
    pub key: String,
    /// Milliseconds in this run.
    pub took_ms: u64,
    /// Why it ran, was skipped or failed.
    pub why: String,
    /// Outputs by port.
    pub outputs: BTreeMap<String, OutputInfo>,
    /// Metrics.
    pub metrics: BTreeMap<String, Value>,
}

impl RunRecord {
    /// Reads a run's folder. A last line that was cut off is left out.
    ///
    /// # Errors
    /// When there is no `events.jsonl` to read.
    pub fn load(run_dir: &Path) -> std::io::Result<Self> {
        let file = File::open(run_dir.join("events.jsonl"))?;
        let name = run_dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned());
        let mut record = Self {
            run: name.unwrap_or_default(),
            ..Self::default()
        };
        for line in BufReader::new(file).lines() {
            if let Ok(event) = serde_json::from_str(&line?) {
                record.fold(event);
            }
        }
        Ok(record)
    }

    fn fold(&mut self, event: RunEvent) {
        match event {
            RunEvent::RunStarted { pipeline, at, .. } => {
                self.pipeline = pipeline;
                self.started_at = at;
            }
            RunEvent::StepFinished {
                step,
                kind,
                status,
                key,
                took_ms,
                why,
                outputs,
                metrics,
                ..
            } => self.steps.push(StepRecord {
                step,
                kind,
                status,
                key,
                took_ms,
                why,
                outputs,
                metrics,
            }),
            RunEvent::RunFinished { ok, .. } => self.ok = Some(ok),
            _ => {}
        }
    }
}

/// A run id that sorts by time: `20261124-101500-3fa2`.
#[must_use]
pub fn new_run_id(now: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(now).to_string();
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    let nanos = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    let seed = format!("{nanos}-{}", std::process::id());
    let tail = flowrun_cache::Digest::of_bytes(seed.as_bytes()).to_hex();
    format!("{}-{}-{}", &digits[..8], &digits[8..14], &tail[..4])
}

/// The time as text, UTC, RFC 3339 with milliseconds.
#[must_use]
pub fn timestamp(now: SystemTime) -> String {
    humantime::format_rfc3339_millis(now).to_string()
}

/// The log file of a step.
#[must_use]
pub fn log_path(run_dir: &Path, step: &str) -> PathBuf {
    let name: String = step
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-_.[]".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect();
    run_dir.join("logs").join(format!("{name}.log"))
}
