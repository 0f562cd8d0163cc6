//! What one run of a program costs.
//!
//! Every figure is of a process of its own: seconds of CPU (user and system) of it and
//! all it started, and its peak memory.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::resource::{Usage, UsageWho, getrusage};
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// What of the user's own surroundings would have a run do more than is measured.
const NOT_MEASURED: [&str; 6] = [
    "FLOWRUN_CACHE_DIR",
    "FLOWRUN_REMOTE_READ_ONLY",
    "MLFLOW_TRACKING_URI",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "TRACEPARENT",
];

/// One run of a process.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Cost {
    pub(super) cpu_s: f64,
    pub(super) wall_s: f64,
    pub(super) rss_mib: f64,
}

/// Runs a command in a process whose only child it is, so that the system's sums are its own.
pub(super) fn measure(folder: &Path, command: &[String]) -> Result<Cost, Failure> {
    let mut measuring = Command::new(std::env::current_exe()?);
    for name in NOT_MEASURED {
        measuring.env_remove(name);
    }
    let output = measuring
        .args(["bench", "engine", "--measure"])
        .args(command)
        .current_dir(folder)
        // An empty one is none, whatever a `.flowrun.yaml` above says.
        .env("FLOWRUN_REMOTE", "")
        .stdin(Stdio::null())
        .output()?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Failure::new(Exit::Internal, format!("{}: {text}", command.join(" ")))
    })
}

/// Runs a command that is the only child of this process.
pub(super) fn measured_here(command: &mut Command) -> Result<Cost, Failure> {
    let started = Instant::now();
    let output = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Failure::new(Exit::Internal, text));
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).map_err(std::io::Error::from)?;
    Ok(Cost {
        cpu_s: cpu_seconds(&usage),
        wall_s: started.elapsed().as_secs_f64(),
        // The system counts in KiB.
        rss_mib: usage.max_rss() as f64 / 1024.0,
    })
}

fn cpu_seconds(usage: &Usage) -> f64 {
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}
