//! `/v1/fine_tuning/jobs`, in OpenAI's shapes: chats are uploaded, jobs train adapters over the
//! served base model one after the other, and every checkpoint is a model of this server.
//!
//! | file | what |
//! |---|---|
//! | `jobs` | what a job is, and how it is asked for |
//! | `worker` | the thread that trains |
//! | `routes` | the paths |
//! | `openapi` | what the OpenAPI document says of them |
//!
//! Everything lies in one folder: `files/`, `jobs/`, `adapters/`. Invariant: a job that was
//! accepted survives the server; the next one that is started on the folder goes on with it. One
//! server at a time trains, the one that holds the lock in `jobs/`; another one waits for its turn.

mod jobs;
pub(super) mod openapi;
mod routes;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowrun_engine::step::World;
use flowrun_steps::finetune::tuning::read_chats;
use flowrun_steps::models::EmbeddedSpec;

use super::files::{FileObject, Files};
use super::kept::{make, sweep};
use super::problem::Problem;
use super::turn::Turn;
use crate::exit::Failure;
use jobs::Jobs;

pub(super) use routes::{cancel, checkpoints, create_job, events, job, jobs};

/// What uploaded chats are for.
pub(super) const PURPOSE: &str = "fine-tune";

/// What trains here.
pub(super) struct FineTuning {
    files: Files,
    jobs: Arc<Jobs>,
    /// The id of the model that adapters are trained of.
    base_id: String,
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
        let adapters = Self::adapters(folder);
        let (files, jobs) = (folder.join("files"), folder.join("jobs"));
        for folder in [&files, &jobs, &adapters] {
            make(folder)?;
        }
        for folder in [&files, &jobs] {
            sweep(folder);
        }
        let files = Files::new(files);
        let turn = Turn::of(&jobs)?;
        let jobs = Arc::new(Jobs::open(jobs)?);
        if turn.take()? {
            jobs.take_over()?;
        }
        worker::start(
            Arc::clone(&jobs),
            turn,
            files.clone(),
            adapters,
            spec.clone(),
            world.clone(),
        );
        Ok(Self {
            files,
            jobs,
            base_id: base_id.to_owned(),
        })
    }

    /// The server ends in good order: it is no fault of the job that is trained, and the next server
    /// goes on with it.
    pub(super) fn put_down(&self) {
        self.jobs.put_down(|job| job.starts = 0);
    }

    /// Whether a file's chats are those of a job that has not ended.
    pub(super) fn needs(&self, file: &str) -> bool {
        self.jobs.any_open(|job| job.training_file == file)
    }

    /// Where its files are.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// Keeps a file of chats.
    pub(super) fn upload(&self, name: &str, bytes: &[u8]) -> Result<FileObject, Problem> {
        self.files.add(name, PURPOSE, bytes, |path| {
            let shown = path.display().to_string();
            let read = read_chats(path).map(|_| ());
            read.map_err(|e| Problem::bad(e.message.replace(&shown, name)).of("file"))
        })
    }
}
