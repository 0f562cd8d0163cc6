//! [`Workplace`]: the folder in which an action works: `out`, and `in` and `work` where
//! it has them, all empty.
//!
//! Folders are used again, because to make and remove some for each action costs more than
//! many an action itself: a file system without a journal looks at every inode that was
//! removed lately before it gives one away. Invariant: a folder is used again only when it
//! is as it was made, and no process of this user works in it; one that left its group might
//! write to it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use flowrun_cache::{Cache, CacheError, Scratch};
use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, SeekFrom, fstat, openat, seek};

/// So many used folders are looked at together: each look lists the processes of the system, which
/// takes about as long as to make and remove one folder (0.2 ms on ext4, by a profile).
const AT_ONCE: usize = 32;

/// Bytes of a folder's list that are read at a time: enough for what a workplace itself has, and for
/// an entry with the longest name (255 units of UTF-16 are some 800 bytes).
const LISTED: usize = 1024;

/// So often a folder is listed until nothing was left in it; then somebody still writes there, or its
/// file system does not list all.
const PASSES: usize = 16;

/// Which folders a workplace has beside `out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    /// `in`.
    pub(super) inputs: bool,
    /// `work`.
    pub(super) work: bool,
}

impl Shape {
    fn folders(self) -> impl Iterator<Item = &'static str> {
        let all = [(true, "out"), (self.inputs, "in"), (self.work, "work")];
        all.into_iter()
            .filter_map(|(has, name)| has.then_some(name))
    }
}

/// The workplaces of a run.
pub(super) struct Workplaces {
    cache: Arc<Cache>,
    shelves: Mutex<BTreeMap<Shape, Shelf>>,
    /// Processes that were there before the first workplace was taken, and are none of this user.
    strangers: OnceLock<HashSet<Process>>,
}

/// Folders of one shape.
#[derive(Default)]
struct Shelf {
    free: Vec<Scratch>,
    used: Vec<Scratch>,
}

impl Workplaces {
    pub(super) fn new(cache: &Arc<Cache>) -> Self {
        Self {
            cache: Arc::clone(cache),
            shelves: Mutex::default(),
            strangers: OnceLock::new(),
        }
    }

    /// An empty workplace.
    pub(super) fn take(&self, shape: Shape) -> Result<Workplace<'_>, CacheError> {
        let strangers = self.strangers.get_or_init(strangers);
        let free = self.shelves().entry(shape).or_default().take(strangers);
        let scratch = match free {
            Some(scratch) => scratch,
            None => self.make(shape)?,
        };
        Ok(Workplace {
            all: self,
            shape,
            scratch: Some(scratch),
        })
    }

    fn make(&self, shape: Shape) -> Result<Scratch, CacheError> {
        let scratch = self.cache.scratch()?;
        for name in shape.folders() {
            let path = scratch.path().join(name);
            std::fs::create_dir(&path).map_err(|e| CacheError::io(&path, e))?;
        }
        Ok(scratch)
    }

    fn shelves(&self) -> MutexGuard<'_, BTreeMap<Shape, Shelf>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn take(&mut self, strangers: &HashSet<Process>) -> Option<Scratch> {
        if self.free.is_empty()
            && self.used.len() >= AT_ONCE
            && let Some(folders) = working_folders(strangers)
        {
            self.free = std::mem::take(&mut self.used);
            let home = self
                .free
                .first()
                .and_then(|scratch| scratch.path().parent());
            // As the system names it, also behind a link.
            let home = home.and_then(|home| home.canonicalize().ok());
            let in_use = |scratch: &Scratch| {
                let name = scratch.path().file_name();
                let Some(path) = home.as_ref().zip(name).map(|(home, name)| home.join(name)) else {
                    return true;
                };
                folders.iter().any(|folder| folder.starts_with(&path))
            };
            // Those that are left out are removed.
            self.free.retain(|scratch| !in_use(scratch));
        }
        self.free.pop()
    }
}

/// A process of the system: its number, and the inode that `/proc` gave it. A later process of the same
/// number has another inode.
#[derive(PartialEq, Eq, Hash)]
struct Process {
    number: OsString,
    inode: u64,
}

impl Process {
    /// What a link that tells of it leads to.
    fn link(&self, name: &str) -> Option<PathBuf> {
        let link = Path::new("/proc").join(&self.number).join(name);
        std::fs::read_link(link).ok()
    }
}

/// All processes that can be seen; `None` where the system does not tell.
fn processes() -> Option<impl Iterator<Item = Process>> {
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    let processes = entries.map(|entry| Process {
        number: entry.file_name(),
        inode: entry.ino(),
    });
    Some(processes.filter(|process| process.number.as_encoded_bytes()[0].is_ascii_digit()))
}

/// The processes whose programs this one may not see: they are the kernel's own, or of another user, as
/// most of a system are. None of them works for an action of this run.
fn strangers() -> HashSet<Process> {
    let is_strange = |process: &Process| process.link("exe").is_none();
    processes()
        .into_iter()
        .flatten()
        .filter(is_strange)
        .collect()
}

/// The working folders of all processes but these; `None` where the system does not tell.
fn working_folders(strangers: &HashSet<Process>) -> Option<BTreeSet<PathBuf>> {
    // Where its own is hidden from this process, so are others.
    std::fs::read_link("/proc/self/cwd").ok()?;
    let others = processes()?.filter(|process| !strangers.contains(process));
    Some(others.filter_map(|process| process.link("cwd")).collect())
}

/// A folder for one attempt at an action.
pub(super) struct Workplace<'a> {
    all: &'a Workplaces,
    shape: Shape,
    /// Gone only when it is given back.
    scratch: Option<Scratch>,
}

impl Workplace<'_> {
    pub(super) fn path(&self) -> &Path {
        self.scratch.as_ref().map_or(Path::new(""), Scratch::path)
    }
}

impl Drop for Workplace<'_> {
    fn drop(&mut self) {
        if let Some(scratch) = self.scratch.take()
            && cleared(scratch.path(), self.shape).is_ok()
        {
            let mut shelves = self.all.shelves();
            shelves.entry(self.shape).or_default().used.push(scratch);
        }
    }
}

/// Empties the folders of a workplace, and removes everything else in it.
fn cleared(root: &Path, shape: Shape) -> io::Result<()> {
    let place = opened(CWD, root)?;
    let kept = emptied(&place, root, |name| {
        let is_ours = shape.folders().any(|folder| name == folder);
        match is_ours.then(|| opened(&place, Path::new(name))) {
            Some(Ok(folder)) => {
                emptied(&folder, &root.join(name), |_| Ok(false))?;
                Ok(true)
            }
            // No folder of ours, though it may have the name of one.
            Some(Err(_)) | None => Ok(false),
        }
    })?;
    match kept == shape.folders().count() {
        true => Ok(()),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// A folder, no link, in which its owner may do everything.
fn opened(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(at, path, flags, Mode::empty())?;
    match Mode::from_raw_mode(fstat(&folder)?.st_mode).contains(Mode::RWXU) {
        true => Ok(folder),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Removes what is in a folder but what is to be kept, and says how much that is.
fn emptied(
    folder: &OwnedFd,
    path: &Path,
    mut keeps: impl FnMut(&OsStr) -> io::Result<bool>,
) -> io::Result<usize> {
    for _ in 0..PASSES {
        let (mut kept, mut removed) = (0, false);
        let mut space = [MaybeUninit::uninit(); LISTED];
        let mut entries = RawDir::new(folder, &mut space);
        while let Some(entry) = entries.next().transpose()? {
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            if keeps(name)? {
                kept += 1;
                continue;
            }
            remove(&path.join(name), entry.file_type())?;
            removed = true;
        }
        if !removed {
            return Ok(kept);
        }
        // Not every file system lists the rest when something was removed meanwhile.
        seek(folder, SeekFrom::Start(0))?;
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

fn remove(path: &Path, kind: FileType) -> io::Result<()> {
    let is_dir = match kind {
        FileType::Directory => true,
        // Not every file system tells.
        FileType::Unknown => std::fs::symlink_metadata(path)?.is_dir(),
        _ => false,
    };
    if is_dir {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_cache::{LockWait, OpenOptions};

    use super::*;

    const BOTH: Shape = Shape {
        inputs: true,
        work: false,
    };

    fn workplaces() -> (Workplaces, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let options = OpenOptions {
            wait: LockWait::NoWait,
            command: "test".into(),
            on_wait: None,
        };
        let cache = Cache::open(&dir.path().canonicalize().unwrap(), &options).unwrap();
        (Workplaces::new(&Arc::new(cache)), dir)
    }

    fn names(path: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(path).unwrap();
        let name = |e: io::Result<std::fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_used_again_as_it_was_made() {
        let (all, _dir) = workplaces();
        let mut seen = BTreeSet::new();
        for _ in 0..3 * AT_ONCE {
            let place = all.take(BOTH).unwrap();
            assert_eq!(names(place.path()), ["in", "out"]);
            for folder in ["in", "out"] {
                assert!(names(&place.path().join(folder)).is_empty());
            }
            // More than is listed at a time.
            for i in 0..100 {
                std::fs::write(place.path().join(format!("out/a rather long name {i}")), "")
                    .unwrap();
            }
            std::fs::write(place.path().join("left"), "x").unwrap();
            std::fs::create_dir_all(place.path().join("out/deep/er")).unwrap();
            std::os::unix::fs::symlink("/", place.path().join("in/root")).unwrap();
            seen.insert(place.path().to_owned());
        }
        assert_eq!(seen.len(), AT_ONCE);
    }

    #[test]
    fn one_that_was_changed_or_in_which_somebody_works_is_not() {
        let (all, _dir) = workplaces();
        let place = all.take(BOTH).unwrap();
        std::fs::remove_dir(place.path().join("out")).unwrap();
        let changed = place.path().to_owned();
        std::fs::write(place.path().join("out"), "no folder").unwrap();
        drop(place);
        assert!(!changed.exists());
        let place = all.take(BOTH).unwrap();
        let busy = place.path().to_owned();
        let mut sleeper = std::process::Command::new("sleep");
        let mut sleeper = sleeper
            .arg("60")
            .current_dir(busy.join("out"))
            .spawn()
            .unwrap();
        drop(place);
        let again = (0..3 * AT_ONCE).any(|_| all.take(BOTH).unwrap().path() == busy);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(!again && !busy.exists());
    }
}
