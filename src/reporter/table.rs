//! The table at the end of a run: a line a step, then the counts.
//!
//! Many items of one step are folded into a line, and so are many cached steps: the table
//! shows what happened, however large the run.

use std::collections::BTreeMap;

use console::{measure_text_width, style, truncate_str};
use flowrun_engine::event::{RunEvent, StepStatus};

use super::{duration, metric_text, styled_status};
use crate::output::count;

/// Items of a step that have a line each; more are folded.
const ITEMS: usize = 6;
/// Rows above which cached and skipped steps are counted only.
const ROWS: usize = 60;
/// Columns that a step's name takes at most.
const NAME: usize = 40;

/// Collects what the table shows.
#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Row>,
    places: BTreeMap<String, usize>,
    warnings: Vec<String>,
    /// Cached steps whose results came from the remote cache.
    remote: usize,
    end: Option<String>,
}

#[derive(Clone)]
struct Row {
    step: String,
    status: StepStatus,
    took_ms: u64,
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
                from,
                ..
            } => {
                self.remote += usize::from(from.is_some());
                let text = match status {
                    StepStatus::Ran | StepStatus::Cached => metric_text(metrics),
                    StepStatus::Failed | StepStatus::Skipped => {
                        why.lines().next().unwrap_or_default().to_owned()
                    }
                };
                self.put(Row {
                    step: step.clone(),
                    status: *status,
                    took_ms: *took_ms,
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
                let remote = match self.remote {
                    0 => String::new(),
                    n => format!(" ({n} from the remote cache)"),
                };
                let head = if all_cached { "nothing to do: " } else { "" };
                self.end = Some(format!(
                    "{head}{ran} ran, {cached} cached{remote}, {failed} failed, {skipped} skipped in {}; record in {run_dir}\n",
                    duration(*took_ms)
                ));
            }
            _ => {}
        }
    }

    /// A step that was made again in the same run stands once.
    fn put(&mut self, row: Row) {
        match self.places.get(&row.step) {
            Some(&place) => self.rows[place] = row,
            None => {
                self.places.insert(row.step.clone(), self.rows.len());
                self.rows.push(row);
            }
        }
    }

    /// The table, no wider than a terminal's `columns`.
    pub(super) fn render(&self, columns: Option<usize>) -> String {
        let (rows, left_out) = self.shown();
        let widest = rows.iter().map(|r| measure_text_width(&r.step)).max();
        let width = widest.unwrap_or(0).min(NAME);
        let mut out = String::new();
        for row in &rows {
            let name = truncate_str(&row.step, NAME, "…");
            let pad = " ".repeat(width.saturating_sub(measure_text_width(&name)));
            // What was skipped took no time.
            let took = match row.status {
                StepStatus::Skipped => String::new(),
                _ => duration(row.took_ms),
            };
            let line = format!(
                "{} {name}{pad} {took:>12}  {}",
                styled_status(row.status).for_stderr(),
                row.text
            );
            let line = match columns {
                Some(columns) => truncate_str(&line, columns, "…").into_owned(),
                None => line,
            };
            out.push_str(line.trim_end());
            out.push('\n');
        }
        if left_out > 0 {
            let more = format!("… and {} cached or skipped", count(left_out, "step"));
            out.push_str(&format!("{}\n", style(more).for_stderr().dim()));
        }
        for text in &self.warnings {
            out.push_str(&format!(
                "{} {text}\n",
                style("warning:").for_stderr().yellow().bold()
            ));
        }
        out.push_str(self.end.as_deref().unwrap_or_default());
        out
    }

    /// The rows that are shown, and how many are not.
    fn shown(&self) -> (Vec<Row>, usize) {
        let rows = self.folded();
        if rows.len() <= ROWS {
            return (rows, 0);
        }
        let all = rows.len();
        let told = |row: &Row| matches!(row.status, StepStatus::Ran | StepStatus::Failed);
        let shown: Vec<Row> = rows.into_iter().filter(told).collect();
        let left_out = all - shown.len();
        (shown, left_out)
    }

    /// The rows, with the items of a step that has many in one row; failed ones stay.
    fn folded(&self) -> Vec<Row> {
        let mut items: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
        for row in &self.rows {
            if let Some((step, _)) = row.step.split_once('[') {
                items.entry(step).or_default().push(row);
            }
        }
        let mut folded = Vec::new();
        for row in &self.rows {
            let step = row.step.split_once('[').map(|(step, _)| step);
            let many = step.and_then(|step| items.get(step).filter(|rows| rows.len() > ITEMS));
            match (step, many) {
                (Some(_), Some(_)) if row.status == StepStatus::Failed => folded.push(row.clone()),
                (Some(step), Some(rows)) if std::ptr::eq(rows[0], row) => {
                    folded.push(fold_items(step, rows));
                }
                (Some(_), Some(_)) => {}
                _ => folded.push(row.clone()),
            }
        }
        folded
    }
}

fn fold_items(step: &str, rows: &[&Row]) -> Row {
    let of = |status| rows.iter().filter(|row| row.status == status).count();
    let counts = [
        (StepStatus::Failed, of(StepStatus::Failed), "failed"),
        (StepStatus::Ran, of(StepStatus::Ran), "ran"),
        (StepStatus::Skipped, of(StepStatus::Skipped), "skipped"),
        (StepStatus::Cached, of(StepStatus::Cached), "cached"),
    ];
    let there: Vec<_> = counts.iter().filter(|(_, n, _)| *n > 0).collect();
    let text: Vec<String> = there
        .iter()
        .map(|(_, n, word)| format!("{n} {word}"))
        .collect();
    Row {
        step: format!("{step} ({} items)", rows.len()),
        status: there
            .first()
            .map_or(StepStatus::Cached, |(status, ..)| *status),
        took_ms: rows.iter().map(|row| row.took_ms).sum(),
        text: text.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(step: &str, status: StepStatus) -> RunEvent {
        RunEvent::StepFinished {
            step: step.into(),
            kind: "run".into(),
            status,
            key: String::new(),
            took_ms: 1000,
            why: "broke here\nand there".into(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::from([("accuracy".into(), serde_json::json!(0.5))]),
            help: None,
            from: None,
        }
    }

    fn lines(events: impl IntoIterator<Item = RunEvent>, columns: Option<usize>) -> Vec<String> {
        let mut table = Table::default();
        events.into_iter().for_each(|event| table.fold(&event));
        let text = console::strip_ansi_codes(&table.render(columns)).into_owned();
        text.lines().map(str::to_owned).collect()
    }

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
                .render(None)
                .starts_with("nothing to do: 0 ran, 12 cached")
        );
    }

    #[test]
    fn a_step_is_a_line_with_its_metrics_or_what_went_wrong() {
        let events = [
            finished("load", StepStatus::Cached),
            finished("train", StepStatus::Failed),
        ];
        assert_eq!(
            lines(events, None),
            [
                "cached  load         1.0 s  accuracy 0.500",
                "failed  train        1.0 s  broke here"
            ]
        );
    }

    #[test]
    fn many_items_are_one_line_and_a_failed_one_stays() {
        let items = (0..9).map(|i| {
            let status = if i == 4 {
                StepStatus::Failed
            } else {
                StepStatus::Ran
            };
            finished(&format!("evaluate[{i}]"), status)
        });
        assert_eq!(
            lines(items, Some(60)),
            [
                "failed  evaluate (9 items)        9.0 s  1 failed, 8 ran",
                "failed  evaluate[4]               1.0 s  broke here"
            ]
        );
    }

    #[test]
    fn a_large_run_shows_what_happened() {
        let cached = (0..10_000).map(|i| finished(&format!("s{i}"), StepStatus::Cached));
        let shown = lines(cached.chain([finished("new", StepStatus::Ran)]), Some(30));
        assert_eq!(
            shown,
            [
                "ran     new        1.0 s  acc…",
                "… and 10000 steps cached or skipped"
            ]
        );
    }
}
