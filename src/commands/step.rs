//! `flowrun step exec`: the work of one step in a process of its own, or on another machine.
//! `flowrun` starts it; it is hidden from the help.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use flowrun_engine::runner::{Host, Post, exec as exec_request, exec_job as work_on};
use flowrun_engine::step::Cancel;
use nix::sys::signal::{SigSet, Signal};

use crate::exit::{Exit, Failure};
use crate::surroundings;

/// Reads a request from stdin, does the work and writes messages to stdout.
pub(crate) fn exec() -> Result<Exit, Failure> {
    // Standard output carries messages alone: what libraries print goes to the log.
    // This one is closed in what the step starts: a server that it leaves behind does not keep
    // the runner waiting.
    let messages = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    nix::unistd::dup2_stdout(std::io::stderr()).map_err(std::io::Error::from)?;
    exec_request(host()?, std::io::stdin(), messages, abandoned)
        .map_err(|e| Failure::usage(e.to_string()))?;
    Ok(Exit::Ok)
}

/// Does the work of the job in `folder`.
pub(crate) fn exec_job(folder: &Path) -> Result<Exit, Failure> {
    let usage = |e: flowrun_engine::runner::ExecError| Failure::usage(e.to_string());
    let Some(post) = Post::take(folder).map_err(usage)? else {
        // Somebody else has it.
        return Ok(Exit::Ok);
    };
    let console = File::from(nix::unistd::dup(std::io::stderr()).map_err(std::io::Error::from)?);
    let log = post.log()?;
    nix::unistd::dup2_stdout(&log).map_err(std::io::Error::from)?;
    nix::unistd::dup2_stderr(&log).map_err(std::io::Error::from)?;
    let cancel = Cancel::default();
    stop_on_signal(cancel.clone())?;
    let well = work_on(host()?, post, &cancel, console, abandoned).map_err(usage)?;
    Ok(match well {
        true => Exit::Ok,
        false if cancel.is_cancelled() => Exit::Interrupted,
        false => Exit::StepFailed,
    })
}

fn host() -> Result<Host, Failure> {
    Ok(Host {
        vocabulary: flowrun_steps::registry(),
        env: surroundings::environment(),
        exe: std::env::current_exe()?,
    })
}

#[allow(clippy::exit)]
fn abandoned() {
    std::process::exit(Exit::Interrupted as i32);
}

/// A job system ends a job by SIGTERM.
fn stop_on_signal(cancel: Cancel) -> Result<(), Failure> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    // Before any other thread is started: they have it from this one.
    signals.thread_block().map_err(std::io::Error::from)?;
    std::thread::spawn(move || {
        // A wait that fails leaves the folder to say when to stop.
        if signals.wait().is_ok() {
            cancel.cancel();
        }
    });
    Ok(())
}
