//! [`Collector`]: brings what the other end of a job says in a remote store into the job's folder
//! here, where everything else reads it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use flowrun_cache::DepotError;

use super::folder::AttemptFolder;
use super::shipment::Shipment;

/// Wait between two looks into the store.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Notes that are read in one look at most: the run may be asked to stop meanwhile.
const AT_ONCE: usize = 32;

/// How far the notes of an attempt were read.
pub(super) struct Collector {
    shipment: Shipment,
    attempt: AttemptFolder,
    next: u64,
    looked: Option<Instant>,
    /// There may be more than was read.
    behind: bool,
    /// Since when the store does not answer, and why the last time.
    away: Option<(Instant, Trouble)>,
}

/// Why nothing was read.
struct Trouble {
    why: String,
    /// It may be another time.
    passes: bool,
}

impl From<DepotError> for Trouble {
    fn from(error: DepotError) -> Self {
        Self {
            passes: error.passes(),
            why: error.to_string(),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self {
            passes: false,
            why: error.to_string(),
        }
    }
}

impl Collector {
    /// Begins at the first note, whatever an earlier run had read.
    pub(super) fn new(shipment: Shipment, attempt: &AttemptFolder) -> Self {
        for path in [attempt.messages(), attempt.log()] {
            // None is there, mostly.
            let _ = std::fs::remove_file(path);
        }
        Self {
            shipment,
            attempt: attempt.clone(),
            next: 1,
            looked: None,
            behind: false,
            away: None,
        }
    }

    pub(super) fn shipment(&self) -> &Shipment {
        &self.shipment
    }

    /// Looks for what is new, unless that was done just now.
    pub(super) fn look(&mut self) {
        if self.behind || self.looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY) {
            self.look_now();
        }
    }

    pub(super) fn look_now(&mut self) {
        self.looked = Some(Instant::now());
        match self.collect() {
            Ok(()) => self.away = None,
            Err(trouble) => {
                let since = self.away.take().map(|(since, _)| since);
                self.away = Some((since.unwrap_or_else(Instant::now), trouble));
            }
        }
    }

    /// Reads all that is there, unless `stop` says so meanwhile.
    pub(super) fn catch_up(&mut self, stop: &dyn Fn() -> bool) {
        self.look_now();
        while self.behind && !stop() {
            self.look_now();
        }
    }

    /// There may be more than was read.
    pub(super) fn is_behind(&self) -> bool {
        self.behind
    }

    /// For how long the store has not answered, and why.
    pub(super) fn away(&self) -> Option<(Duration, &str)> {
        let (since, trouble) = self.away.as_ref()?;
        Some((since.elapsed(), &trouble.why))
    }

    /// A store that does not answer may do so later.
    pub(super) fn may_come_back(&self) -> bool {
        self.away.as_ref().is_none_or(|(_, trouble)| trouble.passes)
    }

    fn collect(&mut self) -> Result<(), Trouble> {
        self.behind = false;
        for _ in 0..AT_ONCE {
            let Some(said) = self.shipment.said(self.next)? else {
                if let Some(beat) = self.shipment.last_beat()? {
                    self.lives(beat)?;
                }
                return Ok(());
            };
            self.lives(said.beat)?;
            // What it printed comes before its response.
            let log = append(&self.attempt.log(), &said.log)?;
            if let Err(error) = append(&self.attempt.messages(), &said.messages) {
                // The note is read again.
                log.take_back();
                return Err(error.into());
            }
            self.next += 1;
        }
        self.behind = true;
        Ok(())
    }

    /// Somebody works for the attempt.
    fn lives(&self, beat: u64) -> io::Result<()> {
        if !self.attempt.is_claimed() {
            self.attempt.claim()?;
        }
        // One that was read before is older than what is known.
        if self.attempt.last_beat().is_none_or(|last| last < beat) {
            self.attempt.beat(beat);
        }
        Ok(())
    }
}

/// What was added to a file.
struct Added {
    file: File,
    /// Its length before.
    before: u64,
}

impl Added {
    fn take_back(&self) {
        // What was read of it meanwhile is what comes again.
        let _ = self.file.set_len(self.before);
    }
}

/// All of it or nothing.
fn append(path: &Path, bytes: &[u8]) -> io::Result<Added> {
    let file = File::options().create(true).append(true).open(path)?;
    let before = file.metadata()?.len();
    let added = Added { file, before };
    if let Err(error) = (&added.file).write_all(bytes) {
        added.take_back();
        return Err(error);
    }
    Ok(added)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_can_be_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        append(&path, b"one").unwrap();
        append(&path, b"two").unwrap().take_back();
        append(&path, b"three").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"onethree");
    }
}
