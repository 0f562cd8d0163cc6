//! `flowrun completions`.

use clap::CommandFactory;

use crate::args::Args;
use crate::exit::{Exit, Failure};

/// Prints a shell's completion script.
pub(crate) fn completions(shell: clap_complete::Shell) -> Result<Exit, Failure> {
    clap_complete::generate(
        shell,
        &mut Args::command(),
        "flowrun",
        &mut std::io::stdout(),
    );
    Ok(Exit::Ok)
}
