//! `flowrun show`: a run, or one of its steps with its log.

use std::path::Path;

use console::style;
use flowrun_engine::record::{RunRecord, StepRecord, log_path};
use serde::Serialize;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::reporter::{duration, metric_text, styled_status};
use crate::{output, recorded};

/// A step as `--json` shows it.
#[derive(Serialize)]
struct ShownStep<'a> {
    run: &'a str,
    #[serde(flatten)]
    step: &'a StepRecord,
    log: String,
}

/// Shows a run, or one of its steps. A name that is no run but a step of the last run means it.
pub(crate) fn show(
    run: Option<&str>,
    step: Option<&str>,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let (dir, record, step) = match (recorded::find(run, global), run, step) {
        (Ok((dir, record)), _, step) => (dir, record, step),
        (Err(failure), Some(name), None) => {
            let Ok((dir, record)) = recorded::find(None, global) else {
                return Err(failure);
            };
            if record.step(name).is_none() {
                return Err(failure);
            }
            (dir, record, Some(name))
        }
        (Err(failure), ..) => return Err(failure),
    };
    match step {
        None if global.json => output::json(&record),
        None => output::print(&run_text(&record, &dir)),
        Some(id) => show_step(&record, &dir, id, global),
    }
}

fn show_step(
    record: &RunRecord,
    dir: &Path,
    id: &str,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let found = record.step(id).ok_or_else(|| {
        let ids: Vec<&str> = record.steps.iter().map(|s| s.step.as_str()).collect();
        let run = &record.run;
        Failure::usage(format!(
            "the run {run} has no step `{id}`; it has {}",
            ids.join(", ")
        ))
    })?;
    let log = std::fs::read(log_path(dir, id)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).into_owned();
    if global.json {
        return output::json(&ShownStep {
            run: &record.run,
            step: found,
            log,
        });
    }
    output::print(&step_text(found, &log))
}

fn run_text(record: &RunRecord, dir: &Path) -> String {
    let end = match record.ok {
        Some(true) => style("ok").green(),
        Some(false) => style("failed").red(),
        None => style("did not end, or goes on").yellow(),
    };
    let took = record.took_ms.map(|ms| format!(" in {}", duration(ms)));
    let mut out = format!(
        "{}  {}  {}  {end}{}\n",
        record.run,
        record.pipeline,
        record.started_at,
        took.unwrap_or_default()
    );
    let width = record.steps.iter().map(|s| s.step.chars().count()).max();
    let width = width.unwrap_or(0);
    for step in &record.steps {
        let line = format!(
            "{} {:width$} {:>12}  {}",
            styled_status(step.status),
            step.step,
            duration(step.took_ms),
            metric_text(&step.metrics)
        );
        out.push_str(line.trim_end());
        out.push('\n');
    }
    for (step, kind) in &record.running {
        out.push_str(&format!("began   {step} ({kind})\n"));
    }
    for (step, text) in &record.warnings {
        let step = step.as_ref().map(|s| format!("{s}: ")).unwrap_or_default();
        out.push_str(&format!("warning: {step}{text}\n"));
    }
    if dir.join("report.html").is_file() {
        out.push_str(&format!("report: {}\n", dir.join("report.html").display()));
    }
    out
}

fn step_text(step: &StepRecord, log: &str) -> String {
    let mut out = format!(
        "{} {} ({}) in {}: {}\n",
        styled_status(step.status),
        step.step,
        step.kind,
        duration(step.took_ms),
        step.why
    );
    if let Some(help) = &step.help {
        out.push_str(&format!("help: {help}\n"));
    }
    if !step.key.is_empty() {
        out.push_str(&format!("key {}\n", step.key));
    }
    for (port, output) in &step.outputs {
        let line = format!(
            "output {port}: {} {} {}",
            output.ty, output.digest, output.path
        );
        out.push_str(&format!("{}\n", line.trim_end()));
    }
    for (name, value) in &step.metrics {
        out.push_str(&format!("metric {name}: {value}\n"));
    }
    if !log.is_empty() {
        out.push_str(&format!("log:\n{log}"));
    }
    out
}
