//! The words of `flowrun cache`, and what the cache keeps.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use flowrun_engine::{parse_bytes, parse_duration};

use super::candidates;
use crate::completion;

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Show what the cache holds.
    Stats(RetentionArgs),
    /// Read everything and say what is damaged; changes nothing. Exit code 6 when something is.
    Verify,
    /// Set aside what is damaged, so that it is made again; build the index anew.
    Repair,
    /// Remove what no kept run needs, as far as the bounds ask; `--max-size 0` for all of it.
    Gc {
        #[command(flatten)]
        retention: RetentionArgs,
        /// Show what would be removed, remove nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Write runs with all their results, and what their searches worked out, into one file for
    /// `import` on another machine.
    Export {
        /// The file; `.tar.zst` is the usual ending.
        file: PathBuf,
        /// Runs; the last one when left out.
        #[arg(long, add = candidates(completion::runs))]
        run: Vec<String>,
    },
    /// Send every result and kept answer to the remote cache that it lacks.
    Push,
    /// Get every result and kept answer from the remote cache that is not here.
    Pull,
    /// Read a file that `export` wrote.
    Import {
        /// The file.
        file: PathBuf,
    },
}

/// What the cache keeps.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct RetentionArgs {
    /// The results of the last N runs of each pipeline always stay; failed runs count apart.
    #[arg(long, value_name = "N", env = "FLOWRUN_CACHE_KEEP_RUNS", default_value_t = KEEP_RUNS)]
    pub(crate) keep_runs: usize,
    /// Bytes that the cache may grow to (`10GB`, `none`); the least recently used go first.
    #[arg(long, value_name = "SIZE", env = "FLOWRUN_CACHE_MAX_SIZE", default_value = MAX_SIZE, value_parser = parse_size)]
    pub(crate) max_size: Limit<u64>,
    /// Time since the last use after which a result goes (`90d`, `none`).
    #[arg(long, value_name = "AGE", env = "FLOWRUN_CACHE_MAX_AGE", default_value = MAX_AGE, value_parser = parse_age)]
    pub(crate) max_age: Limit<Duration>,
}

/// A bound, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit<T>(pub(crate) Option<T>);

/// Bytes that a cache may grow to, when nothing is said.
const MAX_SIZE: &str = "10GB";
/// Time that an unused result stays, when nothing is said.
const MAX_AGE: &str = "90d";
/// Runs of each pipeline whose results stay, when nothing is said.
const KEEP_RUNS: usize = 10;

fn parse_size(text: &str) -> Result<Limit<u64>, String> {
    match text {
        "none" => Ok(Limit(None)),
        "0" => Ok(Limit(Some(0))),
        text => parse_bytes(text)
            .map(|bytes| Limit(Some(bytes)))
            .map_err(|e| format!("{e}; write for example `10GB`, `500MB`, `0` or `none`")),
    }
}

fn parse_age(text: &str) -> Result<Limit<Duration>, String> {
    match text {
        "none" => Ok(Limit(None)),
        "0" => Ok(Limit(Some(Duration::ZERO))),
        text => parse_duration(text)
            .map(|age| Limit(Some(age)))
            .map_err(|e| format!("{e}; write for example `90d`, `12h`, `0` or `none`")),
    }
}
