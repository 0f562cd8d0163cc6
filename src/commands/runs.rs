//! `flowrun runs` and `flowrun show`: the history, read without the cache's lock.

use std::path::Path;

use flowrun_cache::CacheReader;
use flowrun_engine::event::StepStatus;
use flowrun_engine::record::{RunRecord, StepRecord, log_path};

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::reporter::{duration, metric_text, status_word};
use crate::surroundings::find_run;

/// Lists the runs.
#[allow(clippy::print_stdout)]
pub(crate) fn runs(global: &GlobalArgs) -> Result<Exit, Failure> {
    for dir in CacheReader::open(&global.cache_dir).runs() {
        let Ok(record) = RunRecord::load(&dir) else {
            continue;
        };
        if global.json {
            println!(
                "{}",
                serde_json::to_string(&record).map_err(std::io::Error::from)?
            );
            continue;
        }
        let end = match record.ok {
            Some(true) => "ok",
            Some(false) => "failed",
            None => "not ended",
        };
        let count = |status| record.steps.iter().filter(|s| s.status == status).count();
        println!(
            "{}  {:16} {end:10} ran {}, cached {}, failed {}{}",
            record.run,
            record.pipeline,
            count(StepStatus::Ran),
            count(StepStatus::Cached),
            count(StepStatus::Failed),
            record
                .took_ms
                .map(|ms| format!(", {}", duration(ms)))
                .unwrap_or_default()
        );
    }
    Ok(Exit::Ok)
}

/// Shows a run, or one of its steps.
#[allow(clippy::print_stdout)]
pub(crate) fn show(
    run: Option<&str>,
    step: Option<&str>,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let (dir, record) = find_run(run, global)?;
    if let Some(id) = step {
        let found = record.step(id).ok_or_else(|| {
            let ids: Vec<&str> = record.steps.iter().map(|s| s.step.as_str()).collect();
            Failure::usage(format!(
                "the run has no step `{id}`; it has {}",
                ids.join(", ")
            ))
        })?;
        show_step(found, &dir);
        return Ok(Exit::Ok);
    }
    println!("{} {} {}", record.run, record.pipeline, record.started_at);
    for step in &record.steps {
        println!(
            "{:8} {:28} {:>9}  {}",
            status_word(step.status),
            step.step,
            duration(step.took_ms),
            metric_text(&step.metrics)
        );
    }
    for (step, text) in &record.warnings {
        println!(
            "warning: {}{text}",
            step.as_ref().map(|s| format!("{s}: ")).unwrap_or_default()
        );
    }
    Ok(Exit::Ok)
}

#[allow(clippy::print_stdout)]
fn show_step(step: &StepRecord, dir: &Path) {
    println!(
        "{} ({}): {}, {}",
        step.step,
        step.kind,
        status_word(step.status),
        step.why
    );
    println!("key {}", step.key);
    for (port, output) in &step.outputs {
        println!(
            "output {port}: {} {} {}",
            output.ty, output.digest, output.path
        );
    }
    for (name, value) in &step.metrics {
        println!("metric {name}: {value}");
    }
    if let Ok(log) = std::fs::read_to_string(log_path(dir, &step.step)) {
        print!("{log}");
    }
}
