//! What the machine offers a run, read from the environment in this one place;
//! and which pipeline is meant.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowrun_cache::remote::{folder_of, folder_url, is_folder};
use flowrun_cache::{Cache, LockWait, OpenOptions, RemoteCache, RemoteError, RemoteOptions};
use flowrun_engine::language::project_root;
use flowrun_engine::pipeline::Pipeline;
use flowrun_engine::premises::RunName;
use flowrun_engine::run::{Capacity, Expressions, RunOptions};
use flowrun_engine::step::{Cancel, World};
use flowrun_engine::vocabulary::Vocabulary;
use flowrun_engine::{
    Diagnostic, Diagnostics, InProfile, LoadOptions, check_profiles, eval_bool, load_pipeline,
    resolve_item,
};

use crate::args::{GlobalArgs, Scope, Select};
use crate::exit::Failure;

/// File in the cache folder that names the pipeline that was run last.
const LAST: &str = "last-pipeline";

/// A pipeline with what it needs to run.
pub(crate) struct Surroundings {
    pub(crate) pipeline: Pipeline,
    pub(crate) world: World,
}

/// A pipeline that is meant, before its file is read.
pub(crate) struct Asked {
    pub(crate) file: PathBuf,
    options: LoadOptions,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) world: World,
}

/// Which pipeline is meant, and with what laid over it.
pub(crate) fn ask(select: &Select, global: &GlobalArgs) -> Result<Asked, Failure> {
    let file = match &select.pipeline {
        Some(file) => file.clone(),
        None => find_pipeline(&global.cache_dir)?,
    };
    let world = world(&project_root(&file), global)?;
    let options = LoadOptions {
        sets: select.set.clone(),
        profiles: select.profile.clone(),
        env: world.env.clone(),
        root: None,
        remote_folder: remote_url(global).and_then(|url| folder_of(&url)),
    };
    Ok(Asked {
        file,
        options,
        vocabulary: flowrun_steps::registry(),
        world,
    })
}

impl Asked {
    /// Loads and checks it.
    pub(crate) fn load(self) -> Result<Surroundings, Failure> {
        let pipeline = self.pipeline()?;
        Ok(Surroundings {
            pipeline,
            world: self.world,
        })
    }

    /// The same, without what it needs to run.
    pub(crate) fn pipeline(&self) -> Result<Pipeline, Diagnostics> {
        load_pipeline(&self.file, &self.vocabulary, &self.options)
    }

    /// What is found only with one of its profiles, each tried by itself; `plain` is what is found
    /// without.
    pub(crate) fn in_profiles(&self, plain: &[Diagnostic]) -> Vec<InProfile> {
        check_profiles(&self.file, &self.vocabulary, &self.options, plain)
    }

    /// The name under which a run of it is remembered.
    pub(crate) fn run_name(&self) -> Option<RunName> {
        RunName::of(&self.file, &self.options, &self.world)
    }
}

/// Loads and checks the pipeline that is meant.
pub(crate) fn load(select: &Select, global: &GlobalArgs) -> Result<Surroundings, Failure> {
    ask(select, global)?.load()
}

/// Tells of what may go wrong in a run of it.
pub(crate) fn warn(pipeline: &Pipeline) {
    tell(&pipeline.warnings);
}

/// Tells of what was found.
pub(crate) fn tell(found: &Diagnostics) {
    if !found.errors.is_empty() {
        // When nobody reads it, the run itself still tells.
        let _ = writeln!(std::io::stderr(), "{found}");
    }
}

/// What the machine offers to what lies in `root`.
pub(crate) fn world(root: &Path, global: &GlobalArgs) -> Result<World, Failure> {
    let mut env = environment();
    // To the steps, and to the processes that run some of them, by the name that users know.
    if let Some(device) = &global.device {
        env.insert("FLOWRUN_DEVICE".to_owned(), device.clone());
    }
    Ok(World {
        offline: global.offline,
        look_only: false,
        distdir: global.distdir.clone(),
        user_cache: user_cache(&env),
        root: absolute(root)?,
        exe: std::env::current_exe()?,
        env,
        cancel: Cancel::default(),
    })
}

/// The environment variables that are text.
pub(crate) fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Whether to wait for a cache that another process holds.
pub(crate) fn wait(global: &GlobalArgs) -> LockWait {
    match global.no_wait {
        true => LockWait::NoWait,
        false => LockWait::Wait,
    }
}

/// Takes the cache. Says whom it waits for.
#[allow(clippy::print_stderr)]
pub(crate) fn hold_cache(global: &GlobalArgs, wait: LockWait) -> Result<Cache, Failure> {
    let tell = |holder: &str| eprintln!("waiting for {holder}, which uses the same cache");
    let words = std::env::args_os();
    let command: Vec<String> = words.map(|w| w.to_string_lossy().into_owned()).collect();
    let options = OpenOptions {
        wait,
        command: command.join(" "),
        on_wait: Some(&tell),
    };
    Ok(Cache::open(&global.cache_dir, &options)?)
}

/// The remote cache that is meant, if one is and may be used. What is wrong with the machine is
/// worth a warning only; what is wrong with the words is not.
#[allow(clippy::print_stderr)]
pub(crate) fn remote(global: &GlobalArgs) -> Result<Option<Arc<RemoteCache>>, Failure> {
    match open_remote(global) {
        Some(Ok(remote)) => Ok(Some(Arc::new(remote))),
        Some(Err(error @ RemoteError::Url { .. })) => Err(Failure::usage(error.to_string())),
        Some(Err(error)) => {
            eprintln!("warning: {error}");
            Ok(None)
        }
        None => Ok(None),
    }
}

/// The same, with what keeps it from being used.
pub(crate) fn open_remote(global: &GlobalArgs) -> Option<Result<RemoteCache, RemoteError>> {
    let options = RemoteOptions {
        url: remote_url(global)?,
        read_only: global.remote_read_only,
        env: environment(),
    };
    Some(RemoteCache::open(&options, &global.cache_dir))
}

/// The URL of the remote cache that is meant, if one is and may be used.
fn remote_url(global: &GlobalArgs) -> Option<String> {
    let text = global.remote.as_deref().filter(|text| !text.is_empty())?;
    let url = match text.contains("://") {
        true => text.to_owned(),
        false => {
            let folder = std::path::absolute(text).ok();
            folder.and_then(|folder| folder_url(&folder))?
        }
    };
    if global.offline && !is_folder(&url) {
        return None;
    }
    Some(url)
}

/// Options of a run of these steps.
pub(crate) fn run_options(jobs: Option<usize>, scope: &Scope) -> RunOptions {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut options = RunOptions::new(Expressions {
        resolve_item,
        eval_bool,
    });
    options.jobs = jobs.unwrap_or(cores);
    options.from.clone_from(&scope.from);
    options.until.clone_from(&scope.until);
    options.only.clone_from(&scope.only);
    options.force = scope.force;
    options.capacity = Capacity {
        cpu: cores as f64,
        memory: memory(),
        gpu: gpus(),
    };
    options
}

/// Bytes of memory of this machine; zero when the system does not say.
fn memory() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = total.and_then(|t| t.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

/// GPUs of this machine that have a device file; zero when there is none.
fn gpus() -> f64 {
    let is_gpu = |name: &str| {
        name.strip_prefix("nvidia")
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let devices = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let names = devices.filter(|d| d.file_name().to_str().is_some_and(is_gpu));
    names.count() as f64
}

/// The user's cache folder, as these variables have it.
pub(crate) fn user_cache(env: &BTreeMap<String, String>) -> PathBuf {
    let named = env
        .get("XDG_CACHE_HOME")
        .filter(|p| !p.is_empty())
        .map(PathBuf::from);
    let home = || env.get("HOME").map(|home| Path::new(home).join(".cache"));
    named
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("flowrun")
}

/// A path that holds wherever the program goes; the empty one is the folder that it is in.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    Ok(std::path::absolute(path)?)
}

/// Remembers the pipeline for the next call without one.
pub(crate) fn remember(file: &Path, cache_dir: &Path) {
    if let Ok(path) = std::path::absolute(file) {
        let (note, text) = (cache_dir.join(LAST), path.display().to_string());
        if std::fs::read(&note).is_ok_and(|noted| noted == text.as_bytes()) {
            return;
        }
        // Without the note the next call asks for the file's name.
        let _ = std::fs::write(note, text);
    }
}

/// The pipeline that a command without a file means.
pub(crate) fn find_pipeline(cache_dir: &Path) -> Result<PathBuf, Failure> {
    if let Ok(last) = std::fs::read_to_string(cache_dir.join(LAST))
        && Path::new(&last).is_file()
    {
        return Ok(PathBuf::from(last));
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir("pipelines")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "yaml" || e == "yml"))
        .collect();
    found.sort();
    let main = Path::new("pipelines/banking77.yaml");
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Failure::usage(
            "there is no pipeline here; name one: `flowrun FILE.yaml`",
        )),
        many if many.iter().any(|p| p == main) => Ok(main.to_owned()),
        many => {
            let names: Vec<String> = many.iter().map(|p| p.display().to_string()).collect();
            Err(Failure::usage(format!(
                "which pipeline? There are {}",
                names.join(", ")
            )))
        }
    }
}
