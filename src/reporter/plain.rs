//! Plain lines on stderr, for pipes and logs.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use flowrun_engine::event::{RunEvent, StepStatus};

use super::table::Table;
use super::{duration, metric_text, status_word, uploaded, uploading};

/// How often a step that goes on says so.
const PROGRESS_EVERY: Duration = Duration::from_secs(15);

/// Prints a line per step, and the final table.
pub(crate) struct PlainReporter {
    quiet: bool,
    verbose: bool,
    table: Table,
    last: BTreeMap<String, Instant>,
    /// Lines that were not printed yet.
    said: String,
}

impl PlainReporter {
    pub(super) fn new(quiet: bool, verbose: bool) -> Self {
        Self {
            quiet,
            verbose,
            table: Table::default(),
            last: BTreeMap::new(),
            said: String::new(),
        }
    }

    pub(super) fn show(&mut self, event: &RunEvent) {
        self.table.fold(event);
        let line = match event {
            RunEvent::StepStarted { step, why, .. } => Some(format!("{step}: started ({why})")),
            RunEvent::Progress {
                step,
                done,
                total,
                unit,
                text,
            } => {
                let last = self.last.entry(step.clone()).or_insert_with(Instant::now);
                (last.elapsed() >= PROGRESS_EVERY).then(|| {
                    *last = Instant::now();
                    format!("{step}: {done}/{total} {unit} {text}")
                })
            }
            RunEvent::StepRetry {
                step,
                attempt,
                wait_ms,
                error,
            } => Some(format!(
                "{step}: attempt {attempt} failed ({error}), again in {}",
                duration(*wait_ms)
            )),
            RunEvent::StepFinished {
                step,
                status,
                took_ms,
                metrics,
                ..
            } if *status == StepStatus::Ran || self.verbose => {
                let word = status_word(*status);
                Some(format!(
                    "{step}: {word} in {} {}",
                    duration(*took_ms),
                    metric_text(metrics)
                ))
            }
            RunEvent::Uploading { .. } => {
                let last = self.last.entry(String::new()).or_insert_with(Instant::now);
                (last.elapsed() >= PROGRESS_EVERY).then(|| {
                    *last = Instant::now();
                    uploading(event)
                })
            }
            RunEvent::Uploaded { .. } => Some(uploaded(event)),
            _ => None,
        };
        if let Some(line) = line.filter(|_| !self.quiet) {
            self.say(line.trim_end());
        }
        match event {
            RunEvent::Warning { step, text } => {
                let step = step.as_ref().map(|s| format!("{s}: ")).unwrap_or_default();
                self.say(&format!("warning: {step}{text}"));
            }
            RunEvent::StepFinished {
                step,
                status: StepStatus::Failed,
                why,
                help,
                ..
            } => {
                self.say(&format!("error: {step}: {why}"));
                if let Some(help) = help {
                    self.say(&format!("  help: {help}"));
                }
            }
            RunEvent::RunFinished { .. } if !self.quiet => {
                let table = self.table.render(None);
                self.say(table.trim_end());
            }
            _ => {}
        }
    }

    fn say(&mut self, line: &str) {
        self.said.push_str(line);
        self.said.push('\n');
    }

    /// Prints what was said, in one piece: stderr is not buffered. A terminal that went away does
    /// not stop the run.
    pub(super) fn flush(&mut self) {
        if !self.said.is_empty() {
            let _ = std::io::stderr().write_all(self.said.as_bytes());
            self.said.clear();
        }
    }
}
