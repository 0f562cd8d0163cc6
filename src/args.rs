//! The command line's words. Their doc comments are the help.
//!
//! Commands with many words of their own have a file each.

mod bench;
mod cache;
mod deploy;
mod select;
mod serve;

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Args as ClapArgs, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};

pub(crate) use bench::{BenchCommand, EngineBench, RowsBench, ServeBench};
pub(crate) use cache::{CacheCommand, RetentionArgs};
pub(crate) use deploy::{DeployCommand, DeployPlace, DeployedOn};
pub(crate) use select::{PlanArgs, RunArgs, Scope, Select};
pub(crate) use serve::ServeArgs;

use crate::completion;

/// Runs a pipeline: a YAML file whose steps form a graph.
///
/// Every step's inputs are hashed; a step whose inputs did not change is taken
/// from the cache. Exit codes: 0 ok, 1 internal error, 2 usage, 3 invalid
/// pipeline or input, 4 a step failed, 5 a gate was not met and no step failed
/// otherwise, 6 cache unusable, 130 interrupted.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten, next_help_heading = "Global options")]
    pub(crate) global: GlobalArgs,
}

impl Args {
    /// As [`Parser::parse`]. Options of a run before another command are refused: they would mean
    /// nothing. Global ones may stand there.
    pub(crate) fn of_the_command_line() -> Self {
        let mut program = Self::command();
        let matches = program.get_matches_mut();
        let run = RunArgs::augment_args(clap::Command::new("run"));
        let given = |arg: &&clap::Arg| {
            matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        if let (Some(command), Some(arg)) =
            (matches.subcommand_name(), run.get_arguments().find(given))
        {
            let id = || format!("`{}`", arg.get_id());
            let arg = arg.get_long().map_or_else(id, |long| format!("`--{long}`"));
            let text = format!("{arg} belongs to a run, not before `{command}`");
            program.error(ErrorKind::ArgumentConflict, text).exit();
        }
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut program).exit())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check a pipeline, run nothing.
    Check(Select),
    /// Show what a run would do, and why.
    Plan(PlanArgs),
    /// Show why a step would run.
    Why {
        /// Step, or one of its items (`evaluate[epoch-2]`).
        #[arg(add = candidates(completion::steps))]
        step: String,
        #[command(flatten)]
        select: Select,
    },
    /// Draw the graph of a pipeline.
    Graph(GraphArgs),
    /// List the runs in the cache, newest first.
    Runs {
        /// Show so many; all when 0.
        #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
        limit: usize,
    },
    /// Show a run, or one of its steps with its log.
    Show {
        /// Run: its id, the beginning or end of it, `last`, or `last~1` for the one before.
        #[arg(add = candidates(completion::runs))]
        run: Option<String>,
        /// Step id (`evaluate[epoch-2]`). A step id alone means the last run.
        #[arg(add = candidates(completion::steps))]
        step: Option<String>,
    },
    /// Show what differs between two runs: params, keys, metrics, outputs.
    Diff {
        /// The run to compare with; the one before the last when left out.
        #[arg(add = candidates(completion::runs))]
        old: Option<String>,
        /// The run to compare; the last one when left out.
        #[arg(add = candidates(completion::runs))]
        new: Option<String>,
    },
    /// Open the report of a run in the browser; print its path.
    Open {
        /// Run; the last one with a report when left out.
        #[arg(add = candidates(completion::runs))]
        run: Option<String>,
    },
    /// Show where an artifact comes from: which steps, runs and inputs made it, up to the sources.
    Lineage {
        /// A file, the beginning of a digest, or an output: `step.output`, `step[item].output`.
        artifact: String,
        /// Look in this run; the last one that has the artifact when left out.
        #[arg(long, add = candidates(completion::runs))]
        run: Option<String>,
    },
    /// Look after the cache: what it holds, damage, garbage, moving runs.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Write a new pipeline for your own labelled texts.
    Init(InitArgs),
    /// Check what this machine lacks to run a pipeline: disk, cache, package client, weights,
    /// data, keys, servers. Exit code 3 when something is missing, 6 when the cache is unusable.
    Doctor(DoctorArgs),
    /// List the step kinds, or describe one.
    Steps {
        /// Step kind.
        #[arg(add = candidates(completion::kinds))]
        kind: Option<String>,
    },
    /// Print the JSON Schema of pipelines, of step definitions, of a step kind's `with`, or of events.
    Schema {
        /// Step kind.
        #[arg(add = candidates(completion::kinds))]
        kind: Option<String>,
        /// The schema of one line of `--json`.
        #[arg(long, conflicts_with = "kind")]
        events: bool,
        /// Of step definitions: the files that `uses: ./steps/clean.yaml` names.
        #[arg(long, conflicts_with_all = ["kind", "events"])]
        definition: bool,
    },
    /// The entry of steps that run in a process of their own.
    #[command(hide = true, subcommand)]
    Step(StepCommand),
    /// Serve a bundle, or a base model with adapters: `POST /predict`, and OpenAI's API.
    Serve(ServeArgs),
    /// Measure this machine.
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// What is deployed: its state, the way back, and files for other places to run.
    #[command(subcommand)]
    Deploy(DeployCommand),
    /// Print a shell's completion script; it completes steps, runs and step kinds too.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man {
        /// Write the page of each command into this folder instead.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum StepCommand {
    /// Do the work of one request from stdin, or of a job.
    Exec {
        /// Folder of a job, instead of a request from stdin; its id with `--through`.
        #[arg(long)]
        job: Option<PathBuf>,
        /// URL of the remote store in which the job's order lies.
        #[arg(long, requires = "job")]
        through: Option<String>,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct GlobalArgs {
    /// Cache folder.
    #[arg(
        long,
        global = true,
        env = "FLOWRUN_CACHE_DIR",
        default_value = ".flowrun"
    )]
    pub(crate) cache_dir: PathBuf,
    /// Folder of files that stand in for downloads, looked up by sha256.
    #[arg(long, global = true, env = "FLOWRUN_DISTDIR")]
    pub(crate) distdir: Option<PathBuf>,
    /// Cache shared with other machines, asked for what the local one lacks and given what runs
    /// make: `s3://bucket/path`, `gs://bucket/path`, `az://container/path`, or a folder. Else the
    /// `remote` of the file `.flowrun.yaml`; an empty one is none.
    /// Credentials come from the environment (AWS_…, GOOGLE_…, AZURE_…).
    #[arg(long, global = true, value_name = "URL", env = "FLOWRUN_REMOTE")]
    pub(crate) remote: Option<String>,
    /// Send nothing to the remote cache.
    #[arg(long, global = true, env = "FLOWRUN_REMOTE_READ_ONLY",
        value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) remote_read_only: bool,
    /// Where models of this process compute: `cpu` (the default), `cuda` (the first NVIDIA GPU, in
    /// f32), `cuda-tf32` (the same, faster and less exact), or `auto` (a GPU where there is one).
    /// Needs a build with the feature `cuda`.
    #[arg(long, global = true, value_name = "DEVICE", env = "FLOWRUN_DEVICE",
        value_parser = devices())]
    pub(crate) device: Option<String>,
    /// Use no network.
    #[arg(long, global = true)]
    pub(crate) offline: bool,
    /// Fail at once when another process holds the cache.
    #[arg(long, global = true)]
    pub(crate) no_wait: bool,
    /// One JSON object a line on stdout.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say more.
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
    /// Say only what went wrong.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
}

/// The words for devices. A variable that is there and empty says nothing.
fn devices() -> PossibleValuesParser {
    let nothing = PossibleValue::new("").hide(true);
    let names = ["cpu", "cuda", "cuda-tf32", "auto"].map(PossibleValue::new);
    PossibleValuesParser::new(names.into_iter().chain([nothing]))
}

#[derive(Debug, ClapArgs)]
pub(crate) struct GraphArgs {
    #[command(flatten)]
    pub(crate) select: Select,
    /// Write to a file; its ending says the format.
    #[arg(short, long)]
    pub(crate) output: Option<PathBuf>,
    /// Format; by the file's ending, or text.
    #[arg(long)]
    pub(crate) format: Option<GraphFormat>,
    /// Mark each step with how it ended in the last run.
    #[arg(long)]
    pub(crate) status: bool,
    /// Every step and every edge: fold nothing, leave nothing out.
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct InitArgs {
    /// CSV, JSONL or Parquet file with texts and their labels.
    pub(crate) data: Option<PathBuf>,
    /// Column of the texts.
    #[arg(long, value_name = "COLUMN")]
    pub(crate) text: Option<String>,
    /// Column of the labels.
    #[arg(long, value_name = "COLUMN")]
    pub(crate) label: Option<String>,
    /// File of rows to test on; without it a fifth of the rows is set aside.
    #[arg(long, value_name = "FILE")]
    pub(crate) test: Option<PathBuf>,
    /// Name of the pipeline; the file's name when left out.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where to write it; `pipelines/NAME.yaml` when left out.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Write over a pipeline that is there.
    #[arg(long)]
    pub(crate) force: bool,
    /// Ask nothing, also on a terminal.
    #[arg(short, long)]
    pub(crate) yes: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) select: Select,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GraphFormat {
    /// Plain text.
    Text,
    /// Scalable Vector Graphics.
    Svg,
    /// A picture.
    Png,
    /// Mermaid flowchart.
    #[value(alias = "mmd")]
    Mermaid,
    /// Graphviz.
    Dot,
    /// JSON.
    Json,
    /// A page with the drawing.
    Html,
}

/// Values that the shell offers.
fn candidates<F, T>(values: F) -> ArgValueCandidates
where
    F: Fn() -> Vec<T> + Send + Sync + 'static,
    T: Into<CompletionCandidate> + 'static,
{
    ArgValueCandidates::new(move || values().into_iter().map(Into::into).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
