//! `flowrun step exec`: the work of one step in a process of its own, or on another machine.
//! `flowrun` starts it; it is hidden from the help.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use flowrun_engine::runner::{
    Ground, Host, Outpost, Post, exec as exec_request, exec_job as work_on,
};
use flowrun_engine::step::Cancel;

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
    let console = print_into(&post.log()?)?;
    let cancel = Cancel::default();
    stop_on_signal(cancel.clone())?;
    let well = work_on(host()?, post, &cancel, console, abandoned).map_err(usage)?;
    Ok(exit(well, &cancel))
}

/// Does the work of the job `id` whose order lies in the remote store of this URL.
pub(crate) fn exec_through(url: &str, id: &Path) -> Result<Exit, Failure> {
    let usage = |e: flowrun_engine::runner::ExecError| Failure::usage(e.to_string());
    let cancel = Cancel::default();
    stop_on_signal(cancel.clone())?;
    // For its owner alone, and removed at the end.
    let scratch = tempfile::Builder::new().prefix("flowrun-job-").tempdir()?;
    let env = surroundings::environment();
    let ground = Ground {
        scratch: scratch.path(),
        user_cache: &surroundings::user_cache(&env),
        env: &env,
    };
    let id = id.display().to_string();
    let Some(outpost) = Outpost::take(url, &id, &ground, &cancel).map_err(usage)? else {
        // Somebody else has it, or nobody wants it any more.
        return Ok(Exit::Ok);
    };
    let console = print_into(&outpost.log()?)?;
    let well = outpost.exec(host()?, console, abandoned).map_err(usage)?;
    Ok(exit(well, &cancel))
}

/// From now on what is printed goes into this file; where it went before.
fn print_into(log: &File) -> Result<File, Failure> {
    let console = File::from(nix::unistd::dup(std::io::stderr()).map_err(std::io::Error::from)?);
    nix::unistd::dup2_stdout(log).map_err(std::io::Error::from)?;
    nix::unistd::dup2_stderr(log).map_err(std::io::Error::from)?;
    Ok(console)
}

fn exit(well: bool, cancel: &Cancel) -> Exit {
    match well {
        true => Exit::Ok,
        false if cancel.is_cancelled() => Exit::Interrupted,
        false => Exit::StepFailed,
    }
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

/// A job system ends a job by SIGTERM. A handler hears it, not a blocked signal: what the step
/// starts would have the block too, and no `kill` of a command would reach another.
fn stop_on_signal(cancel: Cancel) -> Result<(), Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let entered = runtime.enter();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    drop(entered);
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        cancel.cancel();
    });
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use super::*;

    #[test]
    fn a_signal_asks_the_work_to_stop_and_still_reaches_what_it_starts() {
        let cancel = Cancel::default();
        assert!(stop_on_signal(cancel.clone()).is_ok());
        let mut shell = std::process::Command::new("/bin/sh");
        let status = shell
            .args(["-c", "kill -TERM $$; exit 0"])
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32));
        assert!(!cancel.is_cancelled());
        raise(Signal::SIGTERM).unwrap();
        while !cancel.is_cancelled() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
