//! [`EventReporter`]: turns what a step reports into events and log lines.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::event::RunEvent;
use crate::step::StepReporter;

/// At most ten progress events a second for each step.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// One attempt's reporter.
pub(super) struct EventReporter {
    pub(super) step: String,
    pub(super) events: UnboundedSender<RunEvent>,
    pub(super) log: Mutex<Option<std::fs::File>>,
    pub(super) last: Mutex<Option<Instant>>,
    /// Values that must not be shown.
    pub(super) secrets: Vec<String>,
}

impl EventReporter {
    /// The text with every secret's value replaced.
    pub(super) fn mask(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in self.secrets.iter().filter(|s| !s.is_empty()) {
            text = text.replace(secret, "***");
        }
        text
    }

    fn send(&self, event: RunEvent) {
        // Nobody listens any more once the run is over.
        let _ = self.events.send(event);
    }
}

impl StepReporter for EventReporter {
    fn progress(&self, done: u64, total: u64, unit: &str, text: &str) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if done < total && last.is_some_and(|at| at.elapsed() < PROGRESS_EVERY) {
            return;
        }
        *last = Some(Instant::now());
        self.send(RunEvent::Progress {
            step: self.step.clone(),
            done,
            total,
            unit: unit.to_owned(),
            text: self.mask(text),
        });
    }

    fn warning(&self, text: &str) {
        self.log(text);
        self.send(RunEvent::Warning {
            step: Some(self.step.clone()),
            text: self.mask(text),
        });
    }

    fn log(&self, text: &str) {
        if let Some(file) = self
            .log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
        {
            // A full disk shows itself when the step's outputs are stored.
            let _ = writeln!(file, "{}", self.mask(text));
        }
    }
}
