//! `/v1/batches`, in OpenAI's shapes: files of requests are answered one after the other, beside
//! the requests that somebody waits for.
//!
//! | file | what |
//! |---|---|
//! | `batch` | what a batch is, and how it is asked for |
//! | `queue` | all batches of a folder |
//! | `lines` | requests and answers on disk |
//! | `worker` | answers |
//! | `routes` | the paths |
//! | `openapi` | what the OpenAPI document says of them |
//!
//! Everything lies in one folder: `files/`, `batches/`. Invariants: a batch that was accepted
//! survives the server, and so does every answer that was written; the next server that is started
//! on the folder answers the rest. One server at a time answers, the one that holds the lock in
//! `batches/`; another one waits for its turn. What is in memory does not grow with a batch but by
//! the names of its requests.

mod batch;
mod lines;
pub(super) mod openapi;
mod queue;
mod routes;
mod worker;

use std::path::Path;

use super::files::{FileObject, Files};
use super::kept::{make, sweep};
use super::problem::Problem;
use super::turn::Turn;
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
    turn: Turn,
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
            sweep(folder);
        }
        let turn = Turn::of(&batches)?;
        let queue = Queue::open(batches)?;
        if turn.take()? {
            queue.take_over()?;
        }
        Ok(Self {
            files: Files::new(files),
            queue,
            turn,
        })
    }

    /// Waits until no other server answers the batches of the folder. Blocks.
    ///
    /// # Errors
    /// When the folder cannot be locked or read.
    fn wait_for_turn(&self) -> Result<(), Failure> {
        if self.queue.is_mine() {
            return Ok(());
        }
        tracing::warn!(
            "another server answers the batches of this folder (it holds {}); this one goes on \
             with them when that one has ended",
            self.turn.path().display()
        );
        self.turn.wait()?;
        self.queue.take_over()?;
        tracing::info!("the other server has ended; this one answers the batches now");
        Ok(())
    }

    /// This server can answer none of them any more: one that waits for its turn goes on.
    fn let_go(&self) {
        self.queue.let_go();
        self.turn.give_back();
    }

    /// Whether a file's requests are those of a batch that has not ended.
    pub(super) fn needs(&self, file: &str) -> bool {
        self.queue.needs(file)
    }

    /// Where its files are.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// What is left is for the next server, which has no reason to mistrust it.
    pub(super) fn put_down(&self) {
        self.queue.put_down(|batch| batch.starts = 0);
    }

    /// Keeps a file of requests. They are looked at when a batch of them begins.
    pub(super) fn upload(&self, name: &str, bytes: &[u8]) -> Result<FileObject, Problem> {
        let come = self.queue.files_to_come();
        let room = self.files.room(1 + come);
        room.map_err(|problem| problem.of("file"))?;
        self.files.add(name, PURPOSE, bytes, |_| Ok(()))
    }
}
