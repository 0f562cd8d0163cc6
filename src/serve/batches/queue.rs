//! [`Queue`]: all batches of a server; on disk after every change.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;
use tokio::sync::Notify;
use tokio::task::block_in_place;

use super::batch::{Batch, BatchOrder, PREFIX, Status, reason};
use crate::exit::Failure;
use crate::serve::kept::{is_id, read_all, write};
use crate::serve::problem::Problem;

/// Batches that have not ended, at most.
const OPEN: usize = 100;
/// Batches at most; of those that have ended the oldest are forgotten, their files stay.
const MOST: usize = 1000;
/// Times that a batch is begun at most before one of its requests is answered: one that ends the
/// server each time is not begun for ever.
const STARTS: u32 = 3;

/// All batches of a server.
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
}

impl Queue {
    /// Reads the batches of a folder.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn open(folder: PathBuf) -> Result<Self, Failure> {
        let mut state = State::default();
        for mut batch in read_all::<Batch>(&folder)? {
            if batch.starts >= STARTS {
                let text = format!("the server ended {STARTS} times when it began this batch");
                batch.fail(vec![reason("server_error", &text, None)]);
            }
            state.batches.insert(batch.id.clone(), batch);
        }
        Ok(Self {
            folder,
            state: Mutex::new(state),
            arrived: Notify::new(),
        })
    }

    /// Takes an order on.
    pub(super) fn add(&self, order: BatchOrder) -> Result<Batch, Problem> {
        let batch = order.batch()?;
        let mut state = self.state();
        let all = state.batches.values();
        if all.filter(|batch| !batch.status.has_ended()).count() >= OPEN {
            let text = format!("{OPEN} batches wait already; order this one when one has ended");
            let status = StatusCode::TOO_MANY_REQUESTS;
            return Err(Problem::new(status, text).code("too_many_batches"));
        }
        self.keep(&batch)
            .map_err(|e| Problem::internal(e.to_string()))?;
        state.batches.insert(batch.id.clone(), batch.clone());
        self.forget_the_oldest(&mut state);
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

    pub(super) fn get(&self, id: &str) -> Result<Batch, Problem> {
        let found = self.state().batches.get(id).cloned();
        let missing = || {
            let text = format!("there is no batch `{id}` here");
            Problem::new(StatusCode::NOT_FOUND, text)
        };
        found.filter(|_| is_id(id, PREFIX)).ok_or_else(missing)
    }

    /// All of them, the newest first.
    pub(super) fn list(&self) -> Vec<Batch> {
        let mut all: Vec<Batch> = self.state().batches.values().cloned().collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    /// Asks a batch to end. One that has ended stays as it is.
    pub(super) fn cancel(&self, id: &str) -> Result<Batch, Problem> {
        let batch = self.get(id)?;
        let mut state = self.state();
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
        let open = state.batches.values().filter(|b| !b.status.has_ended());
        let first = open.min_by_key(|batch| (batch.created_at, batch.id.clone()))?;
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

    #[test]
    fn a_batch_survives_and_one_that_never_begins_fails() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Queue::open(dir.path().to_owned()).unwrap();
        let id = open().add(order()).unwrap().id;
        for starts in 1..=STARTS {
            let (batch, _) = open().take().unwrap();
            assert_eq!((&batch.id, batch.starts), (&id, starts));
        }
        let queue = open();
        assert!(queue.take().is_none());
        let batch = queue.get(&id).unwrap();
        assert_eq!(batch.status, Status::Failed);
        assert!(batch.object()["errors"]["data"][0]["message"].is_string());
        assert!(queue.get("batch_../../x").is_err());
    }

    #[test]
    fn an_answer_or_an_end_in_good_order_makes_the_next_start_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Queue::open(dir.path().to_owned()).unwrap();
        let queue = open();
        let id = queue.add(order()).unwrap().id;
        queue.take().unwrap();
        queue.count(&id, false);
        let queue = open();
        assert_eq!(queue.take().unwrap().0.starts, 1);
        queue.put_down();
        assert_eq!(open().take().unwrap().0.starts, 1);
    }

    #[test]
    fn one_that_waits_is_cancelled_at_once_and_one_that_runs_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(dir.path().to_owned()).unwrap();
        let waiting = queue.add(order()).unwrap().id;
        assert_eq!(queue.cancel(&waiting).unwrap().status, Status::Cancelled);
        let running = queue.add(order()).unwrap().id;
        queue.take().unwrap();
        assert_eq!(queue.cancel(&running).unwrap().status, Status::Cancelling);
        queue.change(&running, |batch| batch.enter(Status::Cancelled));
        assert_eq!(queue.cancel(&running).unwrap().status, Status::Cancelled);
    }

    #[test]
    fn what_waits_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(dir.path().to_owned()).unwrap();
        for _ in 0..OPEN {
            queue.add(order()).unwrap();
        }
        let refused = queue.add(order()).unwrap_err();
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    }
}
