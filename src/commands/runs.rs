//! `flowrun runs`: the history, read without the cache's lock.

use console::style;
use flowrun_cache::CacheReader;
use flowrun_engine::event::StepStatus;
use flowrun_engine::record::RunRecord;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::output;
use crate::reporter::duration;

/// Lists the runs.
pub(crate) fn runs(limit: usize, global: &GlobalArgs) -> Result<Exit, Failure> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    let dirs = CacheReader::open(&global.cache_dir).runs();
    let records = dirs.iter().filter_map(|dir| RunRecord::load(dir).ok());
    let records: Vec<RunRecord> = records.take(limit).collect();
    if global.json {
        for record in &records {
            output::json(record)?;
        }
        return Ok(Exit::Ok);
    }
    let width = records.iter().map(|r| r.pipeline.chars().count()).max();
    let mut out = String::new();
    for record in &records {
        out.push_str(&line(record, width.unwrap_or(0)));
    }
    if records.is_empty() {
        out = format!("{} holds no run yet\n", global.cache_dir.display());
    } else if records.len() == limit && limit < dirs.len() {
        out.push_str("older ones: flowrun runs -n 0\n");
    }
    output::print(&out)
}

fn line(record: &RunRecord, width: usize) -> String {
    let end = match record.ok {
        Some(true) => style("ok      ").green(),
        Some(false) => style("failed  ").red(),
        None => style("no end  ").yellow(),
    };
    let count = |status| record.steps.iter().filter(|s| s.status == status).count();
    let counts = [
        ("ran", count(StepStatus::Ran)),
        ("cached", count(StepStatus::Cached)),
        ("failed", count(StepStatus::Failed)),
        ("skipped", count(StepStatus::Skipped)),
    ];
    let counts: Vec<String> = counts
        .iter()
        .filter(|(_, n)| *n > 0)
        .map(|(word, n)| format!("{n} {word}"))
        .collect();
    let took = record.took_ms.map(duration).unwrap_or_default();
    let line = format!(
        "{}  {:width$}  {end} {took:>12}  {}",
        record.run,
        record.pipeline,
        counts.join(", ")
    );
    format!("{}\n", line.trim_end())
}
