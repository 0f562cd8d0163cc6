//! The command line's words. Their doc comments are the help.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Args as ClapArgs, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use flowrun_engine::{parse_bytes, parse_duration};

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
pub(crate) enum BenchCommand {
    /// Training, reading prompts and generating with the embedded model, against what the rate
    /// of matrix products allows. Takes some minutes.
    Model {
        /// A GGUF file, or a folder with `config.json`, `*.safetensors` and the tokenizer's files;
        /// SmolLM2-135M-Instruct, fetched as pipelines fetch it, when left out.
        #[arg(long, value_name = "FILE")]
        model: Option<PathBuf>,
    },
    /// The engine: 10,000 steps with nothing to do, 1,000 steps to run, one source changed.
    Engine(EngineBench),
    /// A server that is up, at several numbers of clients: queries a second, how long they take,
    /// how many are refused, the server's memory and processor time.
    Serve(ServeBench),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ServeBench {
    /// The server's address, `http://127.0.0.1:8000`; its key is taken from `FLOWRUN_API_KEY`.
    pub(crate) url: String,
    /// Clients at once, one measurement each; a client asks again as soon as it was answered.
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1,4,16,64",
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) clients: Vec<u16>,
    /// Seconds of each measurement.
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seconds: u64,
    /// A file of texts to ask, one a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) texts: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct EngineBench {
    /// A tenth of the work.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Run this and print what it cost.
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    pub(crate) measure: Vec<String>,
    /// Run so many steps inside this process.
    #[arg(long, hide = true)]
    pub(crate) in_process: Option<usize>,
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
pub(crate) struct ServeArgs {
    /// A bundle's folder, made by a `deploy` step; or a base model: a GGUF file, or a folder with
    /// config.json, *.safetensors and the tokenizer's files.
    #[arg(value_name = "BUNDLE|MODEL")]
    pub(crate) target: PathBuf,
    /// Address to listen on; any but a loopback one needs FLOWRUN_API_KEY, the callers' key.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Folder of adapters (PEFT), each a folder in it: served as `base:folder`, loaded when asked
    /// for. Repeatable. Adapters come from nowhere else.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) adapters: Vec<PathBuf>,
    /// Train adapters of the base model for callers (OpenAI's fine-tuning API), and keep files,
    /// jobs and adapters in this folder. One job at a time, beside the answers
    #[arg(long, value_name = "FOLDER")]
    pub(crate) fine_tuning: Option<PathBuf>,
    /// Answer files of requests (OpenAI's Batch API), and keep requests, batches and answers in
    /// this folder. One batch at a time, beside other requests
    #[arg(long, value_name = "FOLDER")]
    pub(crate) batches: Option<PathBuf>,
    /// Adapters in memory; what was unused longest is dropped for a new one.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) max_adapters: usize,
    /// Id of a base model; its file's name when left out.
    #[arg(long, value_name = "ID")]
    pub(crate) name: Option<String>,
    /// Requests that are computed together.
    #[arg(long, value_name = "N")]
    pub(crate) max_batch: Option<usize>,
    /// Requests that wait; later ones are refused with 429.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_queue: usize,
    /// Seconds that an answer may take, waiting included.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) timeout: u64,
    /// Seconds that a client may take to send its request.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub(crate) read_timeout: u64,
    /// Seconds that a client may take nothing of an answer that is there for it.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) write_timeout: u64,
    /// Seconds that requests under way may take once the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) drain: u64,
    /// Listen beside another server of the same user on the same port.
    #[arg(long, hide = true)]
    pub(crate) share_port: bool,
    /// Stop when stdin ends: with the process that holds its other end.
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,
}

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

#[derive(Debug, Subcommand)]
pub(crate) enum DeployCommand {
    /// List what is deployed on this machine and, from here, on Ray clusters; or one of it.
    Status {
        /// Its name.
        name: Option<String>,
        #[command(flatten)]
        place: DeployPlace,
    },
    /// Serve again what was served before, once it has answered its smoke rows.
    Rollback {
        /// Its name.
        name: String,
        #[command(flatten)]
        place: DeployPlace,
    },
    /// Ask a server whether it is up, and with a bundle whether it answers as evaluated.
    Check {
        /// Its address, such as `http://127.0.0.1:8000`.
        url: String,
        /// The bundle that it serves: its smoke rows are asked.
        #[arg(long, value_name = "FOLDER")]
        bundle: Option<PathBuf>,
    },
    /// Write the files that a bundle needs to run elsewhere.
    Render {
        /// The bundle's folder.
        bundle: PathBuf,
        /// Where it is to run; without it, the targets are listed.
        #[arg(long)]
        target: Option<String>,
        /// The folder for the files.
        #[arg(short, long, default_value = ".")]
        output: PathBuf,
        /// Set one of `settings`: `--set replicas=3`.
        #[arg(long, value_name = "NAME=VALUE", value_parser = parse_set)]
        set: Vec<(String, String)>,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DeployPlace {
    /// The folder where deployed bundles lie.
    #[arg(long, value_name = "FOLDER", default_value = "deployed")]
    pub(crate) folder: PathBuf,
    /// Where it is deployed, if that is several places.
    #[arg(long)]
    pub(crate) target: Option<DeployedOn>,
}

/// A target that `deploy` keeps the way back of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeployedOn {
    /// This machine.
    Local,
    /// A Ray cluster.
    RayServe,
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

/// Values that the shell offers.
fn candidates<F, T>(values: F) -> ArgValueCandidates
where
    F: Fn() -> Vec<T> + Send + Sync + 'static,
    T: Into<CompletionCandidate> + 'static,
{
    ArgValueCandidates::new(move || values().into_iter().map(Into::into).collect())
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
