//! Which pipeline, which of its steps, and how they are run.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::{RetentionArgs, candidates};
use crate::completion;

/// Which pipeline, and with what laid over it.
#[derive(Debug, ClapArgs)]
pub(crate) struct Select {
    /// Pipeline file. Without it: the last one run here, else the only one in `pipelines/`.
    pub(crate) pipeline: Option<PathBuf>,
    /// Set a param: `--set labels=10`.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_set)]
    pub(crate) set: Vec<(String, String)>,
    /// Lay a profile over the pipeline; repeatable, in order.
    #[arg(long)]
    pub(crate) profile: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) select: Select,
    #[command(flatten)]
    pub(crate) scope: Scope,
    /// Show what would run, run nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Steps at once; the number of cores when left out.
    #[arg(short, long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Go on with what does not depend on a failed step.
    #[arg(short, long)]
    pub(crate) keep_going: bool,
    #[command(flatten, next_help_heading = "Cache, looked after when the run ends")]
    pub(crate) retention: RetentionArgs,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) select: Select,
    #[command(flatten)]
    pub(crate) scope: Scope,
}

/// Which steps take part, and which of them run even if nothing changed.
#[derive(Debug, Default, ClapArgs)]
pub(crate) struct Scope {
    /// Re-run this step and all after it; the rest comes from the cache, or is run if missing.
    #[arg(long, value_name = "STEP", conflicts_with_all = ["only"], add = candidates(completion::steps))]
    pub(crate) from: Option<String>,
    /// Run this step and what it needs, nothing else.
    #[arg(long, value_name = "STEP", conflicts_with_all = ["only"], add = candidates(completion::steps))]
    pub(crate) until: Option<String>,
    /// Re-run this step alone.
    #[arg(long, value_name = "STEP", add = candidates(completion::steps))]
    pub(crate) only: Option<String>,
    /// Re-run everything.
    #[arg(long)]
    pub(crate) force: bool,
}

/// `NAME=VALUE`.
pub(super) fn parse_set(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}
