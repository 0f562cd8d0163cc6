//! The record of a run: its folder, its events, and the reader that folds them.
//!
//! `plan.json` says what was asked, `events.jsonl` what happened: one event a
//! line, appended as it happens, so a run that is killed leaves all but the
//! last line whole. A reader skips what it does not understand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use flowrun_cache::Digest;
pub(crate) use flowrun_cache::archive::REPLACED;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::event::{OutputInfo, ResultFrom, RunEvent, StepStatus};
use crate::pipeline::{ForeachList, Source, StepNode};

/// Version of [`RunPlan`].
pub const PLAN_VERSION: u32 = 1;
/// Bytes of a log file's name before its ending.
const LOG_NAME: usize = 100;

/// What a run was asked to do: `plan.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunPlan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// Run id.
    pub run: String,
    /// Pipeline name.
    pub pipeline: String,
    /// The pipeline's file.
    pub file: PathBuf,
    /// Profiles applied.
    pub profiles: Vec<String>,
    /// Params after profiles and `--set`.
    pub params: BTreeMap<String, Value>,
    /// Steps that took part, in topological order.
    pub steps: Vec<PlanStep>,
}

/// One step in [`RunPlan`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanStep {
    /// Name.
    pub step: String,
    /// Kind.
    pub kind: String,
    /// Steps before it.
    pub after: Vec<String>,
    /// Input port to where its artifacts come from, in order.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, Vec<PlanSource>>,
    /// It was to run even if fresh.
    pub forced: bool,
}

/// Where an input comes from, in [`PlanStep`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlanSource {
    /// An output of a step: `step.output`.
    Output(String),
    /// A file or folder of the project.
    File(PathBuf),
    /// The value of a `foreach` variable, and what the variable walks.
    Item(String, Vec<PlanSource>),
}

impl PlanSource {
    /// The sources of a checked step.
    #[must_use]
    pub fn of(step: &StepNode) -> BTreeMap<String, Vec<Self>> {
        let all = |sources: &[Source]| sources.iter().map(|s| Self::one(step, s)).collect();
        let ports = step.inputs.iter();
        ports.map(|(port, s)| (port.clone(), all(s))).collect()
    }

    fn one(step: &StepNode, source: &Source) -> Self {
        match source {
            Source::Output { step, output } | Source::Sibling { step, output, .. } => {
                Self::Output(format!("{step}.{output}"))
            }
            Source::File(path) => Self::File(path.clone()),
            Source::Item(var) => {
                let walked = step.foreach.as_ref().and_then(|f| f.list(var));
                let walked = match walked {
                    Some(ForeachList::Artifacts(sources)) => {
                        sources.iter().map(|s| Self::one(step, s)).collect()
                    }
                    Some(ForeachList::Values(_) | ForeachList::PerItem(_)) | None => Vec::new(),
                };
                Self::Item(var.clone(), walked)
            }
        }
    }
}

/// Writes a run's folder.
#[derive(Debug)]
pub struct RunRecorder {
    file: File,
}

impl RunRecorder {
    /// Starts the record in a run's folder.
    ///
    /// # Errors
    /// When the files cannot be made.
    pub fn create(run_dir: &Path, plan: &RunPlan) -> std::io::Result<Self> {
        let mut text = serde_json::to_vec(plan)?;
        text.push(b'\n');
        Self::with_plan(run_dir, &[&text])
    }

    /// The same with the text of a plan, in pieces.
    pub(crate) fn with_plan(run_dir: &Path, text: &[&[u8]]) -> std::io::Result<Self> {
        let mut plan = File::create(run_dir.join("plan.json"))?;
        text.iter().try_for_each(|piece| plan.write_all(piece))?;
        File::create(run_dir.join("events.jsonl")).map(|file| Self { file })
    }

    /// Appends events, in as few writes as can be.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn append(&mut self, events: &[RunEvent]) -> std::io::Result<()> {
        let mut lines = Vec::new();
        for event in events {
            if let RunEvent::Recorded { lines: earlier } = event {
                self.file.write_all(&lines)?;
                self.file.write_all(earlier)?;
                lines.clear();
                continue;
            }
            if matches!(event, RunEvent::Span { .. }) {
                continue;
            }
            serde_json::to_writer(&mut lines, event)?;
            lines.push(b'\n');
        }
        self.file.write_all(&lines)
    }
}

/// Removes the folder of a run that did nothing and could not write its record: it tells nobody
/// anything.
pub(crate) fn discard(run_dir: &Path) {
    // What stays is passed over by whoever looks for a run.
    let _ = std::fs::remove_dir_all(run_dir);
}

/// A run as its events tell it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RunRecord {
    /// Run id: the folder's name.
    pub run: String,
    /// Pipeline name.
    pub pipeline: String,
    /// When it began, RFC 3339.
    pub started_at: String,
    /// `None` when the run did not end: it goes on, or was killed.
    pub ok: Option<bool>,
    /// Milliseconds in all, once it ended.
    pub took_ms: Option<u64>,
    /// Steps in the order in which they ended. A step that was made again in
    /// the same run stands once, as it ended last.
    pub steps: Vec<StepRecord>,
    /// Steps that began and did not end, with their kind.
    pub running: BTreeMap<String, String>,
    /// Warnings, with the step if one is concerned.
    pub warnings: Vec<(Option<String>, String)>,
}

/// A step of a run.
#[derive(Debug, Clone, Serialize)]
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
    /// The error's advice.
    pub help: Option<String>,
    /// Where a cached result came from, when it was not here.
    pub from: Option<ResultFrom>,
}

impl RunRecord {
    /// Reads a run's folder. Lines that are damaged or cut off are left out.
    ///
    /// # Errors
    /// When there is no `events.jsonl` to read.
    pub fn load(run_dir: &Path) -> std::io::Result<Self> {
        let bytes = std::fs::read(run_dir.join("events.jsonl"))?;
        let name = run_dir.file_name().unwrap_or_default();
        let mut record = Self {
            run: name.to_string_lossy().into_owned(),
            ..Self::default()
        };
        let mut places = BTreeMap::new();
        for line in bytes.split(|b| *b == b'\n') {
            if let Ok(event) = serde_json::from_slice(line) {
                record.fold(event, &mut places);
            }
        }
        Ok(record)
    }

    /// What the run was asked to do.
    ///
    /// # Errors
    /// When `plan.json` cannot be read, or is of a version that is not known.
    pub fn load_plan(run_dir: &Path) -> std::io::Result<RunPlan> {
        let plan: RunPlan = serde_json::from_slice(&std::fs::read(run_dir.join("plan.json"))?)?;
        if plan.version == PLAN_VERSION {
            return Ok(plan);
        }
        let text = format!("version {} of `plan.json` is not known", plan.version);
        Err(std::io::Error::other(text))
    }

    /// It tells of a run: that it began, or of a step. A run that could not write its record, or was
    /// killed before, leaves none that does.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        !self.started_at.is_empty() || !self.steps.is_empty()
    }

    /// A step by its id.
    #[must_use]
    pub fn step(&self, id: &str) -> Option<&StepRecord> {
        self.steps.iter().find(|s| s.step == id)
    }

    fn fold(&mut self, event: RunEvent, places: &mut BTreeMap<String, usize>) {
        match event {
            RunEvent::RunStarted { pipeline, at, .. } => {
                self.pipeline = pipeline;
                self.started_at = at;
            }
            RunEvent::StepStarted { step, kind, .. } => {
                self.running.insert(step, kind);
            }
            RunEvent::Warning { step, text } => self.warnings.push((step, text)),
            RunEvent::StepFinished {
                step,
                kind,
                status,
                key,
                took_ms,
                why,
                outputs,
                metrics,
                help,
                from,
            } => {
                self.running.remove(&step);
                let record = StepRecord {
                    step,
                    kind,
                    status,
                    key,
                    took_ms,
                    why,
                    outputs,
                    metrics,
                    help,
                    from,
                };
                match places.get(&record.step) {
                    Some(&place) => self.steps[place] = record,
                    None => {
                        places.insert(record.step.clone(), self.steps.len());
                        self.steps.push(record);
                    }
                }
            }
            RunEvent::RunFinished { ok, took_ms, .. } => {
                self.ok = Some(ok);
                self.took_ms = Some(took_ms);
            }
            RunEvent::StepExpanded { .. }
            | RunEvent::Recorded { .. }
            | RunEvent::Span { .. }
            | RunEvent::Progress { .. }
            | RunEvent::StepRetry { .. }
            | RunEvent::Uploading { .. }
            | RunEvent::Uploaded { .. } => {}
        }
    }
}

/// A run id that sorts by time: `20261124-101500-3fa2`. The last part counts
/// the 65,536 parts of the second; one cache has one run at a time.
#[must_use]
pub fn new_run_id(now: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(now).to_string();
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    let nanos = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.subsec_nanos());
    let part = (u64::from(nanos) << 16) / 1_000_000_000;
    format!("{}-{}-{part:04x}", &digits[..8], &digits[8..14])
}

/// A run id that sorts after `newest`, also when the clock was set back.
#[must_use]
pub fn next_run_id(now: SystemTime, newest: Option<&str>) -> String {
    let id = new_run_id(now);
    match newest.filter(|newest| **newest >= *id).and_then(successor) {
        Some(later) => later,
        None => id,
    }
}

/// The smallest run id after this one; `None` when it is none.
fn successor(id: &str) -> Option<String> {
    let (second, part) = id.rsplit_once('-')?;
    let part = u16::from_str_radix(part, 16).ok()?;
    if let Some(part) = part.checked_add(1) {
        return Some(format!("{second}-{part:04x}"));
    }
    let at = |range| second.get(range);
    let text = format!(
        "{}-{}-{}T{}:{}:{}Z",
        at(0..4)?,
        at(4..6)?,
        at(6..8)?,
        at(9..11)?,
        at(11..13)?,
        at(13..15)?
    );
    let time = humantime::parse_rfc3339(&text).ok()?;
    Some(new_run_id(time + Duration::from_secs(1)))
}

/// The time as text, UTC, RFC 3339 with milliseconds.
#[must_use]
pub fn timestamp(now: SystemTime) -> String {
    humantime::format_rfc3339_millis(now).to_string()
}

/// The log file of a step.
#[must_use]
pub fn log_path(run_dir: &Path, step: &str) -> PathBuf {
    let name = file_name(step, LOG_NAME);
    run_dir.join("logs").join(format!("{name}.log"))
}

/// A text as a file name of at most `max` bytes. Texts that need a change get
/// the start of their digest, so that two of them never meet.
pub(crate) fn file_name(text: &str, max: usize) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.[]#".contains(c);
    let mut name = String::new();
    for c in text.chars().map(|c| if plain(c) { c } else { '_' }) {
        if name.len() + c.len_utf8() > max {
            break;
        }
        name.push(c);
    }
    if name == text && !name.starts_with('.') {
        return name;
    }
    format!("{name}-{}", Digest::of_bytes(text.as_bytes()).short())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {

    use super::*;

    fn finished(step: &str, status: StepStatus) -> RunEvent {
        RunEvent::StepFinished {
            step: step.into(),
            kind: "k".into(),
            status,
            key: String::new(),
            took_ms: 1,
            why: String::new(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            help: None,
            from: None,
        }
    }

    fn events() -> Vec<RunEvent> {
        let started = |step: &str| RunEvent::StepStarted {
            step: step.into(),
            kind: "k".into(),
            key: String::new(),
            why: "never ran".into(),
        };
        vec![
            RunEvent::RunStarted {
                run: "r".into(),
                pipeline: "p".into(),
                steps: 2,
                at: "2026".into(),
            },
            finished("a", StepStatus::Cached),
            started("b"),
            finished("a", StepStatus::Ran),
            started("c"),
            finished("b", StepStatus::Failed),
            RunEvent::RunFinished {
                ok: false,
                ran: 1,
                cached: 0,
                failed: 1,
                skipped: 0,
                run_dir: "d".into(),
                took_ms: 7,
            },
        ]
    }

    #[test]
    fn a_record_folds_its_events_and_survives_any_cut() {
        let dir = tempfile::tempdir().unwrap();
        let plan = RunPlan {
            version: PLAN_VERSION,
            run: "r".into(),
            ..RunPlan::default()
        };
        let mut recorder = RunRecorder::create(dir.path(), &plan).unwrap();
        recorder.append(&events()).unwrap();
        assert_eq!(RunRecord::load_plan(dir.path()).unwrap(), plan);
        let record = RunRecord::load(dir.path()).unwrap();
        let ended: Vec<_> = record.steps.iter().map(|s| (&*s.step, s.status)).collect();
        assert_eq!(ended, [("a", StepStatus::Ran), ("b", StepStatus::Failed)]);
        assert_eq!(record.running.keys().collect::<Vec<_>>(), ["c"]);
        assert_eq!((record.ok, record.took_ms), (Some(false), Some(7)));
        let path = dir.path().join("events.jsonl");
        let bytes = std::fs::read(&path).unwrap();
        let begun = bytes.iter().position(|b| *b == b'\n').unwrap();
        for at in 0..bytes.len() - 1 {
            std::fs::write(&path, &bytes[..at]).unwrap();
            let record = RunRecord::load(dir.path()).unwrap();
            assert_eq!(record.ok, None, "cut at {at}");
            assert_eq!(record.has_begun(), at >= begun, "cut at {at}");
        }
    }

    #[test]
    fn another_version_of_the_plan_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        RunRecorder::create(dir.path(), &RunPlan::default()).unwrap();
        let error = RunRecord::load_plan(dir.path()).unwrap_err();
        assert_eq!(error.to_string(), "version 0 of `plan.json` is not known");
    }

    #[test]
    fn run_ids_sort_by_time() {
        let at = |ms| new_run_id(SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
        assert_eq!(at(1_795_515_300_500), "20261124-101500-8000");
        assert!(at(1_795_515_300_998) < at(1_795_515_300_999));
        assert!(at(1_795_515_300_999) < at(1_795_515_301_000));
    }

    #[test]
    fn a_run_id_sorts_after_the_newest_although_the_clock_was_set_back() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_515_300_500);
        let next = |newest| next_run_id(now, newest);
        assert_eq!(next(None), "20261124-101500-8000");
        assert_eq!(next(Some("20261124-101459-ffff")), next(None));
        assert_eq!(next(Some("20261124-101500-8000")), "20261124-101500-8001");
        assert_eq!(next(Some("20271231-235959-ffff")), "20280101-000000-0000");
        assert_eq!(next(Some("not-a-run")), next(None));
    }

    #[test]
    fn log_names_are_safe_short_and_distinct() {
        let dir = Path::new("/r");
        let name = |step: &str| log_path(dir, step);
        assert_eq!(name("a[b-1]"), Path::new("/r/logs/a[b-1].log"));
        let odd = [
            "a[../x]".to_owned(),
            "a[.._x]".to_owned(),
            "é".repeat(200),
            "é".repeat(201),
            "..".to_owned(),
        ];
        let names: std::collections::BTreeSet<PathBuf> = odd.iter().map(|s| name(s)).collect();
        assert_eq!(names.len(), odd.len());
        for path in names {
            assert_eq!(path.parent(), Some(Path::new("/r/logs")));
            assert!(path.file_name().unwrap().len() < 130);
        }
    }
}
