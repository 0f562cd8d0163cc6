//! `flowrun step exec`: the work of one step in a process of its own. `flowrun` starts it; it is
//! hidden from the help.

use std::fs::File;

use flowrun_engine::runner::{Host, exec as exec_request};

use crate::exit::{Exit, Failure};
use crate::surroundings;

/// Reads a request from stdin, does the work and writes messages to stdout.
pub(crate) fn exec() -> Result<Exit, Failure> {
    // Standard output carries messages alone: what libraries print goes to the log.
    let messages = File::from(nix::unistd::dup(std::io::stdout()).map_err(std::io::Error::from)?);
    nix::unistd::dup2_stdout(std::io::stderr()).map_err(std::io::Error::from)?;
    let host = Host {
        vocabulary: flowrun_steps::registry(),
        env: surroundings::environment(),
        exe: std::env::current_exe()?,
    };
    let abandoned = || std::process::exit(Exit::Interrupted as i32);
    exec_request(host, std::io::stdin(), messages, abandoned)
        .map_err(|e| Failure::usage(e.to_string()))?;
    Ok(Exit::Ok)
}
