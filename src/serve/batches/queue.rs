//! [`Queue`]: all batches of a folder, and the files that they need and leave.

use super::batch::{Batch, BatchOrder};
use crate::serve::files::Files;
use crate::serve::orders::Orders;
use crate::serve::problem::Problem;

/// Files that a batch may leave: its answers, its errors.
const LEFT: usize = 2;

/// All batches of a folder.
pub(super) type Queue = Orders<Batch>;

impl Queue {
    /// Takes an order on, if `files` has room for what will come of it.
    pub(super) fn order(&self, order: BatchOrder, files: &Files) -> Result<Batch, Problem> {
        self.add(order.batch()?, |open| files.room(LEFT * (open + 1)))
    }

    /// Files that the open batches may leave, all together.
    pub(super) fn files_to_come(&self) -> usize {
        LEFT * self.count_open()
    }

    /// Whether a file's requests are those of an open batch.
    pub(super) fn needs(&self, file: &str) -> bool {
        self.any_open(|batch| batch.input == file)
    }

    /// Counts an answer, in memory alone: its line is on disk. After the first one the batch is
    /// known to be answerable. Blocks.
    pub(super) fn count(&self, id: &str, failed: bool) {
        self.note(id, |batch| {
            match failed {
                true => batch.counts.failed += 1,
                false => batch.counts.completed += 1,
            }
            std::mem::take(&mut batch.starts) > 0
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use axum::http::StatusCode;
    use serde_json::json;

    use super::*;
    use crate::serve::batches::batch::Status;

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
        let id = mine(dir.path()).order(order(), &files).unwrap().id;
        for starts in 1..=4 {
            let (batch, _) = mine(dir.path()).next();
            assert_eq!((&batch.id, batch.starts), (&id, starts));
        }
        let queue = mine(dir.path());
        assert!(queue.needs("file-1") && !queue.needs("file-2"));
        queue.change(&id, |batch| batch.enter(Status::Completed));
        assert_eq!(mine(dir.path()).count_open(), 0);
        assert!(!queue.needs("file-1"));
        assert!(queue.get("batch_../../x").is_err());
    }

    #[test]
    fn an_answer_or_an_end_in_good_order_makes_the_next_start_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let queue = mine(dir.path());
        let id = queue.order(order(), &files(dir.path())).unwrap().id;
        queue.next();
        queue.count(&id, false);
        let queue = mine(dir.path());
        assert_eq!(queue.next().0.starts, 1);
        queue.put_down(|batch| batch.starts = 0);
        assert_eq!(mine(dir.path()).next().0.starts, 1);
    }

    #[test]
    fn one_that_waits_is_cancelled_at_once_and_one_that_runs_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, files) = (mine(dir.path()), files(dir.path()));
        let waiting = queue.order(order(), &files).unwrap().id;
        assert_eq!(queue.cancel(&waiting).unwrap().status, Status::Cancelled);
        let running = queue.order(order(), &files).unwrap().id;
        queue.next();
        assert_eq!(queue.cancel(&running).unwrap().status, Status::Cancelling);
        queue.change(&running, |batch| batch.enter(Status::Cancelled));
        assert_eq!(queue.cancel(&running).unwrap().status, Status::Cancelled);
    }

    #[test]
    fn one_that_waits_for_its_turn_shows_what_the_other_does_and_takes_orders() {
        let dir = tempfile::tempdir().unwrap();
        let (other, files) = (mine(dir.path()), files(dir.path()));
        let waits = Queue::open(dir.path().to_owned()).unwrap();
        let id = other.order(order(), &files).unwrap().id;
        assert_eq!(waits.get(&id).unwrap().status, Status::Validating);
        other.next();
        other.change(&id, |batch| batch.enter(Status::InProgress));
        assert_eq!(waits.get(&id).unwrap().status, Status::InProgress);
        assert_eq!(waits.get(&id).unwrap().starts, 1);
        let refused = waits.cancel(&id).unwrap_err();
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        let own = waits.order(order(), &files).unwrap().id;
        assert_eq!(other.files_to_come(), 2 * LEFT);
        other.change(&id, |batch| batch.enter(Status::Completed));
        assert_eq!(other.next().0.id, own);
        drop(other);
        waits.take_over().unwrap();
        assert_eq!(waits.next().0.id, own);
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
        queue.order(order(), &files).unwrap();
        let refused = queue.order(order(), &files).unwrap_err();
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
        assert_eq!(queue.files_to_come(), LEFT);
    }
}
