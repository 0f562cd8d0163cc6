//! `flowrun man`: the manual, from the same list of flags as the help.

use std::path::Path;

use clap::CommandFactory;

use crate::args::Args;
use crate::exit::{Exit, Failure};
use crate::output;

/// Prints the main page, or writes one page a command into a folder.
pub(crate) fn man(dir: Option<&Path>) -> Result<Exit, Failure> {
    let command = Args::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return output::print(&String::from_utf8_lossy(&page));
    };
    std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command, dir))?;
    Ok(Exit::Ok)
}
