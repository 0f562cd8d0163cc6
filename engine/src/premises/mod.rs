//! [`Premises`]: everything that a whole run rested on. While all of it holds, the
//! next run of the same pipeline has nothing to do, and need not even read the file
//! as YAML: it looks at what there is, and copies the record.
//!
//! | what a run rests on | how it is checked |
//! |---|---|
//! | this program, the folder, profiles, `--set`, options of the world | part of the name |
//! | the texts of the pipeline and what it includes | hashed |
//! | the environment (secrets: that they are there) | hashed |
//! | project files that steps take, name in a command, or publish to | stamp, else hashed; when only these changed, only what they reach is looked at: [`Changed`] |
//! | names in commands that are no files | still none |
//! | what a step kind observes of the world | observed again |
//! | results in the action cache | still there |
//! | objects in the store | stamp, else hashed |
//!
//! A stamp counts only when it was taken of a file that was hashed and had been left
//! alone for a while. Whatever does not hold, or cannot be told, leads to an ordinary run.
//! Invariant: nothing is skipped but work whose result would be the same.

mod changed;
mod check;
mod held;
mod known;
mod memory;
mod stamps;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowrun_cache::{Artifact, Cache, Digest, FileStamp};
use memchr::memmem;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::changed::Changed;
pub use self::check::{Recalled, Unchanged, recall};
use self::held::Held;
pub(crate) use self::memory::Memory;
pub(crate) use self::stamps::Stamps;
use crate::hook::Hook;
use crate::language::LoadOptions;
use crate::step::World;
use crate::tracking::Tracking;

/// Version of the file. Another one on disk is as good as none.
const VERSION: u32 = 6;
/// Folder in the cache.
const FOLDER: &str = "premises";
/// Bytes of an object's entry: digest, size, two times, inode, whether the stamp counts.
const ENTRY: usize = 32 + 8 * 6 + 1;
/// Runs that are remembered; those that were written longest ago are forgotten.
const RUNS: usize = 8;
/// Bytes of a key.
const KEY: usize = 32;
/// Bytes of the time that an action took.
const TOOK: usize = 8;
/// Bytes of a step's entry: how many keys, bytes of objects, bytes of events, whether skipped.
const STEP: usize = 4 * 4;

/// Which run is meant: everything of a command line that decides what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunName(Digest);

impl RunName {
    /// The name; `None` when the program or the folder cannot be told.
    #[must_use]
    pub fn of(file: &Path, options: &LoadOptions, world: &World) -> Option<Self> {
        let program = FileStamp::of(&std::fs::metadata(&world.exe).ok()?);
        let here = std::env::current_dir().ok()?;
        let root = options.root.as_deref();
        let paths = [&here, file, &world.exe, &world.root, &world.user_cache];
        let mut paths = paths
            .into_iter()
            .chain(root)
            .chain(world.distdir.as_deref());
        // JSON holds text alone.
        if !paths.all(|path| path.to_str().is_some()) {
            return None;
        }
        let name = (
            (VERSION, env!("CARGO_PKG_VERSION"), &world.exe, program),
            (&here, file, &options.root, &world.root),
            (&options.profiles, &options.sets),
            (world.offline, &world.distdir, &world.user_cache),
        );
        Some(Self(Digest::of_record("run-name", &name)))
    }

    /// Something is remembered under it. What, is not known yet.
    #[must_use]
    pub fn is_known(&self, cache_dir: &Path) -> bool {
        cache_dir.join(self.path()).exists()
    }

    fn path(&self) -> PathBuf {
        Path::new(FOLDER).join(self.0.to_hex())
    }

    fn steps_path(&self) -> PathBuf {
        self.path().with_extension("steps")
    }
}

/// What is checked, and what is told when it holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Premises {
    version: u32,
    pipeline: String,
    steps: usize,
    cached: usize,
    skipped: usize,
    root: PathBuf,
    sources: Vec<(PathBuf, Digest)>,
    secrets: Vec<String>,
    hooks: BTreeMap<String, Hook>,
    tracking: Tracking,
    environment: Digest,
    files: Vec<FilePremise>,
    absent: Vec<String>,
    observed: Vec<Observed>,
    report: Option<Artifact>,
    /// Digest of what [`Known`] reads.
    graph: Digest,
    /// Lengths of what follows a table of the steps: keys (then how long each action took),
    /// objects, the plan, the events; each step by step.
    keys: usize,
    objects: usize,
    plan: usize,
    events: usize,
}

/// A file or folder of the project.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct FilePremise {
    path: PathBuf,
    held: Held,
    stamp: Option<FileStamp>,
    /// The steps that saw it, or put it there.
    steps: Vec<usize>,
}

/// The file as it was read.
struct Remembered {
    name: RunName,
    head: Premises,
    bytes: Vec<u8>,
}

impl Remembered {
    /// `None` when a byte is wrong.
    fn parse(name: RunName, bytes: Vec<u8>) -> Option<Self> {
        let (sum, body) = bytes.split_at_checked(65)?;
        let sum = Digest::parse(std::str::from_utf8(sum.get(..64)?).ok()?)?;
        if sum != Digest::of_bytes(body) {
            return None;
        }
        let end = body.iter().position(|b| *b == b'\n')?;
        let head: Premises = serde_json::from_slice(body.get(..end)?).ok()?;
        let sections = [
            STEP * head.steps,
            head.keys,
            head.keys / KEY * TOOK,
            head.objects,
            head.plan,
            head.events,
        ];
        let whole = head.version == VERSION
            && sections.iter().sum::<usize>() == body.len().checked_sub(end + 1)?;
        whole.then_some(Self { name, head, bytes })
    }

    /// The section that ends so many bytes before the end.
    fn section(&self, length: usize, after: usize) -> &[u8] {
        let end = self.bytes.len() - after;
        &self.bytes[end - length..end]
    }

    fn events(&self) -> &[u8] {
        self.section(self.head.events, 0)
    }

    fn plan(&self) -> &[u8] {
        self.section(self.head.plan, self.head.events)
    }

    fn objects(&self) -> &[u8] {
        self.section(self.head.objects, self.head.events + self.head.plan)
    }

    fn took(&self) -> &[u8] {
        let after = self.head.events + self.head.plan + self.head.objects;
        self.section(self.head.keys / KEY * TOOK, after)
    }

    fn keys(&self) -> &[u8] {
        let after = self.head.events + self.head.plan + self.head.objects + self.took().len();
        self.section(self.head.keys, after)
    }

    fn table(&self) -> &[u8] {
        let after = self.head.events + self.head.plan + self.head.objects + self.took().len();
        self.section(STEP * self.head.steps, after + self.head.keys)
    }

    /// The plan's text in pieces, for a run of this id: it stands once, at the beginning.
    fn plan_of<'a>(&'a self, run_id: &'a str) -> [&'a [u8]; 3] {
        let plan = self.plan();
        let at = memmem::find(plan, check::PLACEHOLDER.as_bytes()).unwrap_or(plan.len());
        let (before, rest) = plan.split_at(at);
        let after = rest.get(check::PLACEHOLDER.len()..).unwrap_or_default();
        [before, run_id.as_bytes(), after]
    }
}

/// What a step kind said of the world.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Observed {
    pub(crate) kind: String,
    pub(crate) params: Value,
    pub(crate) facts: BTreeMap<String, Value>,
}

/// An object of the store.
#[derive(Debug, Clone, Copy)]
struct ObjectPremise {
    digest: Digest,
    stamp: FileStamp,
    /// The object was hashed when it had this stamp, and had settled before.
    trusted: bool,
}

impl ObjectPremise {
    fn write(&self, out: &mut Vec<u8>) {
        let FileStamp {
            size,
            mtime,
            ctime,
            inode,
        } = self.stamp;
        out.extend_from_slice(self.digest.as_bytes());
        for number in [size, inode] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [mtime.0, mtime.1, ctime.0, ctime.1] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(u8::from(self.trusted));
    }

    fn read(entry: &[u8]) -> Option<Self> {
        let word = |at: usize| -> Option<[u8; 8]> { entry.get(at..at + 8)?.try_into().ok() };
        let signed = |at| word(at).map(i64::from_le_bytes);
        Some(Self {
            digest: Digest::from_slice(entry.get(..32)?)?,
            stamp: FileStamp {
                size: u64::from_le_bytes(word(32)?),
                inode: u64::from_le_bytes(word(40)?),
                mtime: (signed(48)?, signed(56)?),
                ctime: (signed(64)?, signed(72)?),
            },
            trusted: *entry.get(80)? == 1,
        })
    }
}

/// The environment, less the values of secrets and what differs from call to call.
fn environment(world: &World, secrets: &[String]) -> Digest {
    let shown: BTreeMap<&String, Option<&String>> = world
        .env
        .iter()
        .filter(|(name, _)| !is_of_the_call(name))
        .map(|(name, value)| (name, (!secrets.contains(name)).then_some(value)))
        .collect();
    Digest::of_record("environment", &shown)
}

/// A shell's notes for itself, and the trace that a run is a part of. The folder is part of the name.
fn is_of_the_call(name: &str) -> bool {
    let shell = ["_", "OLDPWD", "PWD", "SHLVL"];
    let trace = ["TRACEPARENT", "TRACESTATE"];
    shell.contains(&name) || trace.contains(&name)
}

/// Writes what is remembered under `name`.
fn write(cache: &Cache, name: RunName, head: &Premises, parts: &[&[u8]]) {
    let Ok(mut head) = serde_json::to_vec(head) else {
        return;
    };
    head.push(b'\n');
    let mut file: Vec<&[u8]> = vec![&head];
    file.extend(parts);
    let sum = format!("{}\n", Digest::of_parts(&file));
    file.insert(0, sum.as_bytes());
    // Without it the next run is an ordinary one.
    let _ = cache.write_parts(&name.path(), &file);
}

/// Forgets the runs that were written longest ago.
fn forget(cache: &Cache) {
    let files = std::fs::read_dir(cache.dir().join(FOLDER));
    let names = files.into_iter().flatten().flatten().map(|f| f.path());
    let mut runs: Vec<_> = names
        .filter(|path| path.extension().is_none())
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .collect();
    runs.sort();
    let spare = runs.len().saturating_sub(RUNS);
    for (_, path) in runs.into_iter().take(spare) {
        // One that stays is as good as before.
        let _ = std::fs::remove_file(path.with_extension("steps"));
        let _ = std::fs::remove_file(path);
    }
}
