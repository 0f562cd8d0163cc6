//! Workers that see no folder of this side: files and words go through a store.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Desk, Fate, WORK, work_through};
use crate::runner::job::leftover;
use crate::step::{Cancel, StepErrorKind, StepReporter};

#[test]
fn a_worker_that_sees_no_folder_is_sent_what_it_reads_and_sends_what_it_made() {
    let desk = Desk::through_a_store();
    let command = format!("{WORK}; mkdir out/deep/empty");
    desk.run(&command, &[Fate::Dies]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 2));
    assert!(desk.dir.path().join("place/out/deep/empty").is_dir());
    assert!(desk.heard("said") && desk.heard("its node died; it is begun again"));
    assert!(!desk.folder().exists());
    // Both ends tidy up.
    let notes = || std::fs::read_dir(desk.store().join("jobs")).map_or(0, Iterator::count);
    while notes() > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let error = desk.run("echo oops; exit 3", &[]).unwrap_err();
    assert_eq!(error.kind, StepErrorKind::Failed);
    assert!(error.message.contains("oops"), "{}", error.message);
}

#[test]
fn what_a_killed_runs_job_sent_is_taken_and_its_order_has_no_values() {
    let desk = Desk::through_a_store();
    desk.leave(WORK);
    let order = std::fs::read_to_string(desk.store().join("jobs/left/order")).unwrap();
    assert!(
        order.contains("TOKEN") && !order.contains("hush"),
        "{order}"
    );
    assert!(!order.contains("timeout"), "as orders were before: {order}");
    let args = ["--job", "left", "--through", &desk.url()].map(str::to_owned);
    work_through(&args, &Cancel::default());
    // It is done once.
    work_through(&args, &Cancel::default());
    desk.run(WORK, &[]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 0));
}

#[test]
fn one_whose_notes_are_gone_is_ordered_anew() {
    let desk = Desk::through_a_store();
    desk.leave(WORK);
    desk.way().unwrap().depot.clear("left").unwrap();
    desk.run(WORK, &[]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 1));
}

#[test]
fn a_job_in_a_store_that_nobody_wants_any_more_is_begun_by_nobody() {
    let desk = Desk::through_a_store();
    desk.leave(WORK);
    let reporter: Arc<dyn StepReporter> = Arc::clone(&desk.heard) as Arc<dyn StepReporter>;
    let depot = || desk.way().map(|way| way.depot);
    let cache = desk.cache.clone().unwrap();
    let saved = desk.dir.path().join("saved");
    let keep = (cache.as_ref(), saved.as_path());
    leftover::end(&desk.folder(), &depot, keep, &desk.cancel, &reporter).unwrap();
    assert!(!desk.folder().exists());
    let args = ["--job", "left", "--through", &desk.url()].map(str::to_owned);
    work_through(&args, &Cancel::default());
    assert_eq!(desk.made(), "");
    // With no way to the store the run goes on, and says so.
    desk.leave(WORK);
    leftover::end(&desk.folder(), &|| None, keep, &desk.cancel, &reporter).unwrap();
    assert!(desk.heard("cannot be told to stop"));
}

#[test]
fn a_run_that_is_stopped_stops_the_job_that_it_reaches_through_a_store() {
    let desk = Desk::through_a_store();
    let cancel = desk.cancel.clone();
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| desk.run("echo up; sleep 100", &[]));
        while !desk.heard("up") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        cancel.cancel();
        let error = ran.join().unwrap().unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled);
    });
    assert!(!desk.folder().exists());
}

/// A folder of a desk's store, whose place a file can take: the store cannot be used there then.
struct Door {
    dir: PathBuf,
    place: PathBuf,
}

impl Door {
    fn of(desk: &Desk, name: &str) -> Self {
        let door = Self {
            dir: desk.dir.path().to_owned(),
            place: desk.store().join(name),
        };
        std::fs::create_dir_all(desk.store()).unwrap();
        std::fs::create_dir(door.dir.join("folder")).unwrap();
        std::fs::write(door.dir.join("file"), "").unwrap();
        door.lead_to("folder");
        door
    }

    /// At once: it is never missing.
    fn lead_to(&self, target: &str) {
        let new = self.dir.join("new");
        std::os::unix::fs::symlink(self.dir.join(target), &new).unwrap();
        std::fs::rename(new, &self.place).unwrap();
    }
}

/// One that does not wait for long, of whose store a folder can be taken away.
fn impatient(folder: &str) -> (Desk, Door) {
    let mut desk = Desk::through_a_store();
    desk.settings.patience = 1;
    let door = Door::of(&desk, folder);
    (desk, door)
}

#[test]
fn a_store_that_is_away_for_longer_than_the_patience_costs_no_result() {
    let (desk, notes) = impatient("jobs");
    let go = desk.dir.path().join("go");
    let command = format!(
        "echo up; while [ ! -e '{}' ]; do sleep 0.05; done; {WORK}",
        go.display()
    );
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| desk.run(&command, &[]));
        let until = |words: &str| {
            while !desk.heard(words) && !ran.is_finished() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        };
        until("up");
        notes.lead_to("file");
        until("waiting for it");
        // The work ends while nothing can be said of it.
        std::fs::write(&go, "").unwrap();
        until("the job is followed");
        assert!(!ran.is_finished());
        notes.lead_to("folder");
        ran.join().unwrap().unwrap();
    });
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 1));
    assert!(!desk.heard("begun again"));
    assert!(!desk.folder().exists());
}

#[test]
fn a_result_that_cannot_be_fetched_yet_is_waited_for() {
    let (desk, objects) = impatient("objects");
    desk.leave(WORK);
    let args = ["--job", "left", "--through", &desk.url()].map(str::to_owned);
    work_through(&args, &Cancel::default());
    objects.lead_to("file");
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| desk.run(WORK, &[]));
        while !desk.heard("asked for again") && !ran.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!ran.is_finished());
        objects.lead_to("folder");
        ran.join().unwrap().unwrap();
    });
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 0));
}
