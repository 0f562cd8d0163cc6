//! The table at the end of a run: a line a step, then the counts.

use flowrun_engine::event::{RunEvent, StepStatus};

use super::{duration, metric_text, status_word};

/// Collects what the table shows.
#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Row>,
    warnings: Vec<String>,
    end: Option<String>,
}

struct Row {
    step: String,
    status: StepStatus,
    took: String,
    text: String,
}

impl Table {
    pub(super) fn fold(&mut self, event: &RunEvent) {
        match event {
            RunEvent::StepFinished {
                step,
                status,
                took_ms,
                why,
                metrics,
                ..
            } => {
                let text = match status {
                    StepStatus::Ran | StepStatus::Cached => metric_text(metrics),
                    StepStatus::Failed | StepStatus::Skipped => {
                        why.lines().next().unwrap_or_default().to_owned()
                    }
                };
                self.rows.retain(|row| row.step != *step);
                self.rows.push(Row {
                    step: step.clone(),
                    status: *status,
                    took: duration(*took_ms),
                    text,
                });
            }
            RunEvent::Warning { text, .. } => self.warnings.push(text.clone()),
            RunEvent::RunFinished {
                ok,
                ran,
                cached,
                failed,
                skipped,
                run_dir,
                took_ms,
            } => {
                let all_cached = *ok && *ran == 0 && *skipped == 0;
                let head = if all_cached { "nothing to do: " } else { "" };
                self.end = Some(format!(
                    "{head}{ran} ran, {cached} cached, {failed} failed, {skipped} skipped in {}; record in {run_dir}\n",
                    duration(*took_ms)
                ));
            }
            _ => {}
        }
    }

    pub(super) fn render(&self) -> String {
        let width = self
            .rows
            .iter()
            .map(|r| r.step.chars().count())
            .max()
            .unwrap_or(0);
        let mut out = String::new();
        for row in &self.rows {
            let line = format!(
                "{:8} {:width$} {:>12}  {}",
                status_word(row.status),
                row.step,
                row.took,
                row.text
            );
            out.push_str(line.trim_end());
            out.push('\n');
        }
        for text in &self.warnings {
            out.push_str(&format!("warning: {text}\n"));
        }
        out.push_str(self.end.as_deref().unwrap_or_default());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_did_nothing_says_so() {
        let mut table = Table::default();
        table.fold(&RunEvent::RunFinished {
            ok: true,
            ran: 0,
            cached: 12,
            failed: 0,
            skipped: 0,
            run_dir: "r".into(),
            took_ms: 40,
        });
        assert!(
            table
                .render()
                .starts_with("nothing to do: 0 ran, 12 cached")
        );
    }
}
