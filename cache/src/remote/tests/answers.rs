//! Kept answers of language models, which go in packs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::{Machine, files, folder};
use crate::cache::Cache;
use crate::digest::Digest;
use crate::remote::RemoteCache;
use crate::verify::verify;
use crate::{CacheReader, OpenOptions};

/// A machine's own answer.
fn answer(machine: &Machine, name: &str) {
    let value = serde_json::json!({ "text": name });
    let key = Digest::of_bytes(name.as_bytes());
    machine.cache.completions().put(&key, &value).unwrap();
}

fn answered(machine: &Machine, name: &str) -> bool {
    let key = Digest::of_bytes(name.as_bytes());
    let found = machine.cache.completions().get(&key);
    found.is_some_and(|value| value["text"] == name)
}

fn send_answers(machine: &Machine) -> u64 {
    machine.remote.send_answers(&machine.cache.completions());
    machine.flush().objects
}

#[test]
fn what_one_machine_paid_for_another_need_not_ask() {
    let shared = tempfile::tempdir().unwrap();
    let machine = || {
        let machine = Machine::new(folder(&shared), false);
        machine.cache.completions().share(&machine.remote, || false);
        machine
    };
    let packs = || files(&shared.path().join("answers"));
    let a = machine();
    for name in ["a", "b", "c"] {
        answer(&a, name);
    }
    assert_eq!(send_answers(&a), 1);
    assert_eq!(packs().len(), 1, "one object for all of them");
    assert_eq!(send_answers(&a), 1, "nothing is sent twice");

    let b = machine();
    assert!(["a", "b", "c"].iter().all(|name| answered(&b, name)));
    assert!(!answered(&b, "d"));
    assert_eq!(b.cache.completions().len(), 3);
    answer(&b, "d");
    assert_eq!(send_answers(&b), 1);
    assert_eq!(packs().len(), 2, "what came from there is not sent back");

    // The next run of the first: it fetches what it has not, and has the rest.
    let again = |machine| next_run(machine, &shared);
    let a = again(a);
    assert!(answered(&a, "a") && answered(&a, "d"));
    assert_eq!(a.cache.completions().len(), 4);
    assert_eq!(send_answers(&a), 0);
    let b = again(b);
    assert!(["a", "b", "c", "d"].iter().all(|name| answered(&b, name)));
    let found = verify(&CacheReader::open(b.cache.dir()));
    assert!(found.damage.is_empty(), "{:?}", found.damage);

    // A damaged pack is not used, and said once.
    let first = packs().remove(0);
    std::fs::write(&first, "spoilt").unwrap();
    let c = machine();
    let there = ["a", "b", "c", "d"]
        .iter()
        .filter(|name| answered(&c, name));
    assert!(matches!(there.count(), 1 | 3));
    assert_eq!(c.remote.take_warnings().len(), 1);
    // Nor is it fetched again, until it is another one.
    let c = again(c);
    assert!(!answered(&c, "nobody's"));
    assert_eq!(c.remote.take_warnings(), [""; 0]);
    std::fs::write(&first, "spoilt otherwise").unwrap();
    let c = again(c);
    assert!(!answered(&c, "nobody's"));
    assert_eq!(c.remote.take_warnings().len(), 1);
}

/// The machine in its next run.
fn next_run(machine: Machine, shared: &TempDir) -> Machine {
    let Machine { dir, cache, remote } = machine;
    let place = cache.dir().to_owned();
    drop((cache, remote));
    let cache = Cache::open(&place, &OpenOptions::no_wait("test")).unwrap();
    let remote = Arc::new(RemoteCache::of(folder(shared), false, cache.dir()).unwrap());
    cache.completions().share(&remote, || false);
    Machine { dir, cache, remote }
}

#[test]
fn who_stops_waits_for_no_answers_and_leaves_the_asking_to_the_next() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    answer(&a, "a");
    assert_eq!(send_answers(&a), 1);
    let b = Machine::new(folder(&shared), false);
    let completions = b.cache.completions();
    let stops = Arc::new(AtomicBool::new(true));
    let stop = Arc::clone(&stops);
    completions.share(&b.remote, move || stop.load(Ordering::SeqCst));
    assert!(!answered(&b, "a"), "the run is to stop");
    stops.store(false, Ordering::SeqCst);
    let key = Digest::of_bytes(b"a");
    assert_eq!(completions.get_until(&key, &|| true), None, "a step is");
    assert!(answered(&b, "a"));
    assert!(completions.get_until(&key, &|| true).is_some());
}

#[test]
fn what_is_sent_meanwhile_is_fetched_once_it_is_expected() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let b = Machine::new(folder(&shared), false);
    let completions = b.cache.completions();
    completions.share(&b.remote, || false);
    assert!(!answered(&b, "a"));
    answer(&a, "a");
    assert_eq!(send_answers(&a), 1);
    assert!(!answered(&b, "a"), "the remote was asked before");
    completions.expect_from_remote();
    assert!(answered(&b, "a"));
}

#[test]
fn answers_of_others_that_were_damaged_here_are_fetched_again() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let names = ["a", "b", "c"];
    for name in names {
        answer(&a, name);
    }
    assert_eq!(send_answers(&a), 1);
    let mut b = Machine::new(folder(&shared), false);
    assert_eq!(b.cache.completions().take_from(&b.remote), 3);
    let segment = |b: &Machine| {
        let folder = b.cache.dir().join("completions");
        crate::completion::of_remotes(&folder).next().unwrap()
    };
    let log = segment(&b);
    let good = std::fs::read(&log).unwrap();
    let mut bad = good.clone();
    bad[70] ^= 1;
    std::fs::write(&log, bad).unwrap();
    b = next_run(b, &shared);
    assert!(names.iter().all(|name| answered(&b, name)));
    assert_eq!(std::fs::read(segment(&b)).unwrap().len(), good.len());
    let found = verify(&CacheReader::open(b.cache.dir()));
    assert!(found.damage.is_empty(), "{:?}", found.damage);
    // What is mended by hand is fetched again as well.
    std::fs::write(&log, "damaged\n").unwrap();
    b = next_run(b, &shared);
    crate::verify::repair(&b.cache).unwrap();
    b = next_run(b, &shared);
    assert!(names.iter().all(|name| answered(&b, name)));
}

#[test]
fn a_pack_that_is_too_large_is_left_out() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    answer(&a, "a");
    assert_eq!(send_answers(&a), 1);
    let large = shared.path().join("answers/ab");
    std::fs::create_dir_all(&large).unwrap();
    let large = std::fs::File::create(large.join(format!("{}.log", "c".repeat(62)))).unwrap();
    // It has no blocks: the disk is not filled.
    large.set_len(3 << 30).unwrap();
    let b = Machine::new(folder(&shared), true);
    assert_eq!(b.cache.completions().take_from(&b.remote), 1);
    assert_eq!(b.remote.take_warnings(), [""; 0]);
}

#[test]
fn answers_that_the_remote_lost_are_pushed_again() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let answers = shared.path().join("answers");
    let push = || {
        a.remote.push_answers(&a.cache.completions());
        a.flush().objects
    };
    answer(&a, "a");
    assert_eq!(push(), 1);
    answer(&a, "b");
    assert_eq!(push(), 2);
    assert_eq!(push(), 2, "all are there");
    std::fs::remove_dir_all(&answers).unwrap();
    assert_eq!(send_answers(&a), 2, "a run believes its notes");
    assert_eq!(push(), 3, "one pack holds both");
    assert_eq!(push(), 3);
    answer(&a, "c");
    assert_eq!(push(), 4);
    // One of two: what it held is not known.
    std::fs::remove_file(files(&answers).remove(0)).unwrap();
    assert_eq!(push(), 5);
    assert_eq!(push(), 5);
    let b = Machine::new(folder(&shared), true);
    assert_eq!(b.cache.completions().take_from(&b.remote), 3);
}

#[test]
fn a_segment_that_is_another_one_is_sent_whole() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    answer(&a, "a");
    assert_eq!(send_answers(&a), 1);
    let segment = a.cache.dir().join("completions/000000.log");
    let line = std::fs::read(&segment).unwrap();
    // Somebody emptied the folder: the same name, other answers. And a line that a kill tore.
    let other = Machine::new(folder(&shared), true);
    answer(&other, "longer than the first");
    let text = std::fs::read(other.cache.dir().join("completions/000000.log")).unwrap();
    std::fs::write(&segment, [&text[..], &line[..], b"torn"].concat()).unwrap();
    assert_eq!(send_answers(&a), 2);
    assert_eq!(send_answers(&other), 0, "read-only");
    let b = Machine::new(folder(&shared), true);
    assert_eq!(b.cache.completions().take_from(&b.remote), 2);
    assert_eq!(b.cache.completions().take_from(&b.remote), 0);
}
