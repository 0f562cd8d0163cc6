//! The words of `flowrun deploy`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};

use super::select::parse_set;

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
