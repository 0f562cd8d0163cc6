//! A process that works for a step: what it prints, how it is waited for and stopped.
//!
//! Knows neither commands nor step kinds. Invariant: it is never reaped before its whole
//! process group was killed, so the group's number is its own.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::step::StepReporter;

/// How long to listen for the last output once the process group is gone.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(1);
/// Lines of output shown when a process fails.
const TAIL: usize = 20;
/// Bytes of a line; a longer one is cut into several.
const LINE: usize = 8 << 10;
/// Longest wait between two looks at a process.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// First wait for a process that closed its output and did not end yet.
const FIRST_LOOK: Duration = Duration::from_micros(50);

/// Held while a process is started, until it runs its own program.
static STARTING: RwLock<()> = RwLock::new(());

/// Starts a process. Between the fork and its own program it holds what this process has open for
/// writing; a program that was just copied cannot be run then ("text file busy").
///
/// # Errors
/// As [`Command::spawn`].
pub fn start(command: &mut Command) -> io::Result<Child> {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    // It returns when the new process runs its program.
    command.spawn()
}

/// Waits for processes that are being started: what this process has written and closed is then
/// held open by none of them.
pub(crate) fn let_starts_end() {
    drop(STARTING.write().unwrap_or_else(PoisonError::into_inner));
}

/// An input in which there is nothing: as [`Stdio::null`], which opens a file each time.
pub(crate) fn no_input() -> Stdio {
    static NOTHING: OnceLock<Option<File>> = OnceLock::new();
    let nothing = NOTHING.get_or_init(|| File::open("/dev/null").ok());
    let copy = nothing.as_ref().and_then(|file| file.try_clone().ok());
    copy.map_or_else(Stdio::null, Stdio::from)
}

/// The last lines of a process's output.
#[derive(Debug, Default)]
pub(crate) struct Tail(Mutex<VecDeque<String>>);

impl Tail {
    fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The lines, joined.
    pub(crate) fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Vec::from_iter(lines.iter().map(String::as_str)).join("\n")
    }
}

/// Logs one line, in several where it is very long.
pub(crate) fn log_in_pieces(line: &str, reporter: &dyn StepReporter) {
    let mut rest = line.as_bytes();
    while rest.len() > LINE {
        // One that cannot be cut here ends soon after.
        let Some(cut) = reporter.cut(rest, LINE).filter(|cut| *cut > 0) else {
            break;
        };
        let (piece, more) = rest.split_at(cut.min(rest.len()));
        reporter.log(&String::from_utf8_lossy(piece));
        rest = more;
    }
    reporter.log(&String::from_utf8_lossy(rest));
}

/// Logs a stream line by line.
pub(crate) struct Lines {
    reporter: Arc<dyn StepReporter>,
    tail: Arc<Tail>,
    line: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(reporter: &Arc<dyn StepReporter>, tail: &Arc<Tail>) -> Self {
        Self {
            reporter: Arc::clone(reporter),
            tail: Arc::clone(tail),
            line: Vec::new(),
        }
    }

    pub(crate) fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            // A progress bar goes back to the start of its line.
            if matches!(byte, b'\n' | b'\r') {
                if !self.line.is_empty() || byte == b'\n' {
                    self.emit();
                }
            } else {
                self.line.push(byte);
                if self.line.len() >= LINE
                    && let Some(cut) = self.reporter.cut(&self.line, LINE)
                {
                    let rest = self.line.split_off(cut);
                    self.emit();
                    self.line = rest;
                }
            }
        }
    }

    fn emit(&mut self) {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        self.reporter.log(&line);
        self.tail.push(line);
    }

    pub(crate) fn end(&mut self) {
        if !self.line.is_empty() {
            self.emit();
        }
    }
}

/// Logs what comes through the pipe, in a thread. The receiver hears when it closes.
pub(crate) fn follow(
    mut pipe: impl Read + Send + 'static,
    reporter: &Arc<dyn StepReporter>,
    tail: &Arc<Tail>,
) -> Receiver<()> {
    let mut lines = Lines::new(reporter, tail);
    let (closed, hears) = channel();
    std::thread::spawn(move || {
        let mut chunk = vec![0; LINE];
        while let Ok(n) = read(&mut pipe, &mut chunk)
            && n > 0
        {
            lines.take(&chunk[..n]);
        }
        lines.end();
        // The process may have been given up.
        let _ = closed.send(());
    });
    hears
}

fn read(pipe: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        match pipe.read(chunk) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Both streams of a process that is waited for in this thread. Each has lines of its own: in one pipe
/// what comes of one stream would end up within a line of the other, and cut a secret in two.
pub(crate) struct Streams {
    open: Vec<(Box<dyn Stream>, Lines)>,
}

trait Stream: Read + AsFd {}
impl<T: Read + AsFd> Stream for T {}

impl Streams {
    /// Takes the streams from the child.
    pub(crate) fn of(
        child: &mut Child,
        reporter: &Arc<dyn StepReporter>,
        tail: &Arc<Tail>,
    ) -> Self {
        let out = child.stdout.take().map(|s| Box::new(s) as Box<dyn Stream>);
        let err = child.stderr.take().map(|s| Box::new(s) as Box<dyn Stream>);
        let open = out.into_iter().chain(err);
        Self {
            open: open.map(|s| (s, Lines::new(reporter, tail))).collect(),
        }
    }

    /// All of them are at their end.
    fn are_closed(&self) -> bool {
        self.open.is_empty()
    }

    /// Logs what comes within this time, and returns at once when something came.
    fn listen(&mut self, time: Duration) {
        let mut fds: Vec<PollFd<'_>> = self
            .open
            .iter()
            .map(|(stream, _)| PollFd::new(stream.as_fd(), PollFlags::POLLIN))
            .collect();
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
        if poll(&mut fds, time).is_err() {
            // Interrupted: as if nothing had come.
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        let mut at = 0;
        let mut chunk = [0; LINE];
        self.open.retain_mut(|(stream, lines)| {
            at += 1;
            if !ready[at - 1] {
                return true;
            }
            match read(stream, &mut chunk) {
                Ok(n) if n > 0 => {
                    lines.take(&chunk[..n]);
                    true
                }
                Ok(_) | Err(_) => {
                    lines.end();
                    false
                }
            }
        });
    }

    /// Logs the last output of a process that is gone; false when somebody still holds a stream.
    pub(crate) fn drain(&mut self) -> bool {
        let started = Instant::now();
        while !self.are_closed() {
            match LAST_WORDS.checked_sub(started.elapsed()) {
                None | Some(Duration::ZERO) => break,
                Some(left) => self.listen(left),
            }
        }
        for (_, lines) in &mut self.open {
            lines.end();
        }
        self.are_closed()
    }
}

/// Waits until the child ended, without reaping it, or `until` passed, or `stop` gives something.
pub(crate) fn ended_within<T>(
    child: &Child,
    mut streams: Option<&mut Streams>,
    until: Option<Duration>,
    mut stop: impl FnMut() -> Option<T>,
) -> Option<T> {
    let started = Instant::now();
    let mut pause = FIRST_LOOK;
    loop {
        match streams.as_deref_mut().filter(|s| !s.are_closed()) {
            // Its output ends with it, mostly: that wakes this thread.
            Some(streams) => streams.listen(LOOK_EVERY),
            None => {
                if has_ended(child) {
                    return None;
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(LOOK_EVERY);
            }
        }
        if has_ended(child) {
            return None;
        }
        if let Some(stopped) = stop() {
            return Some(stopped);
        }
        if until.is_some_and(|until| started.elapsed() > until) {
            return None;
        }
    }
}

/// The child ended. It stays to be reaped.
fn has_ended(child: &Child) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(pid(child)), flags) {
        Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => false,
        Ok(_) | Err(_) => true,
    }
}

/// Sends a signal to a child's process group.
pub(crate) fn signal(child: &Child, signal: Signal) {
    // The group may be gone already.
    let _ = killpg(pid(child), signal);
}

fn pid(child: &Child) -> Pid {
    // The system's own type for a process id is i32.
    Pid::from_raw(child.id().cast_signed())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::run::Mask;

    #[derive(Default)]
    struct Pieces(Mutex<Vec<String>>, Mask);

    impl StepReporter for Pieces {
        fn progress(&self, _: u64, _: u64, _: &str, _: &str) {}
        fn warning(&self, _: &str) {}
        fn log(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
        fn cut(&self, line: &[u8], at: usize) -> Option<usize> {
            self.1.cut(line, at)
        }
    }

    #[test]
    fn a_long_line_is_logged_in_pieces_and_no_secret_is_cut() {
        let (before, after) = ("x".repeat(LINE - 3), "y".repeat(2 * LINE));
        let line = format!("{before}s3cret{after}");
        let pieces = Pieces(Mutex::default(), Mask::new(["s3cret".to_owned()]));
        log_in_pieces(&line, &pieces);
        let pieces = pieces.0.into_inner().unwrap();
        assert_eq!(pieces.concat(), line);
        assert!(pieces.len() > 2 && pieces[1].starts_with("s3cret"));
        assert!(pieces.iter().all(|piece| piece.len() <= LINE + 6));
        let short = Pieces::default();
        log_in_pieces("", &short);
        assert_eq!(short.0.into_inner().unwrap(), [""]);
    }
}
