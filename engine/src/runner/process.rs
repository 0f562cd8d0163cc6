//! [`Process`]: a step kind's work in a process of its own.
//!
//! Invariant: when [`Process::run`] returns, the process and what it started in its group are gone.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::Runner;
use super::protocol::{StepMessage, StepRequest};
use crate::child::{LAST_WORDS, Tail, ended_within, follow, signal, start};
use crate::step::{Step, StepContext, StepError, StepOutcome, StepReporter};
use crate::warden::Warden;

/// How long work that was asked to stop has to do so: longer than a client of a server awaits the
/// requests that it has in flight.
pub(super) const GRACE: Duration = Duration::from_secs(12);
/// What Rust says when memory runs out.
const OUT_OF_MEMORY: &str = "memory allocation of";

/// Works in a process of its own.
pub struct Process<'a> {
    program: PathBuf,
    args: Vec<OsString>,
    /// Bytes; zero means no bound.
    memory: u64,
    /// Ends it when this process is killed.
    warden: Option<&'a Warden>,
}

impl<'a> Process<'a> {
    /// Starts `program step exec`. `memory` in bytes; zero means no bound.
    #[must_use]
    pub fn new(program: &Path, memory: u64) -> Self {
        Self::with_args(program, &["step", "exec"], memory)
    }

    pub(super) fn with_args(program: &Path, args: &[&str], memory: u64) -> Self {
        Self {
            program: program.to_owned(),
            args: args.iter().map(OsString::from).collect(),
            memory,
            warden: None,
        }
    }

    pub(super) fn guarded_by(self, warden: &'a Warden) -> Self {
        Self {
            warden: Some(warden),
            ..self
        }
    }

    fn spawn(&self, ctx: &StepContext) -> Result<Child, StepError> {
        start(
            Command::new(&self.program)
                .args(&self.args)
                .env_clear()
                .envs(&ctx.world.env)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0),
        )
        .map_err(|e| {
            StepError::failed(format!("{} cannot be started: {e}", self.program.display()))
        })
    }

    /// The error of a process that gave no response.
    fn crashed(&self, status: ExitStatus, tail: &Tail) -> StepError {
        let last = tail.text();
        if self.memory > 0 && last.contains(OUT_OF_MEMORY) {
            let bound = self.memory as f64 / 1e6;
            let text = format!("needs more memory than its `resources.memory` of {bound:.0} MB");
            return StepError::failed(text).help("raise it, or give the step less to do at once");
        }
        let text = format!("the step's process ended without a result ({status})\n{last}");
        StepError::failed(text.trim_end())
    }
}

impl Runner for Process<'_> {
    fn run(&self, step: &dyn Step, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let request = serde_json::to_string(&StepRequest::new(step, ctx, self.memory))
            .map_err(|e| StepError::failed(format!("the request cannot be written: {e}")))?;
        if let Some(warden) = self.warden {
            warden.wake();
        }
        let mut child = self.spawn(ctx)?;
        let guarded = self.warden.map(|warden| warden.guard(child.id()));
        let tail = Arc::new(Tail::default());
        let logged = child
            .stderr
            .take()
            .map(|err| follow(err, &ctx.reporter, &tail));
        let answers = child.stdout.take().map(|out| listen(out, &ctx.reporter));
        let mut stdin = child.stdin.take();
        if let Some(stdin) = &mut stdin {
            // One that ended before it read this shows why by its status.
            let _ = writeln!(stdin, "{request}");
        }
        let asked = || ctx.cancel.is_cancelled().then_some(());
        let stopped = ended_within(&child, None, None, asked).is_some();
        drop(stdin);
        if stopped {
            let killed = || ctx.cancel.is_killed().then_some(());
            ended_within(&child, None, Some(GRACE), killed);
        }
        // It was not reaped yet, so its group's number is still its own.
        signal(&child, Signal::SIGKILL);
        drop(guarded);
        let status = child
            .wait()
            .map_err(|e| StepError::failed(format!("cannot wait for the step's process: {e}")))?;
        if let Some(logged) = logged {
            // A process that left the group may hold the pipe open longer.
            let _ = logged.recv_timeout(LAST_WORDS);
        }
        match answers
            .and_then(|a| a.recv_timeout(LAST_WORDS).ok())
            .flatten()
        {
            Some(result) => result,
            None if stopped => Err(StepError::cancelled()),
            None => Err(self.crashed(status, &tail)),
        }
    }
}

type Answer = Option<Result<StepOutcome, StepError>>;

/// Passes on what the process reports. The receiver gets its response when the pipe closes.
fn listen(pipe: impl Read + Send + 'static, reporter: &Arc<dyn StepReporter>) -> Receiver<Answer> {
    let reporter = Arc::clone(reporter);
    let (tell, hears) = channel();
    std::thread::spawn(move || {
        let mut answer = None;
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            match serde_json::from_slice(&line) {
                Ok(StepMessage::Done(outcome)) => answer = Some(Ok(outcome)),
                Ok(StepMessage::Failed(failure)) => answer = Some(Err(failure.into())),
                Ok(message) => message.tell(reporter.as_ref()),
                // Something that the step called wrote to standard output.
                Err(_) => reporter.log(String::from_utf8_lossy(&line).trim_end()),
            }
            line.clear();
        }
        // The runner may have given up.
        let _ = tell.send(answer);
    });
    hears
}
