//! [`Document`]: what hooks are told of a run, as one JSON object.

use std::collections::BTreeMap;
use std::path::PathBuf;

use flowrun_engine::event::StepStatus;
use flowrun_engine::hook::HookEvent;
use flowrun_engine::record::RunRecord;
use flowrun_engine::run::RunSummary;
use flowrun_engine::step::StepErrorKind;
use serde::Serialize;
use serde_json::Value;

/// Version of the object. Fields may be added without another one.
const VERSION: u32 = 1;
/// Steps of a large run that are told one by one.
const STEPS: usize = 100;

/// What is told of a run.
#[derive(Debug, Serialize)]
pub(super) struct Document {
    version: u32,
    run: String,
    pipeline: String,
    pub(super) status: &'static str,
    ok: bool,
    started_at: String,
    took_ms: u64,
    ran: usize,
    cached: usize,
    failed: usize,
    skipped: usize,
    pub(super) run_dir: PathBuf,
    /// The first steps that failed.
    failures: Vec<StepFailure>,
    /// Metrics of the first steps that have some.
    metrics: BTreeMap<String, BTreeMap<String, Value>>,
}

#[derive(Debug, Serialize)]
struct StepFailure {
    step: String,
    kind: String,
    why: String,
    help: Option<String>,
}

/// The object as one hook gets it.
#[derive(Serialize)]
struct Addressed<'a> {
    hook: &'a str,
    event: HookEvent,
    #[serde(flatten)]
    document: &'a Document,
}

impl Document {
    /// What is told of a run that ended.
    pub(super) fn of(summary: &RunSummary) -> Self {
        // Without its record there is the summary still.
        let record = RunRecord::load(&summary.run_dir).unwrap_or_default();
        let failed = record.steps.iter();
        let failed = failed.filter(|step| step.status == StepStatus::Failed);
        let measured = record.steps.iter().filter(|s| !s.metrics.is_empty());
        Self {
            version: VERSION,
            run: summary.run_id.clone(),
            pipeline: record.pipeline.clone(),
            status: status(summary),
            ok: summary.ok,
            started_at: record.started_at.clone(),
            took_ms: record.took_ms.unwrap_or_default(),
            ran: summary.ran,
            cached: summary.cached,
            failed: summary.failed,
            skipped: summary.skipped,
            run_dir: std::path::absolute(&summary.run_dir)
                .unwrap_or_else(|_| summary.run_dir.clone()),
            failures: failed
                .take(STEPS)
                .map(|step| StepFailure {
                    step: step.step.clone(),
                    kind: step.kind.clone(),
                    why: step.why.clone(),
                    help: step.help.clone(),
                })
                .collect(),
            metrics: measured
                .take(STEPS)
                .map(|step| (step.step.clone(), step.metrics.clone()))
                .collect(),
        }
    }

    pub(super) fn run(&self) -> &str {
        &self.run
    }

    pub(super) fn pipeline(&self) -> &str {
        &self.pipeline
    }

    /// The object as a hook gets it.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub(super) fn bytes(&self, hook: &str, event: HookEvent) -> Result<Vec<u8>, String> {
        let addressed = Addressed {
            hook,
            event,
            document: self,
        };
        let mut bytes = serde_json::to_vec(&addressed)
            .map_err(|e| format!("what happened cannot be written as JSON: {e}"))?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// How the run ended, in a word; the exit codes are 0, 130, 5 and 4.
fn status(summary: &RunSummary) -> &'static str {
    match &summary.first_error {
        _ if summary.ok => "ok",
        _ if summary.interrupted => "interrupted",
        Some((_, error)) if error.kind == StepErrorKind::Gate => "gate-failed",
        _ => "failed",
    }
}

/// The event's name, as in the object.
pub(super) fn event_name(event: HookEvent) -> &'static str {
    match event {
        HookEvent::Finished => "finished",
        HookEvent::Failed => "failed",
    }
}
