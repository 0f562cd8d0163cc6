//! Two machines and a shared place between them.

mod answers;
mod damage;
mod large;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

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
fn a_result_of_a_newer_program_stays() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    a.send(&made);
    let path = files(&shared.path().join("actions")).remove(0);
    let mut other = made.clone();
    for (version, stays) in [(u32::MAX, true), (ACTION_VERSION - 1, false)] {
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
