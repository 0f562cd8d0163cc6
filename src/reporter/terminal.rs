//! What runs now, on a terminal: a line for the run, a line for each step under way, and the
//! final table. Finished steps scroll away above.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use console::{Term, pad_str, style, truncate_str};
use flowrun_engine::event::{RunEvent, StepStatus};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::table::Table;
use super::{Earlier, duration, metric_text, uploaded, uploading};
use crate::output::count;

/// Columns of a step's name.
const NAME: usize = 26;
/// Rows of the terminal that are left to what is above the bars.
const ABOVE: usize = 6;
/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(120);

const RUN: &str = "{bar:26.green} {pos}/{len} {msg}, {elapsed}";
const SPINNER: &str = "{prefix} {spinner} {elapsed} {wide_msg:.dim}";
const BAR: &str = "{prefix} {bar:16.cyan} {pos}/{len} {wide_msg}";

/// Draws bars on stderr.
pub(crate) struct TerminalReporter {
    bars: MultiProgress,
    /// All steps and items, as far as they are known.
    run: ProgressBar,
    running: BTreeMap<String, Running>,
    /// Under way, but there is no room for a line: since when, and why.
    hidden: BTreeMap<String, (Instant, String)>,
    earlier: Earlier,
    /// Steps and items that ended.
    ended: BTreeSet<String>,
    failed: usize,
    table: Table,
}

struct Running {
    since: Instant,
    bar: ProgressBar,
    /// Total and unit of the phase that it is in.
    phase: (u64, String),
}

impl TerminalReporter {
    pub(super) fn new(earlier: Earlier) -> Self {
        let bars = MultiProgress::new();
        let run = bars.add(ProgressBar::new(0).with_style(template(RUN)));
        Self {
            bars,
            run,
            running: BTreeMap::new(),
            hidden: BTreeMap::new(),
            earlier,
            ended: BTreeSet::new(),
            failed: 0,
            table: Table::default(),
        }
    }

    /// The bars, for what is to be said above them.
    pub(super) fn bars(&self) -> MultiProgress {
        self.bars.clone()
    }

    #[allow(clippy::print_stderr)]
    pub(super) fn show(&mut self, event: &RunEvent) {
        self.table.fold(event);
        match event {
            RunEvent::RunStarted { steps, .. } => self.run.set_length(*steps as u64),
            RunEvent::StepExpanded { items, .. } => {
                let more = (items.len() as u64).saturating_sub(1);
                self.run.inc_length(more);
            }
            RunEvent::StepStarted { step, why, .. } => self.started(step, why, Instant::now()),
            RunEvent::Progress {
                step,
                done,
                total,
                unit,
                text,
            } => self.progress(step, (*done, *total), unit, text),
            RunEvent::StepRetry {
                step,
                attempt,
                wait_ms,
                error,
            } => self.line(&format!(
                "{} {step}: attempt {attempt} failed ({error}), again in {}",
                style("retry  ").for_stderr().yellow(),
                duration(*wait_ms)
            )),
            RunEvent::Warning { step, text } => {
                let step = step.as_ref().map(|s| format!("{s}: ")).unwrap_or_default();
                self.line(&format!(
                    "{} {step}{text}",
                    style("warning").for_stderr().yellow().bold()
                ));
            }
            RunEvent::StepFinished { step, .. } => {
                self.finished(step);
                self.ended(event);
            }
            RunEvent::Recorded { lines } => {
                let lines = lines.iter().filter(|b| **b == b'\n').count();
                self.run.inc(lines as u64);
            }
            RunEvent::Span { .. } => {}
            RunEvent::Uploading { .. } => self.run.set_message(uploading(event)),
            RunEvent::Uploaded { .. } => self.line(&uploaded(event)),
            RunEvent::RunFinished { .. } => {
                self.run.finish_and_clear();
                eprint!("\n{}", self.table.render(Some(columns())));
            }
        }
    }

    fn started(&mut self, step: &str, why: &str, since: Instant) {
        let (rows, _) = Term::stderr().size();
        if self.running.len() + ABOVE >= usize::from(rows) {
            let hidden = (since, why.to_owned());
            self.hidden.insert(step.to_owned(), hidden);
        } else {
            let earlier = self.earlier.took(step);
            let earlier = earlier.map(|ms| format!("last time {}, ", duration(ms)));
            let bar = ProgressBar::new_spinner().with_elapsed(since.elapsed());
            let bar = self.bars.add(bar);
            bar.set_style(template(SPINNER));
            let name = truncate_str(step, NAME, "…");
            let name = pad_str(&name, NAME, console::Alignment::Left, None);
            bar.set_prefix(name.into_owned());
            bar.set_message(format!(
                "{}{}",
                earlier.unwrap_or_default(),
                first_line(why)
            ));
            bar.enable_steady_tick(TICK);
            let phase = (0, String::new());
            self.running
                .insert(step.to_owned(), Running { since, bar, phase });
        }
        self.summarise();
    }

    fn progress(&mut self, step: &str, (done, total): (u64, u64), unit: &str, text: &str) {
        let Some(running) = self.running.get_mut(step) else {
            return;
        };
        let bar = &running.bar;
        if total == 0 {
            bar.set_message(format!("{done} {unit} {text}"));
            return;
        }
        // Another phase is timed anew: its units take their own time.
        if running.phase != (total, unit.to_owned()) {
            running.phase = (total, unit.to_owned());
            bar.set_length(total);
            bar.set_style(template(BAR));
            bar.reset_eta();
        }
        bar.set_position(done);
        let eta = match done {
            0 => String::new(),
            _ if done >= total => String::new(),
            _ => format!(", ETA {}", seconds(bar.eta())),
        };
        bar.set_message(format!(
            "{unit}{eta} {}",
            style(first_line(text)).for_stderr().dim()
        ));
    }

    fn finished(&mut self, step: &str) {
        self.run.inc(1);
        self.ended.insert(step.to_owned());
        self.hidden.remove(step);
        if let Some(running) = self.running.remove(step) {
            running.bar.finish_and_clear();
            self.bars.remove(&running.bar);
        }
        if let Some((next, (since, why))) = self.hidden.pop_first() {
            self.started(&next, &why, since);
        }
        self.summarise();
    }

    /// Says above the bars how a step ended.
    fn ended(&mut self, event: &RunEvent) {
        let RunEvent::StepFinished {
            step,
            status,
            took_ms,
            why,
            metrics,
            help,
            ..
        } = event
        else {
            return;
        };
        match status {
            StepStatus::Ran => {
                let text = format!(
                    "{} {step} in {} {}",
                    style("ran    ").for_stderr().green(),
                    duration(*took_ms),
                    style(metric_text(metrics)).for_stderr().dim()
                );
                // The table shows as much, `flowrun show` all.
                self.line(&truncate_str(&text, columns(), "…"));
            }
            StepStatus::Failed => {
                self.failed += 1;
                let failed = style("failed ").for_stderr().red().bold();
                self.line(&format!("{failed} {step}: {why}"));
                if let Some(help) = help {
                    self.line(&format!(
                        "        {} {help}",
                        style("help:").for_stderr().cyan()
                    ));
                }
                self.summarise();
            }
            StepStatus::Cached | StepStatus::Skipped => {}
        }
    }

    fn summarise(&self) {
        let under_way = self.running.len() + self.hidden.len();
        let mut text = format!("steps, {under_way} running");
        if !self.hidden.is_empty() {
            text.push_str(&format!(" ({} without a line)", self.hidden.len()));
        }
        if let Some(left) = self.left(under_way) {
            text.push_str(&format!(", ETA {}", seconds(left)));
        }
        if self.failed > 0 {
            let failed = format!(", {} failed", count(self.failed, "step"));
            text.push_str(&style(failed).for_stderr().red().to_string());
        }
        self.run.set_message(text);
    }

    /// How long the run has yet to go, by what its steps took before: what is left is shared
    /// by as many as run now, and no shorter than its longest step. `None` when nothing that
    /// is left ever ran, or nothing runs.
    fn left(&self, under_way: usize) -> Option<Duration> {
        if under_way == 0 {
            return None;
        }
        let (all, longest) = self.earlier.rest(&self.ended);
        let spent = |(id, since): (&String, Instant)| {
            let took = self.earlier.took(id).unwrap_or_default();
            took.min(u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX))
        };
        let running = self.running.iter().map(|(id, r)| (id, r.since));
        let hidden = self.hidden.iter().map(|(id, (since, _))| (id, *since));
        let spent: Vec<u64> = running.chain(hidden).map(spent).collect();
        let left = all.saturating_sub(spent.iter().sum()) / under_way as u64;
        let most = longest.saturating_sub(spent.into_iter().max().unwrap_or_default());
        let left = Duration::from_millis(left.max(most));
        (left >= Duration::from_secs(1)).then_some(left)
    }

    fn line(&self, text: &str) {
        // When the terminal is gone there is nobody to tell.
        let _ = self.bars.println(text);
    }
}

/// Columns of the terminal.
fn columns() -> usize {
    usize::from(Term::stderr().size().1)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// A rest of time: an estimate has no milliseconds.
fn seconds(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        s => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// A bar's look; the default where the template is wrong, which a test would show.
fn template(text: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(text);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸─")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_right() {
        for text in [RUN, SPINNER, BAR] {
            assert!(ProgressStyle::with_template(text).is_ok());
        }
    }

    #[test]
    fn an_estimate_is_in_seconds() {
        let shown = [5, 65, 3_700].map(|s| seconds(Duration::from_secs(s)));
        assert_eq!(shown, ["5 s", "1 min 05 s", "1 h 01 min"]);
    }
}
