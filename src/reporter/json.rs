//! One JSON object a line on stdout.

use std::io::{self, ErrorKind, Write};

use flowrun_engine::event::RunEvent;

/// Prints events as they are recorded.
#[derive(Default)]
pub(crate) struct JsonReporter {
    /// The first line that could not be written.
    failed: Option<io::Error>,
}

impl JsonReporter {
    pub(super) fn show(&mut self, event: &RunEvent) {
        if let RunEvent::Recorded { lines } = event {
            self.write(lines);
        } else if let Ok(mut line) = serde_json::to_vec(event) {
            line.push(b'\n');
            self.write(&line);
        }
    }

    /// Prints lines as they are.
    pub(super) fn write(&mut self, lines: &[u8]) {
        // A reader that went away does not stop the run. Nor does a full disk, but it is told
        // when the run is over.
        if self.failed.is_none() {
            let mut out = io::stdout().lock();
            self.failed = out.write_all(lines).and_then(|()| out.flush()).err();
        }
    }

    /// # Errors
    /// When something could not be written although somebody reads.
    pub(super) fn end(self) -> io::Result<()> {
        match self.failed {
            Some(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }
}
