//! `flowrun completions`: a script that has the shell ask flowrun itself.

use clap_complete::env::Shells;

use crate::completion::VARIABLE;
use crate::exit::{Exit, Failure};
use crate::output;

/// Prints a shell's completion script.
pub(crate) fn completions(shell: clap_complete::Shell) -> Result<Exit, Failure> {
    let shells = Shells::builtins();
    let name = shell.to_string();
    let Some(shell) = shells.completer(&name) else {
        return Err(Failure::usage(format!(
            "there are no completions for {name}"
        )));
    };
    let mut script = Vec::new();
    shell.write_registration(VARIABLE, "flowrun", "flowrun", "flowrun", &mut script)?;
    output::print(&String::from_utf8_lossy(&script))
}
