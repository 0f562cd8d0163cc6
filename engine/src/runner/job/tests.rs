//! The runner and the other end together, over a job system that does what a script says: its
//! jobs are threads of this process.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flowrun_cache::{Cache, Depot, Digest, LockWait, OpenOptions, RemoteOptions};

use super::*;
use crate::runner::Host;
use crate::runner::protocol::PROTOCOL_VERSION;
use crate::step::{Cancel, StepErrorKind, StepOutcome, StepReporter};
use crate::vocabulary::Vocabulary;

/// What becomes of the next order.
#[derive(Clone, Copy)]
enum Fate {
    /// The work is done.
    Work,
    /// It is lost before it begins.
    Dies,
    /// Its process is told to stop while it works, and the system says this of it then.
    Told(fn() -> JobEnd),
    /// Its process cannot be started.
    Fails,
    /// It never gets a place.
    Waits,
    /// Nobody answers.
    Away,
    /// No.
    No,
}

#[derive(Default)]
struct Scripted {
    fates: Mutex<VecDeque<Fate>>,
    jobs: Arc<Mutex<BTreeMap<String, JobState>>>,
    orders: Arc<Mutex<Vec<String>>>,
}

impl JobSystem for Scripted {
    fn name(&self) -> String {
        "script".to_owned()
    }
    fn submit(&self, order: &JobOrder<'_>) -> Result<(), JobError> {
        let fate = self.fates.lock().unwrap().pop_front().unwrap_or(Fate::Work);
        let state = match fate {
            Fate::Away => return Err(JobError::Unreachable("nobody at home".to_owned())),
            Fate::No => return Err(JobError::refused("no")),
            Fate::Dies => JobState::Ended(JobEnd::Killed("its node died".to_owned())),
            Fate::Fails => JobState::Ended(JobEnd::Failed("not found".to_owned())),
            Fate::Waits => JobState::Waiting {
                why: "no node has 9 CPU".to_owned(),
                hopeless: true,
            },
            Fate::Work | Fate::Told(_) => JobState::Running,
        };
        let (cancel, end) = (
            Cancel::default(),
            match fate {
                Fate::Told(end) => end(),
                _ => JobEnd::Well,
            },
        );
        if matches!(fate, Fate::Told(_)) {
            cancel.cancel();
        }
        let id = order.id.to_owned();
        self.orders.lock().unwrap().push(id.clone());
        self.jobs.lock().unwrap().insert(id.clone(), state.clone());
        if state == JobState::Running {
            let (jobs, args) = (Arc::clone(&self.jobs), order.args.clone());
            let folder = order.folder.map(Path::to_owned);
            std::thread::spawn(move || {
                match folder {
                    Some(folder) => work(&folder, &cancel),
                    None => work_through(&args, &cancel),
                }
                jobs.lock().unwrap().insert(id, JobState::Ended(end));
            });
        }
        Ok(())
    }
    fn state(&self, order: &JobOrder<'_>) -> Result<JobState, JobError> {
        let jobs = self.jobs.lock().unwrap();
        Ok(jobs.get(order.id).cloned().unwrap_or(JobState::Unknown))
    }
    fn stop(&self, _: &str) -> Result<(), JobError> {
        Ok(())
    }
    fn forget(&self, _: &str) -> Result<bool, JobError> {
        Ok(true)
    }
}

fn work(folder: &Path, cancel: &Cancel) {
    let env = [
        ("PATH", "/usr/bin:/bin"),
        ("OTHER", "of the worker"),
        ("LC_ALL", "of the worker"),
    ];
    let host = Host {
        vocabulary: Vocabulary::default(),
        env: env.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        exe: PathBuf::new(),
    };
    let post = Post::take(folder).unwrap().unwrap();
    exec_job(host, post, cancel, std::io::sink(), || {}).unwrap();
}

/// Does the work that `step exec --job ID --through URL` does.
fn work_through(args: &[String], cancel: &Cancel) {
    let [.., id, _, url] = args else {
        unreachable!("{args:?}")
    };
    let scratch = tempfile::tempdir().unwrap();
    let env = [
        ("PATH", "/usr/bin:/bin"),
        ("TOKEN", "hush"),
        ("LC_ALL", "of the worker"),
    ];
    let env: BTreeMap<String, String> = env.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let ground = Ground {
        scratch: scratch.path(),
        user_cache: Path::new("/nowhere"),
        env: &env,
    };
    let Some(outpost) = Outpost::take(url, id, &ground, cancel).unwrap() else {
        return;
    };
    let host = Host {
        vocabulary: Vocabulary::default(),
        env: env.clone(),
        exe: PathBuf::new(),
    };
    outpost.exec(host, std::io::sink(), || {}).unwrap();
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl StepReporter for Heard {
    fn progress(&self, _: u64, _: u64, _: &str, text: &str) {
        self.log(text);
    }
    fn warning(&self, text: &str) {
        self.log(&format!("warning: {text}"));
    }
    fn log(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

struct Desk {
    dir: tempfile::TempDir,
    cancel: Cancel,
    afresh: AtomicBool,
    heard: Arc<Heard>,
    orders: Arc<Mutex<Vec<String>>>,
    /// A cache here, where the workers see no folder of this side.
    cache: Option<Arc<Cache>>,
}

impl Desk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["place/in", "place/out/deep"] {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        std::fs::write(dir.path().join("place/in/x"), "input ").unwrap();
        Self {
            dir,
            cancel: Cancel::default(),
            afresh: AtomicBool::new(false),
            heard: Arc::default(),
            orders: Arc::default(),
            cache: None,
        }
    }

    /// One whose files go through a store, which is a folder.
    fn through_a_store() -> Self {
        let desk = Self::new();
        let options = OpenOptions {
            wait: LockWait::NoWait,
            command: "test".to_owned(),
            on_wait: None,
        };
        let cache = Cache::open(&desk.dir.path().join("cache"), &options).unwrap();
        Self {
            cache: Some(Arc::new(cache)),
            ..desk
        }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn url(&self) -> String {
        format!("file://{}", self.store().display())
    }

    fn way(&self) -> Option<Way> {
        let cache = self.cache.as_ref()?;
        let options = RemoteOptions {
            url: self.url(),
            read_only: false,
            env: BTreeMap::new(),
        };
        Some(Way {
            depot: Arc::new(Depot::open(&options, cache.dir()).unwrap()),
            cache: Arc::clone(cache),
            variables: Vec::new(),
        })
    }

    fn inputs(&self) -> Vec<ShippedInput> {
        let cache = self.cache.as_ref();
        let x = cache.map(|cache| {
            let file = self.dir.path().join("place/in/x");
            cache.store().put_path(&file).unwrap()
        });
        let input = |artifact| ShippedInput {
            path: "in/x".to_owned(),
            artifact,
        };
        x.map(input).into_iter().collect()
    }

    fn run(&self, command: &str, fates: &[Fate]) -> Result<StepOutcome, StepError> {
        self.with(command, fates, Remote::run)
    }

    fn with<T>(
        &self,
        command: &str,
        fates: &[Fate],
        then: impl FnOnce(&Remote, &Errand<'_>) -> T,
    ) -> T {
        let system = Scripted {
            fates: Mutex::new(fates.iter().copied().collect()),
            orders: Arc::clone(&self.orders),
            ..Scripted::default()
        };
        let remote = Remote::new(
            Box::new(system),
            JobSettings::default(),
            Path::new("/flowrun"),
            self.dir.path(),
            self.way(),
        );
        let place = self.dir.path().join("place");
        let env = [("x", "in/x"), ("out", "out/deep/y")];
        let reporter: Arc<dyn StepReporter> = Arc::clone(&self.heard) as Arc<dyn StepReporter>;
        let errand = Errand {
            step: "s",
            run: "r",
            timeout: None,
            key: Digest::of_bytes(b"key"),
            afresh: self.afresh.load(Ordering::SeqCst),
            folder: self.folder(),
            place: &place,
            inputs: self.inputs(),
            saved: self.dir.path().join("saved"),
            request: Request::Command(CommandRequest {
                protocol: PROTOCOL_VERSION,
                command: command.to_owned(),
                folder: place.clone(),
                env: env.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            }),
            environment: Environment {
                secrets: [("TOKEN".to_owned(), "hush".to_owned())].into(),
                handed: [("THREADS".to_owned(), "1".to_owned())].into(),
            },
            resources: &Resources::default(),
            cancel: &self.cancel,
            reporter: &reporter,
        };
        then(&remote, &errand)
    }

    /// As a run leaves it that wrote down this order and was killed.
    fn leave(&self, command: &str) -> folder::AttemptFolder {
        self.with(command, &[], |remote, errand| {
            let folder = folder::JobFolder::at(errand.folder.clone());
            let attempt = folder.attempt(1);
            remote.write(errand, &folder, &attempt, 1, "left").unwrap();
            attempt
        })
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("jobs/key")
    }

    fn made(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("place/out/deep/y")).unwrap_or_default()
    }

    fn heard(&self, words: &str) -> bool {
        self.heard
            .0
            .lock()
            .unwrap()
            .iter()
            .any(|l| l.contains(words))
    }

    fn orders(&self) -> usize {
        self.orders.lock().unwrap().len()
    }
}

const WORK: &str = "cat \"$x\" > \"$out\"; printf %s \"$TOKEN\" >> \"$out\"; echo said; printf %s \"${OTHER-}${LC_ALL-}\" >> \"$out\"";

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
        "traced": false,
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

/// A job system that went away.
struct Gone(AtomicUsize);

impl JobSystem for Gone {
    fn name(&self) -> String {
        "gone".to_owned()
    }
    fn submit(&self, _: &JobOrder<'_>) -> Result<(), JobError> {
        Err(JobError::Unreachable("gone".to_owned()))
    }
    fn state(&self, _: &JobOrder<'_>) -> Result<JobState, JobError> {
        Err(JobError::Unreachable("gone".to_owned()))
    }
    fn stop(&self, _: &str) -> Result<(), JobError> {
        Err(JobError::Unreachable("gone".to_owned()))
    }
    fn forget(&self, _: &str) -> Result<bool, JobError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Err(JobError::Unreachable("gone".to_owned()))
    }
}

#[test]
fn one_that_went_away_is_asked_once_to_forget() {
    let gone = Gone(AtomicUsize::new(0));
    let mut over = vec!["a".to_owned(), "b".to_owned()];
    assert!(!remote::forget(&gone, &mut over));
    assert_eq!((gone.0.load(Ordering::SeqCst), over.len()), (1, 2));
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
