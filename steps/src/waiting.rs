//! Waiting that a [`Cancel`] ends: for an answer of the network, for its bytes, for a lock.
//!
//! What blocks and cannot be told to stop is done on a thread of its own, which is left behind: the
//! time limits of its request end it, and nobody hears it. Knows nothing of what is fetched.
//!
//! Invariant: such a thread writes no file. Who waits does, so a lock that is given up is never
//! followed by another byte.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use flowrun_engine::step::{Cancel, StepError};

/// Time between two looks at the flag and at what another process does.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Bytes of one piece.
const PIECE: usize = 1 << 16;
/// Pieces that wait to be written.
const PIECES: usize = 4;

/// An error once the work is to stop.
///
/// # Errors
/// Cancelled.
pub(crate) fn check(cancel: &Cancel) -> Result<(), StepError> {
    match cancel.is_cancelled() {
        true => Err(StepError::cancelled()),
        false => Ok(()),
    }
}

/// What `work` gives; it is left behind when `cancel` comes first.
///
/// # Errors
/// Cancelled; failed when there is no thread to be had, or `work` panics.
pub(crate) fn unless_stopped<T: Send + 'static>(
    cancel: &Cancel,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StepError> {
    check(cancel)?;
    let (tell, told) = sync_channel(1);
    spawn(move || {
        // Nobody may wait any more.
        let _ = tell.send(work());
    })?;
    let done = hear(&told, cancel)?;
    done.ok_or_else(|| StepError::failed("a request to the network panicked"))
}

/// The bytes of a body, read ahead of who takes them.
pub(crate) struct Pieces {
    told: Receiver<io::Result<Vec<u8>>>,
    cancel: Cancel,
}

impl Pieces {
    /// Begins to read what `open` gives.
    ///
    /// # Errors
    /// Failed when there is no thread to be had.
    pub(crate) fn of<R: Read + 'static>(
        open: impl FnOnce() -> R + Send + 'static,
        cancel: &Cancel,
    ) -> Result<Self, StepError> {
        let (tell, told) = sync_channel(PIECES);
        spawn(move || {
            let mut body = open();
            loop {
                let mut piece = vec![0; PIECE];
                let read = body.read(&mut piece);
                let is_last = !matches!(read, Ok(1..));
                let read = read.map(|count| {
                    piece.truncate(count);
                    piece
                });
                if tell.send(read).is_err() || is_last {
                    return;
                }
            }
        })?;
        Ok(Self {
            told,
            cancel: cancel.clone(),
        })
    }

    /// The next bytes; none at the end. The inner error is that of reading.
    ///
    /// # Errors
    /// Cancelled.
    pub(crate) fn take(&self) -> Result<io::Result<Vec<u8>>, StepError> {
        let next = hear(&self.told, &self.cancel)?;
        Ok(next.unwrap_or_else(|| Err(io::Error::other("reading panicked"))))
    }
}

/// Takes the lock on `file`, which lies at `path`, and notes in it who has it. That another process
/// has it, and which, is said once.
///
/// # Errors
/// Cancelled; failed when the file cannot be locked.
pub(crate) fn lock(
    file: &mut File,
    path: &Path,
    what: &str,
    cancel: &Cancel,
) -> Result<(), StepError> {
    let mut waits = false;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(e)) => return Err(StepError::io(path, &e)),
            Err(TryLockError::WouldBlock) => {}
        }
        check(cancel)?;
        if !std::mem::replace(&mut waits, true) {
            tracing::warn!(
                "waiting for {}, which fetches {what} (it holds {})",
                holder(file),
                path.display()
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
    // For messages alone; without it another process does not learn whom it waits for.
    let _ = file
        .set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| file.write_all(std::process::id().to_string().as_bytes()));
    Ok(())
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_string(&mut text));
    match read.ok().and_then(|_| text.trim().parse::<u32>().ok()) {
        Some(process) => format!("process {process}"),
        None => "another process".to_owned(),
    }
}

/// Asks `ready` again and again until it gives something.
///
/// # Errors
/// Cancelled.
pub(crate) fn until<T>(
    cancel: &Cancel,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<T, StepError> {
    loop {
        check(cancel)?;
        if let Some(got) = ready() {
            return Ok(got);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits so long.
///
/// # Errors
/// Cancelled.
pub(crate) fn pause(cancel: &Cancel, wait: Duration) -> Result<(), StepError> {
    let started = Instant::now();
    until(cancel, || (started.elapsed() >= wait).then_some(()))
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<(), StepError> {
    let thread = std::thread::Builder::new().name("fetch".to_owned());
    let started = thread.spawn(work);
    let started = started.map_err(|e| StepError::failed(format!("no thread for a request: {e}")));
    started.map(|_| ())
}

/// What a thread tells next; none when it ended without a word.
fn hear<T>(told: &Receiver<T>, cancel: &Cancel) -> Result<Option<T>, StepError> {
    loop {
        check(cancel)?;
        match told.recv_timeout(LOOK_EVERY) {
            Ok(word) => return Ok(Some(word)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_engine::step::StepErrorKind;

    use super::*;

    /// Set once somebody waits.
    fn soon() -> Cancel {
        let cancel = Cancel::default();
        let flag = cancel.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            flag.cancel();
        });
        cancel
    }

    #[test]
    fn what_never_ends_is_left_behind() {
        let never = || -> u8 {
            loop {
                std::thread::park();
            }
        };
        let error = unless_stopped(&soon(), never).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled);
        let error = pause(&soon(), Duration::from_secs(3600)).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled);
        assert_eq!(unless_stopped(&Cancel::default(), || 7).unwrap(), 7);
    }

    #[test]
    fn a_body_comes_whole_and_its_failure_is_no_end() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * PIECE + 5).collect();
        let (sent, calm) = (bytes.clone(), Cancel::default());
        let pieces = Pieces::of(move || io::Cursor::new(sent), &calm).unwrap();
        let mut got = Vec::new();
        loop {
            let piece = pieces.take().unwrap().unwrap();
            if piece.is_empty() {
                break;
            }
            got.extend(piece);
        }
        assert_eq!(got, bytes);

        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("reset"))
            }
        }
        let pieces = Pieces::of(|| Broken, &calm).unwrap();
        assert!(pieces.take().unwrap().is_err());
        // Nor is a thread that is gone.
        assert!(pieces.take().unwrap().is_err());
    }

    #[test]
    fn a_lock_is_waited_for_until_it_is_free_or_the_work_is_to_stop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path);
            file.unwrap()
        };
        let (mut first, mut second) = (open(), open());
        assert_eq!(holder(&mut second), "another process");
        lock(&mut first, &path, "x", &Cancel::default()).unwrap();
        assert_eq!(
            holder(&mut second),
            format!("process {}", std::process::id())
        );
        let error = lock(&mut second, &path, "x", &soon()).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled);
        let waits = std::thread::spawn(move || first.unlock());
        lock(&mut second, &path, "x", &Cancel::default()).unwrap();
        waits.join().unwrap().unwrap();
    }
}
