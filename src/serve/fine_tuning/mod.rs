//! `/v1/files` and `/v1/fine_tuning/jobs`, in OpenAI's shapes: chats are uploaded, jobs train
//! adapters over the served base model one after the other, and every checkpoint is a model of
//! this server.
//!
//! | file | what |
//! |---|---|
//! | `files` | uploaded chats |
//! | `jobs` | what a job is, and how it is asked for |
//! | `worker` | the thread that trains |
//! | `routes` | the paths |
//! | `openapi` | what the OpenAPI document says of them |
//!
//! Everything lies in one folder: `files/`, `jobs/`, `adapters/`. Invariant: a job that was
//! accepted survives the server; the next one that is started on the folder goes on with it.

mod files;
mod jobs;
pub(super) mod openapi;
mod routes;
mod worker;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use flowrun_cache::Digest;
use flowrun_engine::step::World;
use flowrun_steps::models::EmbeddedSpec;

use crate::exit::{Exit, Failure};
use files::Files;
use jobs::Jobs;

pub(super) use files::FILE;
pub(super) use routes::{
    cancel, checkpoints, create_job, delete_file, events, file, file_content, files, job, jobs,
    upload,
};

/// Digits of a random id.
const ID: usize = 24;

/// What trains here.
pub(super) struct FineTuning {
    files: Files,
    jobs: Arc<Jobs>,
}

impl FineTuning {
    /// The folder of the adapters that come of it.
    pub(super) fn adapters(folder: &Path) -> PathBuf {
        folder.join("adapters")
    }

    /// Opens the folder, and goes on with what is not done.
    ///
    /// # Errors
    /// When something in the folder cannot be read or written.
    pub(super) fn open(
        folder: &Path,
        base_id: &str,
        spec: &EmbeddedSpec,
        world: &World,
    ) -> Result<Self, Failure> {
        let make = |name: &str| -> Result<PathBuf, Failure> {
            let path = folder.join(name);
            std::fs::create_dir_all(&path)
                .map_err(|e| Failure::new(Exit::Internal, format!("{}: {e}", path.display())))?;
            Ok(path)
        };
        let files = Files::new(make("files")?);
        let jobs = Jobs::open(make("jobs")?, base_id)?;
        let adapters = Self::adapters(folder);
        make("adapters")?;
        worker::start(
            Arc::clone(&jobs),
            files.clone(),
            adapters,
            spec.clone(),
            world.clone(),
        );
        Ok(Self { files, jobs })
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// An id that no other thing of this server has.
fn new_id(prefix: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = since.map_or(0, |since| since.as_nanos());
    let digest = Digest::of_bytes(format!("{nanos} {count} {}", std::process::id()).as_bytes());
    let hex = digest.to_hex();
    format!("{prefix}-{}", &hex[..ID])
}

/// Whether a caller's id is one of ours by its looks: it becomes part of a path.
fn is_id(id: &str, prefix: &str) -> bool {
    let digits = id
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('-'));
    digits.is_some_and(|digits| digits.len() == ID && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Writes a file whole: after a power cut it is the old one or the new one.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let part = path.with_extension("part");
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&part, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_callers_lead_nowhere_else() {
        let id = new_id("file");
        assert!(is_id(&id, "file"));
        assert_ne!(id, new_id("file"));
        for id in [
            "",
            "file-",
            "file-../../../../etc/passwd00",
            "job-0",
            "file",
        ] {
            assert!(!is_id(id, "file"), "{id}");
        }
    }
}
