//! A program that runs to its end, with its output line by line. It does not outlive the step,
//! unless the step is killed; then the next attempt waits for it, so that two never write to the
//! same folder.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, TryLockError};
use std::io::{BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use flowrun_engine::step::{Cancel, StepError};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long the program has to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// Longest wait between two looks at the program.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Lines of output that an error shows: a launcher such as accelerate adds a traceback of its own.
const TAIL: usize = 40;
/// Bytes of a line; a longer one is cut into several.
const LINE: usize = 8 << 10;

/// The file that a program holds locked as long as a process of it lives.
const LOCK: &str = "lock";

/// The right to run a program in a folder.
pub(super) struct Turn(File);

impl Turn {
    /// Waits until no program of an earlier attempt is at work there; `on_wait` hears of a wait.
    ///
    /// # Errors
    /// When the folder cannot be locked; cancelled.
    pub(super) fn take(
        folder: &Path,
        cancel: &Cancel,
        on_wait: &dyn Fn(),
    ) -> Result<Self, StepError> {
        let path = folder.join(LOCK);
        let open = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path);
        let file = open.map_err(|e| StepError::io(&path, &e))?;
        let mut waits = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::Error(e)) => return Err(StepError::io(&path, &e)),
                Err(TryLockError::WouldBlock) => {}
            }
            if !std::mem::replace(&mut waits, true) {
                on_wait();
            }
            if cancel.is_cancelled() {
                return Err(StepError::cancelled());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// Runs `argv` in `folder`.
///
/// # Errors
/// Failed when it cannot be started or says that it failed, with its last lines; cancelled.
pub(super) fn run(
    argv: &[String],
    Turn(lock): Turn,
    folder: &Path,
    env: &BTreeMap<String, String>,
    on_line: &dyn Fn(&str),
    cancel: &Cancel,
) -> Result<(), StepError> {
    let Some((program, args)) = argv.split_first() else {
        return Err(StepError::invalid("`backend.command.program` is empty"));
    };
    let mut child = flowrun_engine::runner::start(
        Command::new(program)
            .args(args)
            .current_dir(folder)
            .env_clear()
            .envs(env)
            // An empty file, and the lock goes with it to every process that it starts.
            .stdin(lock)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0),
    )
    .map_err(|e| {
        StepError::failed(format!("`{program}` cannot be started: {e}"))
            .help("install it, or say with `backend.command.program` how it is started")
    })?;
    let (tell, lines) = channel();
    if let Some(out) = child.stdout.take() {
        follow(out, tell.clone());
    }
    if let Some(err) = child.stderr.take() {
        follow(err, tell);
    }
    let mut tail = VecDeque::new();
    let mut hear = |line: String| {
        on_line(&line);
        tail.push_back(line);
        if tail.len() > TAIL {
            tail.pop_front();
        }
    };
    // Its output ends when the last process of the group closed it.
    let ended = loop {
        match lines.recv_timeout(LOOK_EVERY) {
            Ok(line) => hear(line),
            Err(RecvTimeoutError::Disconnected) => break wait(&mut child)?,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if cancel.is_cancelled() {
            stop(&mut child, cancel);
            return Err(StepError::cancelled());
        }
        if let Ok(Some(status)) = child.try_wait() {
            while let Ok(line) = lines.recv_timeout(LOOK_EVERY) {
                hear(line);
            }
            break status;
        }
    };
    if ended.success() {
        return Ok(());
    }
    let tail: Vec<String> = tail.into();
    let text = format!("`{program}` failed ({ended})\n{}", tail.join("\n"));
    Err(StepError::failed(text.trim_end()))
}

fn wait(child: &mut Child) -> Result<ExitStatus, StepError> {
    child
        .wait()
        .map_err(|e| StepError::failed(format!("cannot wait for the program: {e}")))
}

/// Asks the program's whole group to end, then ends it.
fn stop(child: &mut Child, cancel: &Cancel) {
    signal(child, Signal::SIGTERM);
    let asked = Instant::now();
    while asked.elapsed() < GRACE && !cancel.is_killed() {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    // What the leader left in its group, too.
    signal(child, Signal::SIGKILL);
    // Killed, so it ends.
    let _ = child.wait();
}

fn signal(child: &Child, signal: Signal) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // The group may be gone already.
        let _ = killpg(Pid::from_raw(pid), signal);
    }
}

/// Sends the lines of `output` on; a carriage return ends one too, as progress bars use it.
fn follow(output: impl Read + Send + 'static, tell: Sender<String>) {
    std::thread::spawn(move || {
        let mut line = Vec::new();
        for byte in BufReader::new(output).bytes().map_while(Result::ok) {
            let ends = matches!(byte, b'\n' | b'\r');
            if !ends {
                line.push(byte);
            }
            if (ends && !line.is_empty()) || line.len() >= LINE {
                let text = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                if tell.send(text).is_err() {
                    return;
                }
            }
        }
        if !line.is_empty() {
            let _ = tell.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn sh(script: &str, cancel: &Cancel) -> (Result<(), StepError>, Vec<String>) {
        let heard = RefCell::new(Vec::new());
        let argv = ["/bin/sh", "-c", script].map(str::to_owned);
        let dir = tempfile::tempdir().unwrap();
        let hear = |line: &str| heard.borrow_mut().push(line.to_owned());
        let env = BTreeMap::from([("A".to_owned(), "b".to_owned())]);
        let turn = Turn::take(dir.path(), cancel, &|| {}).unwrap();
        let ended = run(&argv, turn, dir.path(), &env, &hear, cancel);
        (ended, heard.into_inner())
    }

    #[test]
    fn output_is_heard_line_by_line_and_failures_show_its_end() {
        let (ended, heard) = sh("printf 'one\\rtwo\\n\\n'; echo $A", &Cancel::default());
        assert!(ended.is_ok());
        assert_eq!(heard, ["one", "two", "b"]);
        let (ended, _) = sh("echo why >&2; exit 3", &Cancel::default());
        let error = ended.unwrap_err().message;
        assert!(
            error.contains("exit status: 3") && error.contains("why"),
            "{error}"
        );
    }

    #[test]
    fn stopping_ends_the_whole_group() {
        let cancel = Cancel::default();
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("pid");
        let script = format!("sleep 60 & echo $! > {}; wait", mark.display());
        let stopper = cancel.clone();
        let pid = std::thread::spawn(move || {
            loop {
                let text = std::fs::read_to_string(&mark).unwrap_or_default();
                if let Ok(pid) = text.trim().parse::<i32>() {
                    stopper.cancel();
                    return pid;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let (ended, _) = sh(&script, &cancel);
        assert_eq!(
            ended.unwrap_err().kind,
            flowrun_engine::step::StepErrorKind::Cancelled
        );
        let pid = Pid::from_raw(pid.join().unwrap());
        let gone = || nix::sys::signal::kill(pid, None).is_err() || is_zombie(pid);
        let started = Instant::now();
        while !gone() && started.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(gone());
    }

    #[test]
    fn the_next_attempt_waits_for_what_a_killed_one_left() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::default();
        // A shell gives what it leaves in the background another standard input.
        let script = "exec 3<&0; (sleep 0.3; echo > done) >&- 2>&- &";
        let argv = ["/bin/sh", "-c", script].map(str::to_owned);
        let turn = Turn::take(dir.path(), &cancel, &|| {}).unwrap();
        run(&argv, turn, dir.path(), &BTreeMap::new(), &|_| {}, &cancel).unwrap();
        let waited = std::cell::Cell::new(false);
        Turn::take(dir.path(), &cancel, &|| waited.set(true)).unwrap();
        assert!(waited.get() && dir.path().join("done").exists());
    }

    /// Nobody may be there to reap an orphan in a container.
    fn is_zombie(pid: Pid) -> bool {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        state
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }
}
