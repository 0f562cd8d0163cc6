//! `flowrun check`.

use crate::args::{GlobalArgs, Select};
use crate::exit::{Exit, Failure};
use crate::surroundings;

/// Checks a pipeline.
#[allow(clippy::print_stdout)]
pub(crate) fn check(select: &Select, global: &GlobalArgs) -> Result<Exit, Failure> {
    let loaded = surroundings::load(select, global)?;
    if !global.quiet {
        let n = loaded.pipeline.steps.len();
        println!("{}: {n} steps, no errors", loaded.pipeline.file.display());
    }
    Ok(Exit::Ok)
}
