//! `/v1/batches`, in OpenAI's shapes: files of requests are answered one after the other, beside
//! the requests that somebody waits for.
//!
//! | file | what |
//! |---|---|
//! | `batch` | what a batch is, and how it is asked for |
//! | `queue` | all batches of a server, on disk after every change |
//! | `lines` | requests and answers on disk |
//! | `worker` | answers |
//! | `routes` | the paths |
//! | `openapi` | what the OpenAPI document says of them |
//!
//! Everything lies in one folder: `files/`, `batches/`. Invariants: a batch that was accepted
//! survives the server, and so does every answer that was written; the next server that is started
//! on the folder answers the rest. What is in memory does not grow with a batch but by the names of
//! its requests.

mod batch;
mod lines;
pub(super) mod openapi;
mod queue;
mod routes;
mod worker;

use std::path::Path;

use super::files::{FileObject, Files};
use super::kept::make;
use super::problem::Problem;
use crate::exit::Failure;
use queue::Queue;

pub(super) use routes::{batch, batches, cancel, create};
pub(super) use worker::work;

/// What uploaded requests are for.
pub(super) const PURPOSE: &str = "batch";

/// What answers batches.
pub(super) struct Batches {
    files: Files,
    queue: Queue,
}

impl Batches {
    /// Opens the folder.
    ///
    /// # Errors
    /// When something in the folder cannot be read or written.
    pub(super) fn open(folder: &Path) -> Result<Self, Failure> {
        let (files, batches) = (folder.join("files"), folder.join("batches"));
        for folder in [&files, &batches] {
            make(folder)?;
        }
        Ok(Self {
            files: Files::new(files),
            queue: Queue::open(batches)?,
        })
    }

    /// Where its files are.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// What is left is for the next server, which has no reason to mistrust it.
    pub(super) fn put_down(&self) {
        self.queue.put_down();
    }

    /// Keeps a file of requests. They are looked at when a batch of them begins.
    pub(super) fn upload(&self, name: &str, bytes: &[u8]) -> Result<FileObject, Problem> {
        self.files.add(name, PURPOSE, bytes, |_| Ok(()))
    }
}
