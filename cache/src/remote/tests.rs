//! Two machines and a shared place between them.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use object_store::PutPayload;
use tempfile::TempDir;

use super::bucket::Bucket;
use super::*;
use crate::action::{ACTION_VERSION, OutputRecord, OutputValue};
use crate::verify::verify;
use crate::{CacheReader, OpenOptions};

/// A machine: its own cache, and the remote.
struct Machine {
    dir: TempDir,
    cache: Cache,
    remote: Arc<RemoteCache>,
}

impl Machine {
    fn new(bucket: Bucket, read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), &OpenOptions::no_wait("test")).unwrap();
        let remote = Arc::new(RemoteCache::of(bucket, read_only, cache.dir()).unwrap());
        Self { dir, cache, remote }
    }

    /// A result with a file and a folder, made here.
    fn make(&self, name: &str) -> ActionResult {
        let folder = self.dir.path().join(name);
        std::fs::create_dir_all(folder.join("deep")).unwrap();
        std::fs::write(folder.join("deep/member"), format!("member of {name}")).unwrap();
        std::fs::write(folder.join("tool"), "#!/bin/sh\n").unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.join("tool"), mode).unwrap();
        let store = self.cache.store();
        let outputs = [
            ("file", store.put_bytes(name.as_bytes()).unwrap()),
            ("tree", store.put_path(&folder).unwrap()),
        ];
        self.result(name, outputs)
    }

    fn result<const N: usize>(
        &self,
        name: &str,
        outputs: [(&str, crate::Artifact); N],
    ) -> ActionResult {
        let outputs = outputs.map(|(port, artifact)| {
            let output = OutputRecord {
                ty: "any".into(),
                value: OutputValue::One(artifact),
            };
            (port.to_owned(), output)
        });
        let result = ActionResult {
            version: ACTION_VERSION,
            key: Digest::of_bytes(name.as_bytes()),
            manifest: serde_json::json!({}),
            outputs: BTreeMap::from(outputs),
            metrics: BTreeMap::new(),
            took_ms: 1,
            finished_at: String::new(),
            label: name.into(),
        };
        self.cache.actions().put(&result).unwrap();
        result
    }

    fn send(&self, result: &ActionResult) -> Sent {
        self.remote.send(self.cache.store(), result, false);
        self.flush()
    }

    fn flush(&self) -> Sent {
        self.remote.flush(&|| false, &mut |_| {})
    }

    fn fetch(&self, key: &ActionKey) -> Fetched {
        self.remote.fetch(&self.cache, key, &|_| true)
    }

    fn flawed(&self, key: &ActionKey) -> String {
        match self.fetch(key) {
            Fetched::Flawed(why) => {
                assert!(self.cache.actions().get(key).is_none());
                assert!(
                    verify(&CacheReader::open(self.cache.dir()))
                        .damage
                        .is_empty()
                );
                why
            }
            other => format!("{other:?}"),
        }
    }

    fn has_whole(&self, key: &ActionKey) {
        let fetched = self.fetch(key);
        assert!(matches!(fetched, Fetched::Whole(_)), "{fetched:?}");
        let result = self.cache.actions().get(key).unwrap();
        let found = verify(&CacheReader::open(self.cache.dir()));
        assert!(found.damage.is_empty(), "{:?}", found.damage);
        for output in result.outputs.values() {
            for artifact in output.value.artifacts() {
                self.cache.store().verify(artifact).unwrap();
            }
        }
    }
}

fn folder(dir: &TempDir) -> Bucket {
    let url = folder_url(dir.path()).unwrap();
    Bucket::open(&url, true, &BTreeMap::new()).unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for path in crate::record::folder(folder) {
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push(path),
        }
    }
    all.sort();
    all
}

#[test]
fn what_one_machine_made_another_has() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    let sent = a.send(&made);
    // The file, the folder and its two members.
    assert_eq!((sent.results, sent.objects, sent.waiting), (1, 4, 0));
    let again = a.send(&made);
    assert_eq!((again.results, again.objects), (1, 4), "all was there");

    let b = Machine::new(folder(&shared), true);
    assert_eq!(b.remote.peek(&made.key).as_ref(), Some(&made));
    assert!(
        b.cache.actions().get(&made.key).is_none(),
        "a peek gets nothing"
    );
    b.has_whole(&made.key);
    let before = files(shared.path());
    assert_eq!(b.send(&b.make("other")), Sent::default());
    assert_eq!(files(shared.path()), before, "it only reads");
    let nothing = Digest::of_bytes(b"nobody made it");
    assert!(matches!(b.fetch(&nothing), Fetched::Nothing));
    assert!(b.remote.take_warnings().is_empty());

    // Both at once, the same and others.
    let c = Machine::new(folder(&shared), false);
    std::thread::scope(|scope| {
        for machine in [&a, &c] {
            scope.spawn(|| {
                for i in 0..40 {
                    let result = machine.make(&format!("both {i}"));
                    machine.remote.send(machine.cache.store(), &result, false);
                }
                machine.flush();
            });
        }
    });
    for i in 0..40 {
        b.has_whole(&Digest::of_bytes(format!("both {i}").as_bytes()));
    }
}

#[test]
fn what_is_damaged_there_is_never_used_and_is_written_anew() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    a.send(&made);
    for path in files(shared.path()) {
        let good = std::fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let longer = [&good[..], b"x"].concat();
        for bad in [
            Some(&good[..good.len() / 2]),
            Some(&[]),
            Some(&flipped),
            Some(&longer),
            None,
        ] {
            match bad {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let b = Machine::new(folder(&shared), false);
            let is_result = path.extension().is_some();
            if bad.is_some() || !is_result {
                let why = b.flawed(&made.key);
                let told = match (is_result, bad) {
                    (true, _) => "cannot be read",
                    (false, Some(_)) => "is damaged",
                    (false, None) => "is not there",
                };
                assert!(why.contains(told), "{why}");
            }
            // The step runs, and what it made takes the place of what was there.
            b.send(&b.make("made"));
            Machine::new(folder(&shared), true).has_whole(&made.key);
            assert_eq!(std::fs::read(&path).unwrap(), good);
        }
    }
}

#[test]
fn a_result_of_a_newer_program_stays() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    a.send(&made);
    let path = files(&shared.path().join("actions")).remove(0);
    let mut other = made.clone();
    for (version, stays) in [(ACTION_VERSION + 1, true), (ACTION_VERSION - 1, false)] {
        other.version = version;
        std::fs::write(&path, crate::action::to_text(&other)).unwrap();
        let b = Machine::new(folder(&shared), false);
        assert!(matches!(b.fetch(&made.key), Fetched::Nothing));
        b.send(&b.make("made"));
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept == crate::action::to_text(&other), stays);
    }
}

#[test]
fn a_cache_folder_is_a_remote_to_read_from() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    let url = folder_url(a.cache.dir()).unwrap();
    let bucket = Bucket::open(&url, false, &BTreeMap::new()).unwrap();
    let b = Machine::new(bucket, true);
    b.has_whole(&made.key);
    assert_eq!(b.remote.pull(&b.cache), Ok((0, 0)), "it is here already");
}

#[test]
fn parts_of_a_steps_work_are_shared_too() {
    let shared = tempfile::tempdir().unwrap();
    let [a, b] = [(); 2].map(|()| Machine::new(folder(&shared), false));
    let of = |machine: &Machine| {
        let actions = machine.cache.actions();
        actions.shared_through(&machine.remote, machine.cache.store())
    };
    let whole = a.make("whole");
    let part = a.result("part", []);
    of(&a).put(&part).unwrap();
    of(&a).put(&whole).unwrap();
    a.flush();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let found = runtime.block_on(async { of(&b).get(&part.key) });
    assert_eq!(found.as_ref(), Some(&part));
    assert_eq!(b.cache.actions().get(&part.key), Some(part), "it is kept");
    assert_eq!(of(&b).get(&whole.key), None, "its objects are not here");
    assert!(matches!(b.fetch(&whole.key), Fetched::Whole(_)));
}

#[test]
fn damage_here_is_not_sent() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    let path = a.cache.store().object_path(&Digest::of_bytes(b"made"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&path, "mode").unwrap();
    let sent = a.send(&made);
    assert_eq!((sent.results, sent.waiting), (0, 0));
    assert!(files(&shared.path().join("actions")).is_empty());
}

/// Bytes that no part of is like another.
fn large(length: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"large");
    let mut bytes = vec![0; length as usize];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_large_file_goes_in_parts_and_goes_on_after_a_kill() {
    let bucket = Bucket::memory();
    let a = Machine::new(bucket.clone(), false);
    let bytes = large(2 * PART + 5);
    let artifact = a.cache.store().put_bytes(&bytes).unwrap();
    let made = a.result("large", [("large", artifact.clone())]);

    // As a killed run left it: the second part is there, and the note's last line is torn.
    let path = bucket.object(&artifact.digest);
    let parts = bucket.parts.clone().unwrap();
    let run = |work| a.remote.wait(work);
    let upload = run(parts.create_multipart(&path)).unwrap();
    let second = bytes[PART as usize..2 * PART as usize].to_vec();
    a.remote
        .wait(parts.put_part(&path, &upload, 1, PutPayload::from(second)))
        .unwrap();
    let note = a.remote.shared.folder.join("uploads");
    std::fs::create_dir_all(&note).unwrap();
    let note = note.join(artifact.digest.to_hex());
    let size = bytes.len();
    let head = format!("{{\"part\":{PART},\"size\":{size},\"upload\":\"{upload}\",\"version\":1}}");
    std::fs::write(
        &note,
        format!("{head}\n{{\"id\":\"\",\"part\":1}}\n{{\"id\":"),
    )
    .unwrap();
    a.remote.outbox_add(&made.key);
    a.remote.send_waiting(&a.cache);
    let sent = a.flush();
    assert_eq!(
        (sent.results, sent.bytes),
        (1, PART + 5),
        "one part was there"
    );
    assert!(!note.exists());
    Machine::new(bucket.clone(), true).has_whole(&made.key);

    // The server forgot the upload: it begins anew.
    let b = Machine::new(Bucket::memory(), false);
    let artifact = b.cache.store().put_bytes(&bytes).unwrap();
    let made = b.result("large", [("large", artifact.clone())]);
    let note = b.remote.shared.folder.join("uploads");
    std::fs::create_dir_all(&note).unwrap();
    std::fs::write(
        note.join(artifact.digest.to_hex()),
        head.replace(&upload, "9"),
    )
    .unwrap();
    assert_eq!(b.send(&made).bytes, bytes.len() as u64);

    // In a folder, without parts.
    let shared = tempfile::tempdir().unwrap();
    let c = Machine::new(folder(&shared), false);
    let artifact = c.cache.store().put_bytes(&bytes).unwrap();
    let made = c.result("large", [("large", artifact.clone())]);
    assert_eq!(c.send(&made).bytes, bytes.len() as u64);
    Machine::new(folder(&shared), true).has_whole(&made.key);
    let object = files(&shared.path().join("objects")).remove(0);
    let mut spoilt = bytes.clone();
    spoilt[PART as usize + 3] ^= 1;
    std::fs::write(&object, &spoilt).unwrap();
    let why = Machine::new(folder(&shared), true).flawed(&made.key);
    assert!(why.contains("is damaged"), "{why}");
}

#[test]
fn a_server_that_is_not_there_is_asked_once() {
    // Nobody listens on a port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .unwrap()
        .port();
    let env = [
        ("AWS_ACCESS_KEY_ID", "AK".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "SK".to_owned()),
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
    ];
    let env = env.map(|(name, value)| (name.to_owned(), value)).into();
    let a = Machine::new(Bucket::open("s3://b/p", true, &env).unwrap(), false);
    let made = a.make("made");
    assert!(matches!(a.fetch(&made.key), Fetched::Nothing));
    let asked = Instant::now();
    for i in 0..1000u32 {
        let key = Digest::of_bytes(&i.to_le_bytes());
        assert!(matches!(a.fetch(&key), Fetched::Nothing));
    }
    let sent = a.send(&made);
    let told = a.remote.take_warnings();
    assert_eq!(
        (sent.results, sent.waiting, told.len()),
        (0, 1, 1),
        "{told:?}"
    );
    assert!(told[0].contains("the run goes on without it"), "{told:?}");
    assert!(a.remote.check().is_err(), "in {:?}", asked.elapsed());
}

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
