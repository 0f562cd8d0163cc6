//! Runs a `run:` step's command in a folder that holds only its declared inputs.
//!
//! Each port is an environment variable with the port's path in that folder
//! (`$report` = `in/report`, `$receipt` = `out/receipt.json`). Nothing else of
//! the environment gets in but PATH, HOME, the locale, `env` and `secrets`.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::step::{Cancel, StepError, StepReporter};

/// How long a stopped command has to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// Lines of output shown when a command fails.
const TAIL: usize = 20;

/// A command and what it may see.
pub(crate) struct Sandbox<'a> {
    /// The shell command.
    pub(crate) command: &'a str,
    /// Working folder, with `in/` and `out/`.
    pub(crate) folder: &'a Path,
    /// The whole environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Time limit.
    pub(crate) timeout: Option<Duration>,
}

/// The variables of the surrounding environment that a command may see.
pub(crate) fn inherited(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    env.iter()
        .filter(|(name, _)| {
            matches!(name.as_str(), "PATH" | "HOME" | "LANG") || name.starts_with("LC_")
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

impl Sandbox<'_> {
    /// Runs the command to its end. Output goes to the log line by line.
    pub(crate) fn run(
        &self,
        cancel: &Cancel,
        reporter: &Arc<dyn StepReporter>,
    ) -> Result<(), StepError> {
        let mut child = Command::new("sh")
            .args(["-eu", "-c", self.command])
            .current_dir(self.folder)
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| StepError::failed(format!("`sh` cannot be started: {e}")))?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let readers = [
            child.stdout.take().map(|out| follow(out, reporter, &tail)),
            child.stderr.take().map(|err| follow(err, reporter, &tail)),
        ];
        let status = self.wait(&mut child, cancel);
        // Whatever the command left running in its group goes with it; the
        // pipes then close and the readers end.
        signal(&child, Signal::SIGKILL);
        for reader in readers.into_iter().flatten() {
            // A reader that panicked has nothing more to say.
            let _ = reader.join();
        }
        let status = status?;
        if status.success() {
            return Ok(());
        }
        let tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        let tail: Vec<&str> = tail.iter().map(String::as_str).collect();
        Err(StepError::failed(format!(
            "the command failed ({status})\n{}",
            tail.join("\n")
        )))
    }

    fn wait(&self, child: &mut Child, cancel: &Cancel) -> Result<ExitStatus, StepError> {
        let started = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            let ended = child
                .try_wait()
                .map_err(|e| StepError::failed(format!("cannot wait: {e}")))?;
            if let Some(status) = ended {
                return Ok(status);
            }
            if cancel.is_cancelled() {
                stop(child);
                return Err(StepError::cancelled());
            }
            if let Some(limit) = self.timeout
                && started.elapsed() > limit
            {
                stop(child);
                return Err(timed_out(limit));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

/// The error of an attempt that took too long.
pub(crate) fn timed_out(limit: Duration) -> StepError {
    StepError::failed(format!(
        "took longer than its `timeout` of {}",
        humantime::format_duration(limit)
    ))
}

/// Asks the process group to end, then kills it.
fn stop(child: &mut Child) {
    signal(child, Signal::SIGTERM);
    let asked = Instant::now();
    while asked.elapsed() < GRACE {
        if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(child, Signal::SIGKILL);
    // The group was killed: this returns at once.
    let _ = child.wait();
}

fn signal(child: &Child, signal: Signal) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // The group may be gone already.
        let _ = killpg(Pid::from_raw(pid), signal);
    }
}

fn follow(
    pipe: impl Read + Send + 'static,
    reporter: &Arc<dyn StepReporter>,
    tail: &Arc<Mutex<VecDeque<String>>>,
) -> std::thread::JoinHandle<()> {
    let (reporter, tail) = (Arc::clone(reporter), Arc::clone(tail));
    std::thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&bytes)
                .trim_end_matches(['\n', '\r'])
                .to_owned();
            bytes.clear();
            reporter.log(&line);
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(line);
        }
    })
}
