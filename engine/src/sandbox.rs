//! Runs a `run:` step's command in a folder that holds only its declared inputs.
//!
//! Each port is an environment variable with the port's path in that folder
//! (`$report` = `in/report`, `$receipt` = `out/receipt.json`). Nothing else of
//! the environment gets in but PATH, HOME, the locale, `env` and `secrets`.
//! Invariant: when [`Sandbox::run`] returns, the command's whole process group
//! was killed.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::step::{Cancel, StepError, StepReporter};

/// How long a stopped command has to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How long to listen for the last output once the process group is gone.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(1);
/// Lines of output shown when a command fails.
const TAIL: usize = 20;
/// Bytes of a line; a longer one is cut into several.
const LINE: usize = 8 << 10;
/// Longest wait between two looks at the command.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The last lines of a process's output.
pub(crate) type Tail = Arc<Mutex<VecDeque<String>>>;

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
        let mut child = Command::new("/bin/sh")
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
        for reader in readers.into_iter().flatten() {
            // Only a process that left the group can hold the pipe open longer.
            if reader.recv_timeout(LAST_WORDS) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                reporter.warning("the command left a process behind that still holds its output");
            }
        }
        let status = status?;
        if status.success() {
            return Ok(());
        }
        let tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        let tail: Vec<&str> = tail.iter().map(String::as_str).collect();
        let text = format!("the command failed ({status})\n{}", tail.join("\n"));
        Err(StepError::failed(text.trim_end()))
    }

    /// Waits for the command, stops it when asked or when time is up, and ends
    /// whatever it left running in its group.
    fn wait(&self, child: &mut Child, cancel: &Cancel) -> Result<ExitStatus, StepError> {
        let started = Instant::now();
        let stopped = ended_within(child, None, || {
            if cancel.is_cancelled() {
                return Some(StepError::cancelled());
            }
            let limit = self.timeout.filter(|limit| started.elapsed() > *limit);
            limit.map(timed_out)
        });
        if stopped.is_some() {
            signal(child, Signal::SIGTERM);
            ended_within(child, Some(GRACE), || cancel.is_killed().then_some(()));
        }
        // The leader was not reaped yet, so its group's number is still its own.
        signal(child, Signal::SIGKILL);
        let status = child
            .wait()
            .map_err(|e| StepError::failed(format!("cannot wait for the command: {e}")))?;
        match stopped {
            Some(error) => Err(error),
            None => Ok(status),
        }
    }
}

/// Waits until the child ended, without reaping it, or `until` passed, or `stop` gives something.
pub(crate) fn ended_within<T>(
    child: &Child,
    until: Option<Duration>,
    mut stop: impl FnMut() -> Option<T>,
) -> Option<T> {
    let started = Instant::now();
    let mut pause = Duration::from_micros(200);
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    loop {
        match waitid(Id::Pid(pid(child)), flags) {
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) | Err(_) => return None,
        }
        if let Some(stopped) = stop() {
            return Some(stopped);
        }
        if until.is_some_and(|until| started.elapsed() > until) {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LOOK_EVERY);
    }
}

/// The error of an attempt that took too long.
pub(crate) fn timed_out(limit: Duration) -> StepError {
    StepError::failed(format!(
        "took longer than its `timeout` of {}",
        humantime::format_duration(limit)
    ))
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

/// Logs what comes through the pipe, line by line. The receiver hears when it closes.
pub(crate) fn follow(
    mut pipe: impl Read + Send + 'static,
    reporter: &Arc<dyn StepReporter>,
    tail: &Tail,
) -> Receiver<()> {
    let (reporter, tail) = (Arc::clone(reporter), Arc::clone(tail));
    let (closed, hears) = channel();
    std::thread::spawn(move || {
        let emit = |line: &[u8]| {
            let line = String::from_utf8_lossy(line).into_owned();
            reporter.log(&line);
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(line);
        };
        let mut line: Vec<u8> = Vec::new();
        let mut chunk = vec![0; LINE];
        loop {
            let n = match pipe.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            for &byte in &chunk[..n] {
                // A progress bar goes back to the start of its line.
                if matches!(byte, b'\n' | b'\r') {
                    if !line.is_empty() || byte == b'\n' {
                        emit(&line);
                    }
                    line.clear();
                } else {
                    line.push(byte);
                    if line.len() >= LINE {
                        emit(&line);
                        line.clear();
                    }
                }
            }
        }
        if !line.is_empty() {
            emit(&line);
        }
        // The command may have been given up.
        let _ = closed.send(());
    });
    hears
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);

    impl StepReporter for Lines {
        fn progress(&self, _: u64, _: u64, _: &str, _: &str) {}
        fn warning(&self, text: &str) {
            self.log(&format!("warning: {text}"));
        }
        fn log(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    fn run(
        command: &str,
        timeout: Option<Duration>,
        cancel: &Cancel,
    ) -> (Result<(), StepError>, Vec<String>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let lines = Arc::new(Lines::default());
        let reporter: Arc<dyn StepReporter> = lines.clone();
        let mut env = BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]);
        env.insert("x".into(), "in/x".into());
        let sandbox = Sandbox {
            command,
            folder: dir.path(),
            env,
            timeout,
        };
        let result = sandbox.run(cancel, &reporter);
        let lines = lines.0.lock().unwrap().clone();
        (result, lines, dir)
    }

    /// Waits until a process that was killed is gone, or a zombie.
    fn is_gone(pid: &str) -> bool {
        let pid = Pid::from_raw(pid.trim().parse().unwrap());
        (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            nix::sys::signal::kill(pid, None).is_err()
                || std::fs::read_to_string(format!("/proc/{pid}/stat"))
                    .is_ok_and(|stat| stat.contains(") Z "))
        })
    }

    #[test]
    fn both_streams_are_logged_and_the_environment_is_bare() {
        let script = "echo $x; echo oops >&2; env | cut -d= -f1 | sort | tr '\\n' ' '";
        let (result, mut lines, _) = run(script, None, &Cancel::default());
        result.unwrap();
        lines.sort();
        assert_eq!(lines[0].trim(), "PATH PWD x");
        assert_eq!(lines[1..], ["in/x", "oops"]);
    }

    #[test]
    fn a_failure_shows_the_last_lines() {
        let script = "for i in $(seq 50); do echo line $i; done; false; echo not reached";
        let (result, lines, _) = run(script, None, &Cancel::default());
        let message = result.unwrap_err().message;
        assert!(message.starts_with("the command failed (exit status: 1)\nline 31\n"));
        assert!(message.ends_with("line 50"));
        assert_eq!(lines.len(), 50);
        let (result, _, _) = run("echo $nothing", None, &Cancel::default());
        assert!(result.unwrap_err().message.contains("nothing"));
    }

    #[test]
    fn a_very_long_line_is_cut_and_a_progress_bar_is_not_one_line() {
        let script = "printf 'a\\rb\\r\\n'; head -c 20000 /dev/zero | tr '\\0' z";
        let (result, lines, _) = run(script, None, &Cancel::default());
        result.unwrap();
        let sizes: Vec<usize> = lines.iter().map(String::len).collect();
        assert_eq!(sizes, [1, 1, 0, 8192, 8192, 3616]);
    }

    #[test]
    fn time_up_kills_the_whole_group_even_if_it_does_not_listen() {
        let script = "trap '' TERM; (trap '' TERM; sleep 100) & echo $! > bg; sleep 100";
        let limit = Duration::from_millis(300);
        let (result, _, dir) = run(script, Some(limit), &Cancel::default());
        assert_eq!(
            result.unwrap_err().message,
            "took longer than its `timeout` of 300ms"
        );
        assert!(is_gone(
            &std::fs::read_to_string(dir.path().join("bg")).unwrap()
        ));
    }

    #[test]
    fn a_command_that_ends_takes_its_background_with_it() {
        let (result, _, dir) = run("sleep 100 & echo $! > bg", None, &Cancel::default());
        result.unwrap();
        assert!(is_gone(
            &std::fs::read_to_string(dir.path().join("bg")).unwrap()
        ));
    }

    #[test]
    fn cancelling_stops_the_command() {
        let cancel = Cancel::default();
        let soon = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            soon.cancel();
        });
        let (result, _, _) = run("sleep 100", None, &cancel);
        thread.join().unwrap();
        let kind = result.unwrap_err().kind;
        assert_eq!(kind, crate::step::StepErrorKind::Cancelled);
    }

    #[test]
    fn a_second_wish_to_stop_leaves_no_time_to_clean_up() {
        let cancel = Cancel::default();
        let soon = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            soon.kill();
        });
        let script = "trap 'sleep 1.9; echo > cleaned' TERM; sleep 100 & echo $! > bg; wait";
        let (result, _, dir) = run(script, None, &cancel);
        thread.join().unwrap();
        assert!(result.is_err() && !dir.path().join("cleaned").exists());
        assert!(is_gone(
            &std::fs::read_to_string(dir.path().join("bg")).unwrap()
        ));
    }

    #[test]
    fn only_path_home_and_locale_are_inherited() {
        let names = ["PATH", "HOME", "LANG", "LC_ALL", "API_KEY", "PYTHONPATH"];
        let env = names.map(|n| (n.to_owned(), "v".to_owned()));
        let kept = inherited(&BTreeMap::from(env));
        assert_eq!(
            Vec::from_iter(kept.keys()),
            ["HOME", "LANG", "LC_ALL", "PATH"]
        );
    }
}
