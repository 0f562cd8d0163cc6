//! [`EventReporter`]: turns what a step reports into events and log lines.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

use crate::event::RunEvent;
use crate::step::{StepReporter, TraceSpan};

/// At most ten progress events a second for each step.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Bytes of a value that is hidden though nobody called it a secret.
const LIKELY: usize = 8;

/// Bytes of a line of a secret from which on it is hidden by itself.
const LINE: usize = 4;

/// Hides the values of secrets in what is logged, stored or told.
///
/// Of a value of several lines each line of 4 bytes and more is hidden by itself, as programs print
/// line by line; so is a value whose newline at its end is not printed. What is encoded otherwise
/// (base64, percent signs) is not found.
#[derive(Clone, Default)]
pub struct Mask(Arc<Vec<String>>);

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({} values)", self.0.len())
    }
}

impl Mask {
    /// Hides these values; empty ones are passed over.
    #[must_use]
    pub fn new(values: impl IntoIterator<Item = String>) -> Self {
        let mut values: Vec<String> = values.into_iter().filter(|v| !v.is_empty()).collect();
        // Logs are written line by line, and a carriage return ends one too.
        let ends = ['\n', '\r'];
        let several = values.iter().filter(|v| v.contains(ends));
        let lines = several
            .flat_map(|v| v.split(ends))
            .filter(|l| l.len() >= LINE);
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        values.extend(lines);
        // A secret that holds another is hidden whole.
        values.sort_by_key(|v| std::cmp::Reverse(v.len()));
        values.dedup();
        Self(Arc::new(values))
    }

    /// The value may be a secret, though no step names it as one: a runner's `env` hands on tokens
    /// as well as settings. Numbers, switches and paths are none: logs need them.
    pub(crate) fn is_likely(value: &str) -> bool {
        value.len() >= LIKELY && !value.starts_with('/') && value.parse::<f64>().is_err()
    }

    /// The text with every secret's value replaced by `***`.
    #[must_use]
    pub fn apply(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in self.0.iter() {
            if text.contains(secret) {
                text = text.replace(secret, "***");
            }
        }
        text
    }

    /// Where a line of output is cut, so that no secret is cut in two: at byte `at`, or before the
    /// secret that goes on there. `None` while more must be read to tell.
    #[must_use]
    pub fn cut(&self, line: &[u8], at: usize) -> Option<usize> {
        let longest = self.0.iter().map(String::len).max().unwrap_or(0);
        if line.len() < at + longest {
            return None;
        }
        let across = |secret: &String| {
            let starts = at.saturating_sub(secret.len() - 1).max(1)..at;
            starts
                .into_iter()
                .find(|start| line[*start..].starts_with(secret.as_bytes()))
        };
        Some(self.0.iter().filter_map(across).min().unwrap_or(at))
    }

    /// The metrics with every secret's value replaced in their texts and names.
    pub(crate) fn metrics(&self, metrics: BTreeMap<String, Value>) -> BTreeMap<String, Value> {
        if self.0.is_empty() {
            return metrics;
        }
        let entries = metrics.into_iter();
        entries
            .map(|(name, value)| (self.apply(&name), self.value(value)))
            .collect()
    }

    fn value(&self, value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.apply(&text)),
            Value::Array(items) => items.into_iter().map(|v| self.value(v)).collect(),
            Value::Object(entries) => entries
                .into_iter()
                .map(|(name, value)| (self.apply(&name), self.value(value)))
                .collect(),
            // A secret of digits alone is a number here.
            Value::Number(n) if self.0.contains(&n.to_string()) => Value::from("***"),
            other => other,
        }
    }
}

/// One attempt's reporter.
pub(super) struct EventReporter {
    pub(super) step: String,
    pub(super) events: UnboundedSender<RunEvent>,
    pub(super) path: PathBuf,
    /// The file at `path`, once there is something to say.
    pub(super) log: Mutex<Option<File>>,
    /// When progress was last told, and how far it was.
    pub(super) last: Mutex<Option<(Instant, u64)>>,
    pub(super) mask: Mask,
    /// Somebody wants to hear of spans.
    pub(super) traced: bool,
}

impl EventReporter {
    fn send(&self, event: RunEvent) {
        // Nobody listens any more once the run is over.
        let _ = self.events.send(event);
    }
}

impl StepReporter for EventReporter {
    fn progress(&self, done: u64, total: u64, unit: &str, text: &str) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let soon = last.is_some_and(|(at, _)| at.elapsed() < PROGRESS_EVERY);
        // The end of a phase is always told, once.
        let ends = total > 0 && done == total && last.is_none_or(|(_, told)| told != done);
        if soon && !ends {
            return;
        }
        *last = Some((Instant::now(), done));
        drop(last);
        self.send(RunEvent::Progress {
            step: self.step.clone(),
            done,
            total,
            unit: unit.to_owned(),
            text: self.mask.apply(text),
        });
    }

    fn warning(&self, text: &str) {
        self.log(&format!("warning: {text}"));
        self.send(RunEvent::Warning {
            step: Some(self.step.clone()),
            text: self.mask.apply(text),
        });
    }

    fn log(&self, text: &str) {
        let line = format!("{}\n", self.mask.apply(text));
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.is_none() {
            let options = File::options().create(true).append(true).open(&self.path);
            *log = options.ok();
        }
        if let Some(file) = log.as_mut() {
            // A full disk shows itself when the step's outputs are stored.
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn traces(&self) -> bool {
        self.traced
    }

    fn span(&self, span: TraceSpan) {
        if self.traced {
            self.send(RunEvent::Span {
                step: self.step.clone(),
                span,
            });
        }
    }

    fn cut(&self, line: &[u8], at: usize) -> Option<usize> {
        self.mask.cut(line, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_secret_is_hidden_whole() {
        let mask = Mask::new(["key".to_owned(), "key-2".to_owned(), String::new()]);
        assert_eq!(mask.apply("key-2, key, none"), "***, ***, none");
        let mask = Mask::new(["first line\n}\nlast line".to_owned()]);
        assert_eq!(mask.apply("a last line }"), "a *** }");
        assert!(!format!("{mask:?}").contains("line"));
        let mask = Mask::new(["s3cret\n".to_owned()]);
        assert_eq!(mask.apply("s3cret, s3cret\n"), "***, ***");
    }

    #[test]
    fn settings_are_no_secrets() {
        for plain in ["", "1", "true", "100000000", "/shared/weights"] {
            assert!(!Mask::is_likely(plain), "{plain}");
        }
        assert!(Mask::is_likely("hf_0123456789"));
    }

    #[test]
    fn metrics_hide_secrets_wherever_they_stand() {
        let mask = Mask::new(["key".to_owned(), "12345".to_owned()]);
        let shown = |value: serde_json::Value| {
            let metrics = BTreeMap::from([("a key".to_owned(), value)]);
            serde_json::to_string(&mask.metrics(metrics)).unwrap_or_default()
        };
        let nested = serde_json::json!({ "key": ["my key", 12345, 0.5, null] });
        assert_eq!(
            shown(nested),
            r#"{"a ***":{"***":["my ***","***",0.5,null]}}"#
        );
    }
}
