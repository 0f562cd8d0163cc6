//! The words of `flowrun bench`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand};

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
    /// Many rows: peak memory and time of `load`, `filter-top-n`, `split`, `convert-to-messages` and
    /// `bootstrap`, each in a process of its own, and of all of them in one run. Needs room in the
    /// temporary folder (`TMPDIR`), several times that of the rows.
    Rows(RowsBench),
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
pub(crate) struct RowsBench {
    /// Rows, of about 70 bytes in CSV; one measurement for each number.
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1000,100000",
        value_parser = clap::value_parser!(u64).range(10..))]
    pub(crate) rows: Vec<u64>,
    /// Leave out `bootstrap`, which takes longest, where there are more rows than this. It asks a
    /// server on loopback that answers at once, in the measuring process.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub(crate) label_rows: u64,
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
