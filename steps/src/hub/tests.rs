#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flowrun_engine::step::Cancel;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn world(dir: &Path, env: &[(&str, &str)]) -> World {
    let env = env
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    World {
        user_cache: dir.join("flowrun"),
        env: env.collect(),
        ..World::default()
    }
}

/// A hub that answers everything with this head.
fn hub(head: &str) -> String {
    let head = head.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the test's process; a client may ask more than once.
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let rest = "Content-Length: 0\r\nConnection: close";
            let _ = write!(stream, "HTTP/1.1 {head}\r\n{rest}\r\n\r\n");
        }
    });
    format!("http://{address}")
}

#[test]
fn a_file_that_need_not_be_is_absent_for_the_hub_and_its_mirrors() {
    for (head, is_absent, is_noted) in [
        ("404 Not Found\r\nX-Error-Code: EntryNotFound", true, true),
        ("404 Not Found", true, false),
        (
            "404 Not Found\r\nX-Error-Code: RevisionNotFound",
            false,
            false,
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = hub(head);
        let env = [("HF_ENDPOINT", endpoint.as_str())];
        let world = world(dir.path(), &env);
        let snapshot = Snapshot::newest(RepoType::Model, "owner/name", COMMIT, &world).unwrap();
        let found = snapshot.optional_file("chat_template.jinja");
        assert_eq!(matches!(found, Ok(None)), is_absent, "{head}");
        let notes = snapshot.of.folder().join(".no_exist");
        assert_eq!(notes.exists(), is_noted, "{head}");
    }
}

/// What is said of a hub that answers everything with this head, to somebody with this token.
fn error_of(head: &str, token: &str) -> StepError {
    let endpoint = hub(head);
    let dir = tempfile::tempdir().unwrap();
    let env = [("HF_ENDPOINT", endpoint.as_str()), ("HF_TOKEN", token)];
    let world = world(dir.path(), &env);
    let snapshot = Snapshot::newest(RepoType::Model, "owner/name", COMMIT, &world).unwrap();
    snapshot.file("config.json").unwrap_err()
}

#[test]
fn what_the_hub_refuses_is_explained_and_not_taken_for_an_outage() {
    for (head, token, text) in [
        (
            "404 Not Found\r\nX-Error-Code: EntryNotFound",
            "",
            "has no file `config.json`",
        ),
        (
            "404 Not Found\r\nX-Error-Code: RevisionNotFound",
            "",
            "has no revision",
        ),
        ("404 Not Found", "", "cannot be had"),
        (
            "401 Unauthorized\r\nX-Error-Code: RepoNotFound",
            "",
            "or it is private",
        ),
        (
            "401 Unauthorized\r\nX-Error-Code: GatedRepo",
            "",
            "is gated, and no token was sent",
        ),
        (
            "403 Forbidden\r\nX-Error-Code: GatedRepo",
            "hf_x",
            "the token in HF_TOKEN has no access",
        ),
        (
            "401 Unauthorized\r\nX-Error-Message: Invalid credentials in Authorization header",
            "hf_x",
            "does not accept the token in HF_TOKEN",
        ),
        (
            "403 Forbidden\r\nX-Error-Code: DisabledRepo",
            "",
            "was disabled",
        ),
        ("403 Forbidden", "hf_x", "may not read"),
        ("418 Teapot", "", "cannot be had"),
    ] {
        let error = error_of(head, token);
        assert_eq!(error.kind, StepErrorKind::Invalid, "{}", error.message);
        assert!(error.message.contains(text), "{head}: {}", error.message);
        assert!(!error.to_string().contains("hf_x"));
        assert!(error.help.is_some(), "{head}");
    }
    for head in ["429 Too Many Requests", "503 Service Unavailable"] {
        let error = error_of(head, "");
        assert_eq!(error.kind, StepErrorKind::Transient, "{}", error.message);
    }
}

#[test]
fn an_etag_is_no_way_out_of_the_cache() {
    for etag in ["\"../../x\"", "\"\"", "\"a/b\"", "\".\""] {
        let error = error_of(&format!("200 OK\r\nETag: {etag}"), "");
        assert!(
            error.message.contains("no usable ETag"),
            "{}",
            error.message
        );
    }
}

#[test]
fn the_cache_and_the_token_are_those_of_the_hubs_own_clients() {
    let dir = tempfile::tempdir().unwrap();
    let at = |env: &[(&str, &str)]| cache_folder(&world(dir.path(), env));
    assert_eq!(at(&[]), dir.path().join("huggingface/hub"));
    assert_eq!(at(&[("HF_HOME", "/h")]), Path::new("/h/hub"));
    assert_eq!(
        at(&[("HF_HOME", "~/h"), ("HOME", "/u")]),
        Path::new("/u/h/hub")
    );
    assert_eq!(
        at(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]),
        Path::new("/c")
    );
    assert_eq!(
        at(&[("HF_HUB_CACHE", " ")]),
        dir.path().join("huggingface/hub")
    );

    let bearer = |env: &[(&str, &str)]| {
        let settings = Settings::of(&world(dir.path(), env)).unwrap();
        settings.token.map(|token| token.bearer())
    };
    assert_eq!(bearer(&[]), None);
    std::fs::create_dir_all(dir.path().join("huggingface")).unwrap();
    std::fs::write(dir.path().join("huggingface/token"), "hf_file\n").unwrap();
    assert_eq!(bearer(&[]).as_deref(), Some("Bearer hf_file"));
    let set = [("HF_TOKEN", "hf_set")];
    assert_eq!(bearer(&set).as_deref(), Some("Bearer hf_set"));
    let error = Settings::of(&world(dir.path(), &[("HF_TOKEN", "hf_a b")])).unwrap_err();
    assert!(!error.message.contains("hf_a"), "{}", error.message);
    let error = Settings::of(&world(dir.path(), &[("HF_ENDPOINT", "hub.local")])).unwrap_err();
    assert!(error.message.contains("HF_ENDPOINT"), "{}", error.message);
}

#[test]
fn names_stay_within_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let world = world(dir.path(), &[("HF_HUB_OFFLINE", "1")]);
    let open = |repo, revision| Snapshot::newest(RepoType::Model, repo, revision, &world);
    for repo in ["", "a/b/c", "../a", "a/..", "a b", "/a", "a/"] {
        let error = open(repo, COMMIT).unwrap_err();
        assert!(
            error.message.contains("names no repository"),
            "{}",
            error.message
        );
    }
    for revision in ["", "../x", "/x", "a/../../b"] {
        let error = open("a/b", revision).unwrap_err();
        assert!(
            error.message.contains("is no revision"),
            "{}",
            error.message
        );
    }
    let snapshot = open("a/b", COMMIT).unwrap();
    for file in ["", "../x", "/etc/passwd", "a\nb"] {
        let error = snapshot.file(file).unwrap_err();
        assert!(error.message.contains("is no file"), "{}", error.message);
    }
    let error = snapshot.file("a.json").unwrap_err();
    assert!(
        error.message.contains("HF_HUB_OFFLINE forbids"),
        "{}",
        error.message
    );
    let error = open("a/b", "refs/pr/1").unwrap_err();
    assert!(
        error.message.contains("does not know the commit"),
        "{}",
        error.message
    );
    assert_eq!(encoded("refs/pr 1", 0), "refs%2Fpr%201");
    assert_eq!(encoded("a b/ö.csv", b'/'), "a%20b/%C3%B6.csv");
}

#[test]
fn a_branch_stands_for_one_commit_as_long_as_the_process_lives() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let offline = [("HF_HUB_OFFLINE", "1")];
    let (first, second) = (
        world(dir.path(), &offline),
        world(elsewhere.path(), &offline),
    );
    let other = COMMIT.replace('0', "f");
    let settle = |revision: &str, commit: &str, world: &World| {
        settle(RepoType::Model, "owner/moves", revision, commit, world)
    };
    let commit = |world: &World| {
        let found = Snapshot::newest(RepoType::Model, "owner/moves", "main", world);
        found.unwrap().commit().to_owned()
    };
    settle("main", COMMIT, &first).unwrap();
    settle("main", COMMIT, &first).unwrap();
    let refused = settle("main", &other, &first).unwrap_err();
    assert_eq!(refused.kind, StepErrorKind::Failed);
    for named in [COMMIT, other.as_str(), "main"] {
        assert!(refused.message.contains(named), "{}", refused.message);
    }
    assert_eq!(commit(&first), COMMIT);
    // Another branch, another cache: as another run has it.
    settle("side", &other, &first).unwrap();
    settle("main", &other, &second).unwrap();
    assert_eq!(commit(&second), other);
    assert_eq!(commit(&first), COMMIT);
    // A commit stands for itself.
    settle(COMMIT, &other, &first).unwrap();
}

/// A hub whose files hold `content`: it gives the first half of what it is asked for, and the rest
/// from `go` on. Gives its URL, and the places from which it was asked.
fn slow_hub(content: &'static [u8], go: &Arc<AtomicBool>) -> (String, Arc<Mutex<Vec<usize>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked: Arc<Mutex<Vec<usize>>> = Arc::default();
    let (go, seen) = (Arc::clone(go), Arc::clone(&asked));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (go, seen) = (Arc::clone(&go), Arc::clone(&seen));
            std::thread::spawn(move || answer_slowly(stream, content, &go, &seen));
        }
    });
    (url, asked)
}

fn answer_slowly(mut stream: TcpStream, content: &[u8], go: &AtomicBool, seen: &Mutex<Vec<usize>>) {
    let mut buffer = [0; 4096];
    let count = stream.read(&mut buffer).unwrap_or(0);
    let head = String::from_utf8_lossy(&buffer[..count]).to_lowercase();
    let range = head
        .lines()
        .find_map(|line| line.strip_prefix("range: bytes="));
    let from: usize = range.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
    let total = content.len();
    let status = match from {
        0 => "200 OK".to_owned(),
        _ => {
            let last = total - 1;
            format!("206 Partial Content\r\nContent-Range: bytes {from}-{last}/{total}")
        }
    };
    let more = format!("Content-Length: {}\r\nConnection: close", total - from);
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nETag: \"abc\"\r\n{more}\r\n\r\n"
    );
    if head.starts_with("head") {
        return;
    }
    seen.lock().unwrap().push(from);
    let (first, second) = content[from..].split_at((total - from) / 2);
    let _ = stream.write_all(first);
    while !go.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = stream.write_all(second);
}

/// Sets the flag once `ready`.
fn stop_when(cancel: &Cancel, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ready() {
        assert!(Instant::now() < deadline, "it never came so far");
        std::thread::sleep(Duration::from_millis(5));
    }
    cancel.cancel();
}

#[test]
fn a_download_that_is_stopped_leaves_what_came_and_the_next_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let go = Arc::new(AtomicBool::new(false));
    let (endpoint, asked) = slow_hub(b"0123456789", &go);
    let world = world(dir.path(), &[("HF_ENDPOINT", endpoint.as_str())]);
    let snapshot = |world: &World| {
        let snapshot = Snapshot::newest(RepoType::Model, "owner/slow", COMMIT, world);
        snapshot.unwrap()
    };
    let cancel = Cancel::default();
    let stopped = snapshot(&world.until(&cancel));
    let part = stopped.of.folder().join("blobs/abc.part");
    let fetching = std::thread::spawn(move || stopped.file("a.txt"));
    stop_when(&cancel, || {
        std::fs::read(&part).is_ok_and(|came| came.len() == 5)
    });
    let error = fetching.join().unwrap().unwrap_err();
    assert_eq!(error.kind, StepErrorKind::Cancelled, "{}", error.message);
    assert_eq!(std::fs::read(&part).unwrap(), b"01234");

    go.store(true, Ordering::SeqCst);
    let path = snapshot(&world).file("a.txt").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"0123456789");
    assert_eq!(*asked.lock().unwrap(), [0, 5]);
}

#[test]
fn who_waits_for_another_process_or_for_a_silent_hub_hears_the_stop() {
    let dir = tempfile::tempdir().unwrap();
    let go = Arc::new(AtomicBool::new(true));
    let (endpoint, asked) = slow_hub(b"0123456789", &go);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = (format!("http://{}", silent.local_addr().unwrap()), silent);
    let wait_at = |endpoint: &str| {
        let cancel = Cancel::default();
        let world = world(dir.path(), &[("HF_ENDPOINT", endpoint)]).until(&cancel);
        let snapshot = Snapshot::newest(RepoType::Model, "owner/held", COMMIT, &world).unwrap();
        let blobs = snapshot.of.folder().join("blobs");
        let waiting = std::thread::spawn(move || snapshot.file("a.txt"));
        (cancel, blobs, waiting)
    };
    let (cancel, blobs, waiting) = wait_at(&silent.0);
    // It is asked.
    let (stream, _) = silent.1.accept().unwrap();
    cancel.cancel();
    let error = waiting.join().unwrap().unwrap_err();
    assert_eq!(error.kind, StepErrorKind::Cancelled, "{}", error.message);
    drop(stream);

    std::fs::create_dir_all(&blobs).unwrap();
    let held = File::create(blobs.join("abc.lock")).unwrap();
    held.lock().unwrap();
    let (cancel, _, waiting) = wait_at(&endpoint);
    std::thread::sleep(Duration::from_millis(100));
    cancel.cancel();
    let error = waiting.join().unwrap().unwrap_err();
    assert_eq!(error.kind, StepErrorKind::Cancelled, "{}", error.message);
    assert!(asked.lock().unwrap().is_empty());
    // Nobody is left in line.
    held.unlock().unwrap();
    let (_, _, fetching) = wait_at(&endpoint);
    fetching.join().unwrap().unwrap();
}
