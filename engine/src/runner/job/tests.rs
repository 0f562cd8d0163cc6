//! The runner and the other end together, over a job system that does what a script says: its
//! jobs are threads of this process.
#![allow(clippy::unwrap_used)]

mod attempts;
mod killed_runs;
mod through_a_store;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use flowrun_cache::{Cache, Depot, Digest, OpenOptions, RemoteOptions};

use super::*;
use crate::runner::Host;
use crate::runner::protocol::PROTOCOL_VERSION;
use crate::step::{Cancel, StepOutcome, StepReporter};
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
    /// Not now.
    Busy,
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
            Fate::Busy => return Err(JobError::Busy("not yet".to_owned())),
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
    settings: JobSettings,
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
            settings: JobSettings::default(),
        }
    }

    /// One whose files go through a store, which is a folder.
    fn through_a_store() -> Self {
        let desk = Self::new();
        let cache = Cache::open(
            &desk.dir.path().join("cache"),
            &OpenOptions::no_wait("test"),
        )
        .unwrap();
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
            self.settings.clone(),
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
