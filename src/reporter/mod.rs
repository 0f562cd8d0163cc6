//! What a person or a program sees of a run: a fold over its events.

mod json;
mod plain;
mod table;
mod terminal;

use std::collections::BTreeMap;

use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::pipeline::Pipeline;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;

use self::json::JsonReporter;
use self::plain::PlainReporter;
use self::terminal::TerminalReporter;
use crate::args::GlobalArgs;

/// One way of showing events.
pub(crate) enum Reporter {
    Json(JsonReporter),
    Plain(PlainReporter),
    Terminal(TerminalReporter),
}

impl Reporter {
    /// JSON when asked for; bars on a terminal; plain lines when piped.
    pub(crate) fn new(global: &GlobalArgs, pipeline: &Pipeline) -> Self {
        if global.json {
            Self::Json(JsonReporter)
        } else if console::user_attended_stderr() && !global.quiet {
            Self::Terminal(TerminalReporter::new(pipeline))
        } else {
            Self::Plain(PlainReporter::new(global.quiet, global.verbose))
        }
    }

    /// Shows events until the run is over.
    pub(crate) fn follow(&mut self, mut events: UnboundedReceiver<RunEvent>) {
        while let Some(event) = events.blocking_recv() {
            match self {
                Self::Json(reporter) => reporter.show(&event),
                Self::Plain(reporter) => reporter.show(&event),
                Self::Terminal(reporter) => reporter.show(&event),
            }
        }
    }
}

/// A duration for people: `12 ms`, `3.4 s`, `2 min 05 s`.
pub(crate) fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => format!("{} min {:02} s", ms / 60_000, ms % 60_000 / 1000),
    }
}

/// How a step ended, in a word.
pub(crate) fn status_word(status: StepStatus) -> &'static str {
    match status {
        StepStatus::Ran => "ran",
        StepStatus::Cached => "cached",
        StepStatus::Failed => "failed",
        StepStatus::Skipped => "skipped",
    }
}

/// Metrics on one line; fractions get three digits.
pub(crate) fn metric_text(metrics: &BTreeMap<String, Value>) -> String {
    let show = |value: &Value| match value {
        Value::Number(n) if n.is_f64() => format!("{:.3}", n.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let parts: Vec<String> = metrics
        .iter()
        .map(|(k, v)| format!("{k} {}", show(v)))
        .collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let shown = [5, 1_240, 125_000].map(duration);
        assert_eq!(shown, ["5 ms", "1.2 s", "2 min 05 s"]);
    }
}
