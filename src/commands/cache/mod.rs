//! `flowrun cache …`.

mod archive;
mod gc;
mod remote;
mod stats;
mod verify;

pub(crate) use gc::{removed, retention};

use crate::args::{CacheCommand, GlobalArgs};
use crate::exit::{Exit, Failure};

/// Does what was asked of the cache.
pub(crate) fn cache(command: &CacheCommand, global: &GlobalArgs) -> Result<Exit, Failure> {
    let makes_it = matches!(command, CacheCommand::Import { .. } | CacheCommand::Pull);
    if !makes_it && !global.cache_dir.is_dir() {
        return Err(Failure::usage(format!(
            "there is no cache at {}; the first run makes it, `--cache-dir` names another",
            global.cache_dir.display()
        )));
    }
    match command {
        CacheCommand::Stats(args) => stats::stats(args, global),
        CacheCommand::Verify => verify::verify(global),
        CacheCommand::Repair => verify::repair(global),
        CacheCommand::Gc { retention, dry_run } => gc::gc(retention, *dry_run, global),
        CacheCommand::Export { file, run } => archive::export(file, run, global),
        CacheCommand::Import { file } => archive::import(file, global),
        CacheCommand::Push => remote::push(global),
        CacheCommand::Pull => remote::pull(global),
    }
}
