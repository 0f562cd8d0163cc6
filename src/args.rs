//! The command line's words. Their doc comments are the help.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Runs a pipeline: a YAML file whose steps form a graph.
///
/// Every step's inputs are hashed; a step whose inputs did not change is taken
/// from the cache. Exit codes: 0 ok, 1 internal error, 2 usage, 3 invalid
/// pipeline or input, 4 a step failed, 5 a gate was not met, 6 cache unusable,
/// 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check a pipeline, run nothing.
    Check(Select),
    /// Show what a run would do, and why.
    Plan(Select),
    /// Show why a step would run.
    Why {
        /// Step, or one of its items (`evaluate[epoch-2]`).
        step: String,
        #[command(flatten)]
        select: Select,
    },
    /// Draw the graph of a pipeline.
    Graph(GraphArgs),
    /// List the runs in the cache, newest first.
    Runs,
    /// Show a run, or one of its steps with its log.
    Show {
        /// Run id; the newest when left out.
        run: Option<String>,
        /// Step id.
        step: Option<String>,
    },
    /// List the step kinds, or describe one.
    Steps {
        /// Step kind.
        kind: Option<String>,
    },
    /// Print the JSON Schema of pipelines, or of a step kind's `with`.
    Schema {
        /// Step kind.
        kind: Option<String>,
    },
    /// Serve a bundle over HTTP: `POST /predict`, and OpenAI's `/v1/chat/completions`.
    Serve(ServeArgs),
    /// Print a shell's completion script.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
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
    /// Use no network.
    #[arg(long, global = true)]
    pub(crate) offline: bool,
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
    /// Re-run this step and all after it; the rest comes from the cache, or is run if missing.
    #[arg(long, value_name = "STEP", conflicts_with_all = ["only"])]
    pub(crate) from: Option<String>,
    /// Run this step and what it needs, nothing else.
    #[arg(long, value_name = "STEP", conflicts_with_all = ["only"])]
    pub(crate) until: Option<String>,
    /// Re-run this step alone.
    #[arg(long, value_name = "STEP")]
    pub(crate) only: Option<String>,
    /// Re-run everything.
    #[arg(long)]
    pub(crate) force: bool,
    /// Show what would run, run nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Steps at once; the number of cores when left out.
    #[arg(short, long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Go on with what does not depend on a failed step.
    #[arg(short, long)]
    pub(crate) keep_going: bool,
    /// Fail at once when another run holds the cache.
    #[arg(long)]
    pub(crate) no_wait: bool,
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
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ServeArgs {
    /// The bundle's folder, made by a `deploy` step.
    pub(crate) bundle: PathBuf,
    /// Address to listen on; any but a loopback one needs FLOWRUN_API_KEY, the callers' key.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Stop when stdin ends: with the process that holds its other end.
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GraphFormat {
    /// Plain text.
    Text,
    /// Scalable Vector Graphics.
    Svg,
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

fn parse_set(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
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
