//! [`Workplace`]: the folder in which an action works: `out`, and `in` and `work` where
//! it has them, all empty.
//!
//! Folders are used again, because to make and remove some for each action costs more than
//! many an action itself: a file system without a journal looks at every inode that was
//! removed lately before it gives one away. Invariant: a folder is used again only when it
//! is as it was made, and no process works in it; one that left its group might write to it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flowrun_cache::{Cache, CacheError, Scratch};
use rustix::fs::{CWD, Dir, DirEntry, FileType, Mode, OFlags, fstat, openat};

/// So many used folders are looked at together: each look asks every process of the system, which
/// costs about as much as to make and remove ten folders.
const AT_ONCE: usize = 64;

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
        }
    }

    /// An empty workplace.
    pub(super) fn take(&self, shape: Shape) -> Result<Workplace<'_>, CacheError> {
        let scratch = match self.shelves().entry(shape).or_default().take() {
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
    fn take(&mut self) -> Option<Scratch> {
        if self.free.is_empty()
            && self.used.len() >= AT_ONCE
            && let Some(folders) = working_folders()
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

/// The working folders of all processes that can be seen; `None` where the system does not tell.
fn working_folders() -> Option<BTreeSet<PathBuf>> {
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let folders = processes
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .filter_map(|entry| std::fs::read_link(entry.path().join("cwd")).ok());
    let folders: BTreeSet<PathBuf> = folders.collect();
    // This process has one itself.
    (!folders.is_empty()).then_some(folders)
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
    let mut dir = opened(CWD, root)?;
    let mut kept = 0;
    while let Some(entry) = next_of(&mut dir)? {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        let inner = match shape.folders().any(|folder| name == folder) {
            true => opened(dir.fd()?, Path::new(name)).ok(),
            false => None,
        };
        let Some(mut inner) = inner else {
            remove(&root.join(name), entry.file_type())?;
            dir.rewind();
            kept = 0;
            continue;
        };
        while let Some(left) = next_of(&mut inner)? {
            let path = root
                .join(name)
                .join(OsStr::from_bytes(left.file_name().to_bytes()));
            remove(&path, left.file_type())?;
            // Not every file system lists the rest when something was removed meanwhile.
            inner.rewind();
        }
        kept += 1;
    }
    match kept == shape.folders().count() {
        true => Ok(()),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// A folder, no link, in which its owner may do everything.
fn opened(at: impl AsFd, path: &Path) -> io::Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(at, path, flags, Mode::empty())?;
    match Mode::from_raw_mode(fstat(&folder)?.st_mode).contains(Mode::RWXU) {
        true => Ok(Dir::new(folder)?),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// The next entry that is neither the folder itself nor the one around it.
fn next_of(dir: &mut Dir) -> io::Result<Option<DirEntry>> {
    loop {
        match dir.read().transpose()? {
            Some(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
            other => return Ok(other),
        }
    }
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
