//! [`Queue`]: all batches of a folder; on disk after every change. While another server answers
//! them, they are read anew whenever somebody asks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;
use tokio::sync::Notify;
use tokio::task::block_in_place;

use super::batch::{Batch, BatchOrder, PREFIX, Status};
use crate::exit::Failure;
use crate::serve::files::Files;
use crate::serve::kept::{is_id, read_all, read_one, write};
use crate::serve::problem::Problem;

/// Batches that have not ended, at most.
const OPEN: usize = 100;
/// Batches at most; of those that have ended the oldest are forgotten, their files stay.
const MOST: usize = 1000;
/// Files that a batch may leave: its answers, its errors.
const LEFT: usize = 2;

/// All batches of a folder.
pub(super) struct Queue {
    folder: PathBuf,
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Default)]
struct State {
    batches: BTreeMap<String, Batch>,
    /// The batch that is answered, and how to stop it.
    running: Option<(String, Arc<Notify>)>,
    /// Whether this server answers them, so that no other one changes them.
    mine: bool,
}

impl Queue {
    /// Reads the batches of a folder, which another server may be answering.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn open(folder: PathBuf) -> Result<Self, Failure> {
        let state = State {
            batches: read(&folder)?,
            ..State::default()
        };
        Ok(Self {
            folder,
            state: Mutex::new(state),
            arrived: Notify::new(),
        })
    }

    /// From now on this server answers them: its turn has come, and no other one changes them.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn take_over(&self) -> Result<(), Failure> {
        let mut state = self.state();
        state.batches = read(&self.folder)?;
        state.mine = true;
        Ok(())
    }

    /// Another server is to answer them.
    pub(super) fn let_go(&self) {
        let mut state = self.state();
        state.running = None;
        state.mine = false;
    }

    /// Whether this server answers them.
    pub(super) fn is_mine(&self) -> bool {
        self.state().mine
    }

    /// Takes an order on, if `files` has room for what will come of it.
    pub(super) fn add(&self, order: BatchOrder, files: &Files) -> Result<Batch, Problem> {
        let batch = order.batch()?;
        let mut state = self.fresh();
        let open = state.open().count();
        if open >= OPEN {
            let text = format!("{OPEN} batches wait already; order this one when one has ended");
            let status = StatusCode::TOO_MANY_REQUESTS;
            return Err(Problem::new(status, text).code("too_many_batches"));
        }
        files.room(LEFT * (open + 1))?;
        self.keep(&batch)
            .map_err(|e| Problem::internal(e.to_string()))?;
        state.batches.insert(batch.id.clone(), batch.clone());
        if state.mine {
            self.forget_the_oldest(&mut state);
        }
        self.arrived.notify_one();
        Ok(batch)
    }

    fn forget_the_oldest(&self, state: &mut State) {
        while state.batches.len() > MOST {
            let ended = state.batches.values().filter(|b| b.status.has_ended());
            let oldest = ended.min_by_key(|batch| (batch.created_at, batch.id.clone()));
            let Some(id) = oldest.map(|batch| batch.id.clone()) else {
                return;
            };
            state.batches.remove(&id);
            if let Err(error) = std::fs::remove_file(self.record(&id)) {
                tracing::warn!("the batch {id} cannot be removed: {error}");
            }
        }
    }

    /// Files that the open batches may leave, all together.
    pub(super) fn files_to_come(&self) -> usize {
        LEFT * self.fresh().open().count()
    }

    /// Whether a file's requests are those of an open batch.
    pub(super) fn needs(&self, file: &str) -> bool {
        self.fresh().open().any(|batch| batch.input == file)
    }

    pub(super) fn get(&self, id: &str) -> Result<Batch, Problem> {
        let missing = || {
            let text = format!("there is no batch `{id}` here");
            Problem::new(StatusCode::NOT_FOUND, text)
        };
        if !is_id(id, PREFIX) {
            return Err(missing());
        }
        let mut state = self.fresh();
        if let Some(batch) = state.batches.get(id) {
            return Ok(batch.clone());
        }
        // One that waits for its turn may have taken the order.
        let batch: Batch = read_one(&self.record(id)).ok_or_else(missing)?;
        state.batches.insert(batch.id.clone(), batch.clone());
        self.arrived.notify_one();
        Ok(batch)
    }

    /// All of them, the newest first.
    pub(super) fn list(&self) -> Vec<Batch> {
        let mut all: Vec<Batch> = self.fresh().batches.values().cloned().collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    /// Asks a batch to end. One that has ended stays as it is.
    pub(super) fn cancel(&self, id: &str) -> Result<Batch, Problem> {
        let batch = self.get(id)?;
        let mut state = self.state();
        if !state.mine {
            let text = "this server is not the one that answers the batches of this folder: ask \
                        that one, or ask again when it has ended";
            return Err(Problem::new(StatusCode::CONFLICT, text).code("not_in_charge"));
        }
        let running = state.running.as_ref();
        let stop = running.and_then(|(running, stop)| (running == id).then(|| Arc::clone(stop)));
        // What has answers already is put together first.
        let status = match (&stop, batch.status) {
            (None, Status::Validating) => Status::Cancelled,
            _ => Status::Cancelling,
        };
        self.change_in(&mut state, id, |batch| batch.enter(status));
        if let Some(stop) = stop {
            stop.notify_one();
        }
        drop(state);
        self.get(id)
    }

    /// The next batch to answer, when there is one, and how it hears that it is to stop.
    pub(super) async fn next(&self) -> (Batch, Arc<Notify>) {
        loop {
            if let Some(next) = block_in_place(|| self.take()) {
                return next;
            }
            // One that arrived since is not missed: it left a permit.
            self.arrived.notified().await;
        }
    }

    fn take(&self) -> Option<(Batch, Arc<Notify>)> {
        let mut state = self.state();
        let first = state
            .open()
            .min_by_key(|batch| (batch.created_at, batch.id.clone()))?;
        let id = first.id.clone();
        let stop = Arc::new(Notify::new());
        state.running = Some((id.clone(), Arc::clone(&stop)));
        self.change_in(&mut state, &id, |batch| batch.starts += 1);
        let batch = state.batches.get(&id)?.clone();
        Some((batch, stop))
    }

    /// The server ends in good order: it is no fault of the batch that is answered.
    pub(super) fn put_down(&self) {
        let mut state = self.state();
        if let Some((id, _)) = state.running.take() {
            self.change_in(&mut state, &id, |batch| batch.starts = 0);
        }
    }

    /// Nothing is being answered.
    pub(super) fn idle(&self) {
        self.state().running = None;
    }

    /// Changes a batch, in memory and on disk.
    pub(super) fn change(&self, id: &str, change: impl FnOnce(&mut Batch)) {
        self.change_in(&mut self.state(), id, change);
    }

    /// Counts an answer, in memory alone: its line is on disk. After the first one the batch is
    /// known to be answerable.
    pub(super) fn count(&self, id: &str, failed: bool) {
        let mut state = self.state();
        let Some(batch) = state.batches.get_mut(id) else {
            return;
        };
        match failed {
            true => batch.counts.failed += 1,
            false => batch.counts.completed += 1,
        }
        if batch.starts > 0 {
            block_in_place(|| self.change_in(&mut state, id, |batch| batch.starts = 0));
        }
    }

    fn change_in(&self, state: &mut State, id: &str, change: impl FnOnce(&mut Batch)) {
        let Some(batch) = state.batches.get_mut(id) else {
            return;
        };
        change(batch);
        if let Err(error) = self.keep(batch) {
            tracing::warn!("the batch {id} cannot be written: {error}");
        }
    }

    fn keep(&self, batch: &Batch) -> std::io::Result<()> {
        write(&self.record(&batch.id), &serde_json::to_vec(batch)?)
    }

    fn record(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is by now, whoever wrote it. Reads the folder unless this server has its turn.
    fn fresh(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if !state.mine {
            match read(&self.folder) {
                Ok(batches) => state.batches = batches,
                Err(failure) => tracing::warn!("{failure}"),
            }
        }
        state
    }
}

impl State {
    /// The batches that have not ended.
    fn open(&self) -> impl Iterator<Item = &Batch> {
        let all = self.batches.values();
        all.filter(|batch| !batch.status.has_ended())
    }
}

fn read(folder: &Path) -> Result<BTreeMap<String, Batch>, Failure> {
    let all = read_all::<Batch>(folder)?.into_iter();
    Ok(all.map(|batch| (batch.id.clone(), batch)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn order() -> BatchOrder {
        let order = json!({"input_file_id": "file-1", "endpoint": "/v1/completions",
            "completion_window": "24h"});
        serde_json::from_value(order).unwrap()
    }

    /// The batches of a folder, which are this server's.
    fn mine(folder: &Path) -> Queue {
        let queue = Queue::open(folder.to_owned()).unwrap();
        queue.take_over().unwrap();
        queue
    }

    /// A folder without files, and with room for them.
    fn files(folder: &Path) -> Files {
        Files::new(folder.join("files"))
    }

    #[test]
    fn a_batch_survives_and_its_starts_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let id = mine(dir.path()).add(order(), &files).unwrap().id;
        for starts in 1..=4 {
            let (batch, _) = mine(dir.path()).take().unwrap();
            assert_eq!((&batch.id, batch.starts), (&id, starts));
        }
        let queue = mine(dir.path());
        assert!(queue.needs("file-1") && !queue.needs("file-2"));
        queue.change(&id, |batch| batch.enter(Status::Completed));
        assert!(mine(dir.path()).take().is_none());
        assert!(!queue.needs("file-1"));
        assert!(queue.get("batch_../../x").is_err());
    }

    #[test]
    fn an_answer_or_an_end_in_good_order_makes_the_next_start_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let queue = mine(dir.path());
        let id = queue.add(order(), &files(dir.path())).unwrap().id;
        queue.take().unwrap();
        queue.count(&id, false);
        let queue = mine(dir.path());
        assert_eq!(queue.take().unwrap().0.starts, 1);
        queue.put_down();
        assert_eq!(mine(dir.path()).take().unwrap().0.starts, 1);
    }

    #[test]
    fn one_that_waits_is_cancelled_at_once_and_one_that_runs_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, files) = (mine(dir.path()), files(dir.path()));
        let waiting = queue.add(order(), &files).unwrap().id;
        assert_eq!(queue.cancel(&waiting).unwrap().status, Status::Cancelled);
        let running = queue.add(order(), &files).unwrap().id;
        queue.take().unwrap();
        assert_eq!(queue.cancel(&running).unwrap().status, Status::Cancelling);
        queue.change(&running, |batch| batch.enter(Status::Cancelled));
        assert_eq!(queue.cancel(&running).unwrap().status, Status::Cancelled);
    }

    #[test]
    fn one_that_waits_for_its_turn_shows_what_the_other_does_and_takes_orders() {
        let dir = tempfile::tempdir().unwrap();
        let (other, files) = (mine(dir.path()), files(dir.path()));
        let waits = Queue::open(dir.path().to_owned()).unwrap();
        let id = other.add(order(), &files).unwrap().id;
        assert_eq!(waits.get(&id).unwrap().status, Status::Validating);
        other.take().unwrap();
        other.change(&id, |batch| batch.enter(Status::InProgress));
        assert_eq!(waits.get(&id).unwrap().status, Status::InProgress);
        assert_eq!(waits.get(&id).unwrap().starts, 1);
        let refused = waits.cancel(&id).unwrap_err();
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        let own = waits.add(order(), &files).unwrap().id;
        other.change(&id, |batch| batch.enter(Status::Completed));
        assert!(other.take().is_none());
        assert_eq!(other.get(&own).unwrap().status, Status::Validating);
        assert_eq!(other.take().unwrap().0.id, own);
        drop(other);
        waits.take_over().unwrap();
        assert_eq!(waits.take().unwrap().0.id, own);
    }

    #[test]
    fn what_waits_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, files) = (mine(dir.path()), files(dir.path()));
        for _ in 0..OPEN {
            queue.add(order(), &files).unwrap();
        }
        let refused = queue.add(order(), &files).unwrap_err();
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    }

    #[test]
    fn no_order_is_taken_whose_answers_would_have_no_place() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, files) = (mine(dir.path()), files(dir.path()));
        std::fs::create_dir(dir.path().join("files")).unwrap();
        let mut kept = 0;
        // Room for the answers of one batch alone.
        while files.room(LEFT + 1).is_ok() {
            std::fs::write(dir.path().join(format!("files/{kept}.json")), "{}").unwrap();
            kept += 1;
        }
        queue.add(order(), &files).unwrap();
        let refused = queue.add(order(), &files).unwrap_err();
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
        assert_eq!(queue.files_to_come(), LEFT);
    }
}
