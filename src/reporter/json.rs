//! One JSON object a line on stdout.

use std::io::Write;

use flowrun_engine::event::RunEvent;

/// Prints events as they are recorded.
pub(crate) struct JsonReporter;

impl JsonReporter {
    pub(super) fn show(&self, event: &RunEvent) {
        if let Ok(line) = serde_json::to_string(event) {
            // A reader that went away does not stop the run.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
}
