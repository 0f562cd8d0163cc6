//! [`Courier`]: brings to the remote store what the work says and what it leaves on its way, and
//! learns there that nobody wants the work any more.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flowrun_cache::{CompletionCache, DepotError, RemoteCache};

use super::{Offer, PATIENCE};
use crate::runner::job::folder::AttemptFolder;
use crate::runner::job::follow::Growing;
use crate::runner::job::patience::Patience;
use crate::runner::job::saving::{Saving, Stored};
use crate::runner::job::shipment::{Said, Shipment};
use crate::runner::job::watch::BEAT;
use crate::step::{Cancel, StepError};

/// How often answers of language models are sent: what is killed loses no more.
const ANSWERS_EVERY: Duration = Duration::from_secs(30);
/// Notes that are written at once at most: the job may not be wanted any more.
const AT_ONCE: usize = 16;

/// Passes on what the files of the attempt say, in a thread of its own, and stops the work once
/// nobody wants it.
pub(super) struct Courier {
    pub(super) tell: Sender<News>,
    thread: JoinHandle<()>,
}

/// What the thread is told.
pub(super) enum News {
    /// The work begins.
    Begun(Begun),
    /// The work is over.
    End,
}

/// What the work leaves on its way that is worth keeping.
pub(super) struct Begun {
    pub(super) remote: Arc<RemoteCache>,
    /// Answers of language models come up here.
    pub(super) completions: Arc<CompletionCache>,
    pub(super) stored: Stored,
    pub(super) saving: Option<Saving>,
    /// As that of [`Goods`](super::Goods).
    pub(super) over: Arc<Mutex<bool>>,
    /// When answers were last sent.
    pub(super) sent: Instant,
}

/// Sends what the work leaves on its way, in a thread of its own: large files take long, and
/// somebody has to show life meanwhile.
struct Passing {
    /// Nothing is ever told: it is over when this is gone.
    over: Sender<()>,
    thread: JoinHandle<()>,
}

impl Passing {
    fn start(mut begun: Begun, shipment: Shipment) -> Self {
        let (over, hears) = channel();
        let thread = std::thread::spawn(move || {
            while hears.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                begun.pass(&shipment);
            }
        });
        Self { over, thread }
    }

    /// Returns when nothing more is sent.
    fn end(self) {
        drop(self.over);
        let _ = self.thread.join();
    }
}

impl Begun {
    /// Sends what is due.
    fn pass(&mut self, shipment: &Shipment) {
        if self.sent.elapsed() >= ANSWERS_EVERY {
            self.sent = Instant::now();
            self.remote.send_answers(&self.completions);
        }
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(saving) = self.saving.as_mut().filter(|_| !*over) {
            saving.pass(|folder| match save(shipment, &mut self.stored, folder) {
                Ok(sent) => sent,
                Err(e) => {
                    tracing::debug!("what the step saved was not sent: {e}");
                    false
                }
            });
        }
    }
}

/// Sends what the step saved; false when it was written to meanwhile: what was sent before stands.
pub(super) fn save(
    shipment: &Shipment,
    stored: &mut Stored,
    folder: &Path,
) -> Result<bool, DepotError> {
    let Some(artifact) = stored.put(folder)? else {
        return Ok(false);
    };
    shipment.save(stored.store(), &artifact)?;
    Ok(true)
}

impl Courier {
    /// Begins to tell.
    pub(super) fn start(
        shipment: &Shipment,
        attempt: &AttemptFolder,
        offer: Arc<Offer>,
        cancel: &Cancel,
    ) -> Self {
        let (tell, hears) = channel();
        let mut telling = Telling::new(shipment, attempt, offer, cancel);
        let attempt = attempt.clone();
        let thread = std::thread::spawn(move || telling.until_the_end(&attempt, &hears));
        Self { tell, thread }
    }

    /// Returns when everything is said, or cannot be.
    pub(super) fn end(self) {
        let _ = self.tell.send(News::End);
        let _ = self.thread.join();
    }
}

/// What was said so far.
struct Telling {
    shipment: Shipment,
    offer: Arc<Offer>,
    cancel: Cancel,
    messages: Growing,
    log: Growing,
    /// A note that is still to be written.
    unsaid: Option<Vec<u8>>,
    next: u64,
    beat: u64,
}

impl Telling {
    fn new(
        shipment: &Shipment,
        attempt: &AttemptFolder,
        offer: Arc<Offer>,
        cancel: &Cancel,
    ) -> Self {
        Self {
            shipment: shipment.clone(),
            offer,
            cancel: cancel.clone(),
            messages: Growing::new(attempt.messages()),
            log: Growing::new(attempt.log()),
            unsaid: None,
            next: 1,
            beat: 0,
        }
    }

    fn until_the_end(&mut self, attempt: &AttemptFolder, hears: &Receiver<News>) {
        let mut passing = None;
        loop {
            let more = self.tell().unwrap_or_else(|e| {
                tracing::debug!("nothing can be said: {e}");
                false
            });
            if self.shipment.is_withdrawn().unwrap_or(false) {
                attempt.cancel();
            }
            let pause = match more {
                true => Duration::ZERO,
                false => BEAT,
            };
            match hears.recv_timeout(pause) {
                Ok(News::Begun(work)) => {
                    passing = Some(Passing::start(work, self.shipment.clone()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Ok(News::End) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let said = self.tell_all(attempt);
        // It writes notes too.
        if let Some(passing) = passing {
            passing.end();
        }
        if let Err(e) = said {
            tracing::warn!("the response cannot be given: {e}");
            return;
        }
        // What was said after the runner had tidied up is heard by nobody.
        if self.shipment.is_gone().unwrap_or(false) {
            let _ = self.shipment.clear();
        }
    }

    /// Says all that is left, with patience.
    fn tell_all(&mut self, attempt: &AttemptFolder) -> Result<(), StepError> {
        let (longest, started) = (self.offer.patience(), Instant::now());
        let cancel = self.cancel.clone();
        // That it was told to stop is soon nobody's concern.
        let is_unwanted = || cancel.is_cancelled() || attempt.is_cancelled();
        let patience = Patience {
            longest,
            stop: &|| is_unwanted() && started.elapsed() > PATIENCE,
        };
        while patience.with(|| self.tell())? {}
        Ok(())
    }

    /// Says what is new, or that somebody is here; true when there may be more to say.
    fn tell(&mut self) -> Result<bool, DepotError> {
        self.beat += 1;
        let before = self.next;
        for _ in 0..AT_ONCE {
            if self.unsaid.is_none() {
                let said = Said {
                    beat: self.beat,
                    messages: self.messages.more().unwrap_or_default(),
                    log: self.log.more().unwrap_or_default(),
                };
                if said.messages.is_empty() && said.log.is_empty() {
                    if self.next == before {
                        self.shipment.show_life(self.beat)?;
                    }
                    return Ok(false);
                }
                self.unsaid = Some(said.to_bytes());
            }
            if let Some(bytes) = &self.unsaid {
                self.shipment.say(self.next, bytes)?;
                self.next += 1;
                self.unsaid = None;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use flowrun_cache::{Depot, RemoteOptions};

    use super::*;

    #[test]
    fn much_is_said_in_rounds_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let options = RemoteOptions {
            url: format!("file://{}", dir.path().join("store").display()),
            read_only: false,
            env: BTreeMap::new(),
        };
        let depot = Depot::open(&options, dir.path()).unwrap();
        let shipment = Shipment::new(&Arc::new(depot), "id");
        let attempt = AttemptFolder::at(dir.path().join("job"));
        attempt.make().unwrap();
        std::fs::write(attempt.log(), vec![b'x'; (AT_ONCE << 20) + 1]).unwrap();
        let offer = Arc::new(Offer::new(None));
        let mut telling = Telling::new(&shipment, &attempt, offer, &Cancel::default());
        assert!(telling.tell().unwrap(), "there is more");
        assert!(!telling.tell().unwrap());
        let last = AT_ONCE as u64 + 1;
        assert_eq!(shipment.said(last).unwrap().unwrap().log, b"x");
        assert!(shipment.said(last + 1).unwrap().is_none());
    }
}
