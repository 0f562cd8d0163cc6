//! Jobs that a killed run left.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Desk, WORK, work};
use crate::runner::job::{Post, folder, leftover};
use crate::step::{Cancel, StepReporter};

#[test]
fn a_job_of_a_killed_run_is_followed_and_not_ordered_again() {
    let desk = Desk::new();
    let go = desk.dir.path().join("go");
    let command = format!(
        "while [ ! -e '{}' ]; do sleep 0.05; done; {WORK}",
        go.display()
    );
    let attempt = desk.leave(&command);
    let path = attempt.path().to_owned();
    std::thread::spawn(move || work(&path, &Cancel::default()));
    while !attempt.is_claimed() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::thread::scope(|scope| {
        let next = scope.spawn(|| desk.run(&command, &[]));
        while !desk.heard("goes on with the job left") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        std::fs::write(&go, "").unwrap();
        next.join().unwrap().unwrap();
    });
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 0));
}

#[test]
fn what_a_killed_runs_job_gave_is_taken_unless_it_failed_or_is_wanted_anew() {
    for (afresh, left, orders) in [(false, WORK, 0), (true, WORK, 1), (false, "exit 3", 1)] {
        let desk = Desk::new();
        desk.afresh.store(afresh, Ordering::SeqCst);
        work(desk.leave(left).path(), &Cancel::default());
        desk.run(WORK, &[]).unwrap();
        assert_eq!(
            (desk.made().as_str(), desk.orders()),
            ("input hush", orders)
        );
        assert!(!desk.folder().exists());
    }
}

#[test]
fn a_job_that_nobody_wants_any_more_ends_before_other_work_begins() {
    let desk = Desk::new();
    let reporter: Arc<dyn StepReporter> = Arc::clone(&desk.heard) as Arc<dyn StepReporter>;
    let attempt = desk.leave("echo up > up; sleep 100");
    let path = attempt.path().to_owned();
    let works = std::thread::spawn(move || work(&path, &Cancel::default()));
    while !attempt.place().join("up").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let cache = Desk::through_a_store().cache.unwrap();
    let keep = (cache.as_ref(), Path::new("/nowhere"));
    leftover::end(&desk.folder(), &|| None, keep, &desk.cancel, &reporter).unwrap();
    assert!(!desk.folder().exists());
    works.join().unwrap();
    // One that nobody has taken is taken by nobody.
    let attempt = desk.leave(WORK);
    let left = folder::JobFolder::at(desk.folder()).ordered().unwrap();
    leftover::silence(&attempt, &left, None, &|_| {}, &desk.cancel, &reporter).unwrap();
    assert!(!attempt.claim().unwrap());
    assert!(Post::take(attempt.path()).unwrap().is_none());
}
