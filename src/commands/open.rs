//! `flowrun open`: the report of a run.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flowrun_cache::CacheReader;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::{output, recorded};

/// Prints the path of a run's report, and opens it where a person at a desktop can see it.
pub(crate) fn open(run: Option<&str>, global: &GlobalArgs) -> Result<Exit, Failure> {
    let report = find(run, global)?;
    let report = std::path::absolute(&report)?;
    if global.json {
        return output::json(&serde_json::json!({ "report": report }));
    }
    output::print(&format!("{}\n", report.display()))?;
    if std::io::stdout().is_terminal() {
        show(&report);
    }
    Ok(Exit::Ok)
}

fn find(run: Option<&str>, global: &GlobalArgs) -> Result<PathBuf, Failure> {
    let report = |dir: PathBuf| Some(dir.join("report.html")).filter(|path| path.is_file());
    if let Some(name) = run {
        let dir = recorded::find_dir(Some(name), global)?;
        let text = format!(
            "the run {} has no report; `flowrun show {name}` shows it",
            dir.file_name().unwrap_or_default().display()
        );
        return report(dir).ok_or_else(|| Failure::usage(text));
    }
    let runs = CacheReader::open(&global.cache_dir).runs();
    runs.into_iter().find_map(report).ok_or_else(|| {
        Failure::usage(
            "no run has a report: a step of kind `report` makes it; `flowrun show` shows the last run",
        )
    })
}

/// Starts the browser, if there is one; that it does not start is no failure: the path is printed.
fn show(report: &Path) {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let program = match set("BROWSER") {
        Some(browser) => browser,
        None if cfg!(target_os = "macos") => "open".into(),
        None if set("DISPLAY").is_some() || set("WAYLAND_DISPLAY").is_some() => "xdg-open".into(),
        None => return,
    };
    let started = Command::new(program)
        .arg(report)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    drop(started);
}
