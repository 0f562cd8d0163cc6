//! What is ordered, done, lost, refused and stopped.

use std::collections::BTreeMap;
use std::path::Path;

use flowrun_cache::Digest;

use super::{Desk, Fate, WORK, work};
use crate::runner::job::{JobEnd, Request};
use crate::runner::protocol::PROTOCOL_VERSION;
use crate::step::{Cancel, StepErrorKind};

#[test]
fn the_work_is_done_elsewhere_and_nothing_is_left_of_it() {
    let desk = Desk::new();
    desk.run(WORK, &[]).unwrap();
    assert_eq!(
        desk.made(),
        "input hush",
        "the worker's environment stays out"
    );
    assert!(desk.heard("said"));
    assert!(!desk.folder().exists());
}

#[test]
fn what_the_other_end_writes_has_no_secrets_and_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let desk = Desk::new();
    // A line that is cut where the secret stands.
    let attempt = desk.leave(
        "head -c 8190 /dev/zero | tr '\\0' z; echo \"$TOKEN\"; echo \"1 is $THREADS\"; exit 3",
    );
    work(attempt.path(), &Cancel::default());
    let said = std::fs::read_to_string(attempt.messages()).unwrap();
    assert!(!said.contains("hus") && said.contains("***"), "{said}");
    assert!(said.contains("1 is 1"), "{said}");
    let mode = std::fs::metadata(attempt.path()).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o700);
}

#[test]
fn paths_of_a_request_are_those_of_the_workers() {
    let mapped = |path: &Path| Path::new("/there").join(path.strip_prefix("/here").unwrap());
    let request = json_request();
    let there = Request::Step {
        request: Box::new(serde_json::from_value(request).unwrap()),
        env: BTreeMap::new(),
    }
    .with_paths(&mapped);
    let text = serde_json::to_string(&there).unwrap();
    assert!(!text.contains("/here"), "{text}");
}

fn json_request() -> serde_json::Value {
    serde_json::json!({
        "protocol": PROTOCOL_VERSION, "kind": "k", "version": 1, "step": "s", "params": {},
        "observed": {},
        "inputs": {"x": [{"path": "/here/x", "digest": Digest::of_bytes(b"x"), "label": "x"}]},
        "out_dir": "/here/out", "work_dir": "/here/work", "resume_path": "/here/resume",
        "run_path": "/here/run", "completions": "/here/completions", "actions": "/here/actions",
        "memory": 0, "offline": false, "distdir": "/here/distdir", "user_cache": "/here/cache",
        "root": "/here/root", "started_at": std::time::SystemTime::UNIX_EPOCH, "finished": [],
        "at_once": 1, "traced": false,
    })
}

#[test]
fn a_failure_is_the_steps_and_is_not_tried_again() {
    let desk = Desk::new();
    let error = desk.run("echo oops; exit 3", &[]).unwrap_err();
    assert_eq!(error.kind, StepErrorKind::Failed);
    assert!(error.message.contains("oops"), "{}", error.message);
    assert_eq!(desk.orders(), 1);
    assert!(!desk.folder().exists());
}

#[test]
fn a_job_that_died_is_begun_again_and_not_for_ever() {
    let desk = Desk::new();
    desk.run(WORK, &[Fate::Dies]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 2));
    assert!(desk.heard("its node died; it is begun again"));
    let desk = Desk::new();
    let error = desk.run(WORK, &[Fate::Dies; 9]).unwrap_err();
    assert_eq!((error.kind, desk.orders()), (StepErrorKind::Transient, 3));
    assert!(error.message.contains("tried 3 times"), "{}", error.message);
}

#[test]
fn a_job_that_the_system_tells_to_stop_gives_no_answer() {
    let desk = Desk::new();
    // The first attempt does not end before it is told to.
    let command = format!("case \"$PWD\" in */1/place) sleep 100;; esac; {WORK}");
    let preempted = || JobEnd::Killed("preempted".to_owned());
    desk.run(&command, &[Fate::Told(preempted)]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 2));
    assert!(desk.heard("preempted; it is begun again"));
    // One that the system began once more, while it stopped.
    let desk = Desk::new();
    desk.run(&command, &[Fate::Told(|| JobEnd::Well)]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 2));
    assert!(desk.heard("without a result; it is begun again"));
    let desk = Desk::new();
    let stopped = Fate::Told(|| JobEnd::Stopped);
    let error = desk.run(&command, &[stopped]).unwrap_err();
    assert_eq!((error.kind, desk.orders()), (StepErrorKind::Failed, 1));
    assert!(error.message.contains("was stopped"), "{}", error.message);
}

#[test]
fn one_that_cannot_be_ordered_or_placed_says_so_at_once() {
    for (fate, kind, words) in [
        (Fate::Away, StepErrorKind::Transient, "nobody at home"),
        (Fate::No, StepErrorKind::Failed, "no"),
        (Fate::Waits, StepErrorKind::Failed, "no node has 9 CPU"),
        (Fate::Fails, StepErrorKind::Failed, "not found"),
    ] {
        let desk = Desk::new();
        let error = desk.run(WORK, &[fate]).unwrap_err();
        assert_eq!(error.kind, kind);
        assert!(error.message.contains(words), "{}", error.message);
        let tells_paths = error.help.is_some_and(|help| help.contains("`shared`"));
        assert_eq!(tells_paths, matches!(fate, Fate::Fails));
        assert!(!desk.folder().exists());
    }
}

#[test]
fn one_that_is_busy_is_asked_again() {
    let desk = Desk::new();
    desk.run(WORK, &[Fate::Busy, Fate::Away]).unwrap();
    assert_eq!((desk.made().as_str(), desk.orders()), ("input hush", 1));
    assert!(desk.heard("not yet; waiting for it"));
}

#[test]
fn a_run_that_is_stopped_stops_the_job() {
    let desk = Desk::new();
    let cancel = desk.cancel.clone();
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| desk.run("echo up > up; sleep 100", &[]));
        while !desk.folder().join("1/place/up").exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        cancel.cancel();
        let error = ran.join().unwrap().unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled);
    });
    assert!(!desk.folder().exists());
}
