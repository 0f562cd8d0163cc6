//! [`Follower`]: reads what the other end of a job appends to its files, as it comes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use super::folder::AttemptFolder;
use crate::child::{Lines, Tail};
use crate::runner::protocol::StepMessage;
use crate::step::{StepError, StepOutcome, StepReporter};

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

/// How far the files of an attempt were read.
pub(super) struct Follower {
    messages: Growing,
    line: Vec<u8>,
    log: Growing,
    lines: Lines,
    tail: Arc<Tail>,
    reporter: Arc<dyn StepReporter>,
}

/// The response of an attempt.
pub(super) type Answer = Result<StepOutcome, StepError>;

impl Follower {
    pub(super) fn new(folder: &AttemptFolder, reporter: &Arc<dyn StepReporter>) -> Self {
        let tail = Arc::new(Tail::default());
        Self {
            messages: Growing::new(folder.messages()),
            line: Vec::new(),
            log: Growing::new(folder.log()),
            lines: Lines::new(reporter, &tail),
            tail,
            reporter: Arc::clone(reporter),
        }
    }

    /// Passes on what is new; the response once it is there.
    pub(super) fn read(&mut self) -> Option<Answer> {
        while let Some(bytes) = self.log.more() {
            self.lines.take(&bytes);
        }
        let mut answer = None;
        while let Some(bytes) = self.messages.more() {
            for byte in bytes {
                if byte != b'\n' {
                    self.line.push(byte);
                    continue;
                }
                answer = self.message().or(answer);
                self.line.clear();
            }
        }
        if answer.is_some() {
            self.lines.end();
        }
        answer
    }

    /// The last lines that it printed.
    pub(super) fn last_words(&mut self) -> String {
        self.lines.end();
        self.tail.text()
    }

    fn message(&self) -> Option<Answer> {
        match serde_json::from_slice(&self.line) {
            Ok(StepMessage::Done(outcome)) => return Some(Ok(outcome)),
            Ok(StepMessage::Failed(failure)) => return Some(Err(failure.into())),
            Ok(message) => message.tell(self.reporter.as_ref()),
            Err(_) => self
                .reporter
                .log(String::from_utf8_lossy(&self.line).trim_end()),
        }
        None
    }
}

/// A file that grows, and may not be there yet.
pub(super) struct Growing {
    path: PathBuf,
    read: u64,
}

impl Growing {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, read: 0 }
    }

    /// The next bytes; none when there are none yet. Opened anew each time: that is when a
    /// network file system looks for what others wrote.
    pub(super) fn more(&mut self) -> Option<Vec<u8>> {
        let mut file = File::open(&self.path).ok()?;
        file.seek(SeekFrom::Start(self.read)).ok()?;
        let mut bytes = Vec::new();
        file.take(CHUNK).read_to_end(&mut bytes).ok()?;
        self.read += bytes.len() as u64;
        (!bytes.is_empty()).then_some(bytes)
    }
}
