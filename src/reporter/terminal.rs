//! A bar per running step on a terminal, and the final table.

use std::collections::BTreeMap;
use std::time::Duration;

use console::style;
use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::pipeline::Pipeline;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::table::Table;
use super::{duration, metric_text};

/// Draws bars on stderr.
pub(crate) struct TerminalReporter {
    bars: MultiProgress,
    running: BTreeMap<String, ProgressBar>,
    width: usize,
    table: Table,
}

impl TerminalReporter {
    pub(super) fn new(pipeline: &Pipeline) -> Self {
        let longest = pipeline.steps.iter().map(|s| s.name.chars().count()).max();
        Self {
            bars: MultiProgress::new(),
            running: BTreeMap::new(),
            width: longest.unwrap_or(0) + 10,
            table: Table::default(),
        }
    }

    #[allow(clippy::print_stderr)]
    pub(super) fn show(&mut self, event: &RunEvent) {
        self.table.fold(event);
        match event {
            RunEvent::StepStarted { step, why, .. } => {
                let bar = self.bars.add(ProgressBar::new_spinner());
                bar.set_style(template("{prefix} {spinner} {elapsed} {msg}"));
                bar.set_prefix(format!("{step:width$}", width = self.width));
                bar.set_message(why.clone());
                bar.enable_steady_tick(Duration::from_millis(120));
                self.running.insert(step.clone(), bar);
            }
            RunEvent::Progress {
                step,
                done,
                total,
                unit,
                text,
            } => {
                if let Some(bar) = self.running.get(step) {
                    if bar.length() != Some(*total) {
                        bar.set_length(*total);
                        let line = "{prefix} {bar:24} {pos}/{len} ETA {eta} {msg}";
                        bar.set_style(template(line));
                    }
                    bar.set_position(*done);
                    bar.set_message(format!("{unit} {text}"));
                }
            }
            RunEvent::StepRetry {
                step,
                attempt,
                wait_ms,
                error,
            } => self.line(&format!(
                "{} {step}: attempt {attempt} failed ({error}), again in {}",
                style("retry").yellow(),
                duration(*wait_ms)
            )),
            RunEvent::Warning { step, text } => {
                let step = step.as_ref().map(|s| format!("{s}: ")).unwrap_or_default();
                self.line(&format!(
                    "{} {step}{text}",
                    style("warning:").yellow().bold()
                ));
            }
            RunEvent::StepFinished {
                step,
                status,
                took_ms,
                why,
                metrics,
                help,
                ..
            } => {
                if let Some(bar) = self.running.remove(step) {
                    bar.finish_and_clear();
                }
                match status {
                    StepStatus::Ran => self.line(&format!(
                        "{} {step} in {} {}",
                        style("ran").green(),
                        duration(*took_ms),
                        style(metric_text(metrics)).dim()
                    )),
                    StepStatus::Failed => {
                        self.line(&format!("{} {step}: {why}", style("failed").red().bold()));
                        if let Some(help) = help {
                            self.line(&format!("  {} {help}", style("help:").cyan()));
                        }
                    }
                    StepStatus::Cached | StepStatus::Skipped => {}
                }
            }
            RunEvent::RunFinished { .. } => eprint!("\n{}", self.table.render()),
            RunEvent::RunStarted { .. } | RunEvent::StepExpanded { .. } => {}
        }
    }

    fn line(&self, text: &str) {
        // When the terminal is gone there is nobody to tell.
        let _ = self.bars.println(text);
    }
}

/// A bar's look; the default where the template is wrong, which a test would show.
fn template(text: &str) -> ProgressStyle {
    ProgressStyle::with_template(text).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use indicatif::ProgressStyle;

    #[test]
    fn the_templates_are_right() {
        for text in [
            "{prefix} {spinner} {elapsed} {msg}",
            "{prefix} {bar:24} {pos}/{len} ETA {eta} {msg}",
        ] {
            assert!(ProgressStyle::with_template(text).is_ok());
        }
    }
}
