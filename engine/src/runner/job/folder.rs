//! The files of a job: `jobs/<action key>/` in the cache, and in it a folder for each attempt.
//!
//! | file | written by | what |
//! |---|---|---|
//! | `job.json` | runner | which attempt was ordered last, where, under which id |
//! | `N/request.json` | runner | what is to be done; no secrets |
//! | `N/environment.json` | runner | secrets and other variables of this side; removed by the other end once it was read |
//! | `N/cancel` | runner | stop |
//! | `N/place/in`, `N/place/out`, `N/place/work` | both | where the work is done |
//! | `N/claimed` | other end | somebody works for this attempt |
//! | `N/alive` | other end | counts up while it works |
//! | `N/messages.jsonl` | other end | what it says, its response last |
//! | `N/console` | job system | what the process prints before it takes the job, where there is no other log |
//! | `N/log` | other end | what it and its libraries print |
//!
//! A folder that is gone means stop, as `cancel` does. Its owner alone reads what is in it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::CONSOLE;

/// Lines of a console that are told.
const LINES: usize = 20;
/// Version of `job.json`. Another one on disk is as good as none.
pub(super) const JOB_VERSION: u32 = 1;

/// What was ordered last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ordered {
    pub(super) version: u32,
    /// Name of the job system.
    pub(super) system: String,
    pub(super) id: String,
    pub(super) attempt: u32,
    /// The remote store through which the job's files pass; none where its folder is shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) through: Option<String>,
}

/// `jobs/<action key>/`.
#[derive(Debug)]
pub(super) struct JobFolder(PathBuf);

impl JobFolder {
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// What was ordered by whoever ran the action last, if it can be told.
    pub(super) fn ordered(&self) -> Option<Ordered> {
        let ordered: Ordered = read(&self.0.join("job.json"))?;
        (ordered.version == JOB_VERSION).then_some(ordered)
    }

    /// Writes down what is about to be ordered.
    pub(super) fn order(&self, ordered: &Ordered) -> io::Result<()> {
        write(&self.0.join("job.json"), ordered, 0o644)
    }

    pub(super) fn attempt(&self, number: u32) -> AttemptFolder {
        AttemptFolder(self.0.join(number.to_string()))
    }

    /// Removes everything. Whoever still works there stops.
    pub(super) fn remove(&self) {
        // First of all, so that what a kill leaves is nothing to go on with.
        let _ = std::fs::remove_file(self.0.join("job.json"));
        // A worker may write to it at this moment; what stays is removed with the cache's garbage.
        for _ in 0..3 {
            if std::fs::remove_dir_all(&self.0).is_ok() || !self.0.exists() {
                return;
            }
        }
    }
}

/// The folder of one attempt.
#[derive(Debug, Clone)]
pub(super) struct AttemptFolder(PathBuf);

impl AttemptFolder {
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn place(&self) -> PathBuf {
        self.0.join("place")
    }

    pub(super) fn messages(&self) -> PathBuf {
        self.0.join("messages.jsonl")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// What its process printed before it began, where the job system writes that here.
    pub(super) fn console(&self) -> String {
        let bytes = std::fs::read(self.0.join(CONSOLE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }

    /// Makes it anew, empty. What is in it is for its owner alone: programs print what they like.
    pub(super) fn make(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(parent) = self.0.parent() {
            std::fs::create_dir_all(parent)?;
        }
        DirBuilder::new().mode(0o700).create(&self.0)?;
        for folder in ["place/in", "place/out", "place/work"] {
            std::fs::create_dir_all(self.0.join(folder))?;
        }
        Ok(())
    }

    pub(super) fn write_request(&self, request: &impl Serialize) -> io::Result<()> {
        write(&self.0.join("request.json"), request, 0o644)
    }

    pub(super) fn request<T: DeserializeOwned>(&self) -> Result<T, String> {
        let path = self.0.join("request.json");
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))
    }

    pub(super) fn write_environment(&self, variables: &impl Serialize) -> io::Result<()> {
        write(&self.0.join("environment.json"), variables, 0o600)
    }

    /// The variables for the work, which are there once.
    pub(super) fn take_environment<T: DeserializeOwned + Default>(&self) -> T {
        let path = self.0.join("environment.json");
        let variables = read(&path).unwrap_or_default();
        let _ = std::fs::remove_file(path);
        variables
    }

    pub(super) fn cancel(&self) {
        // The job system is asked to stop the job too.
        let _ = File::create(self.0.join("cancel"));
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.0.join("cancel").exists() || !self.0.join("request.json").exists()
    }

    /// Takes the attempt for this process; false when another has it.
    pub(super) fn claim(&self) -> io::Result<bool> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(self.0.join("claimed"));
        match file {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn is_claimed(&self) -> bool {
        self.0.join("claimed").exists()
    }

    pub(super) fn beat(&self, count: u64) {
        // A beat that is lost is followed by another.
        let _ = write(&self.0.join("alive"), &count, 0o644);
    }

    pub(super) fn last_beat(&self) -> Option<u64> {
        read(&self.0.join("alive"))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Whole or not at all, and on the disk.
fn write(path: &Path, value: &impl Serialize, mode: u32) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&new)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_data()?;
    std::fs::rename(new, path)
}
