//! [`Staging`]: artifacts beside the places where they are wanted, until all of them are there.
//! Then only names change.
//!
//! Invariant: until [`Staged::put`] nothing at the places is touched, what was put can be taken
//! back ([`Placed::undo`]), and what was not put is gone with the staging, the folders that were
//! made for it included.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirEntry, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

use super::ArtifactStore;
use super::place::Placement;
use crate::artifact::{Artifact, ArtifactKind};
use crate::error::CacheError;
use crate::filesystem::{FileSystem, Reach};

/// What the name of a folder begins with in which something is staged.
const PREFIX: &str = ".flowrun-";
/// Letters and digits that follow.
const RANDOM: usize = 6;
/// A file in it, locked as long as somebody stages there.
const HELD: &str = "held";
/// Its name before it is locked.
const YOUNG: &str = "young";
/// How the names of what is staged begin, and of what was in its place; a number follows.
const NEW: &str = "new-";
const OLD: &str = "old-";

/// Where artifacts lie until they are put.
#[derive(Debug)]
pub struct Staging<'a> {
    store: &'a ArtifactStore,
    /// For each folder that places lie in, one within it: names change only within a file system.
    folders: BTreeMap<PathBuf, Folder>,
    /// After `folders`, so that it is dropped after them.
    made: MadeFolders,
    count: usize,
}

/// An artifact beside its place; as long as the staging lives.
#[derive(Debug)]
pub struct Staged {
    new: PathBuf,
    old: PathBuf,
    dest: PathBuf,
    kind: ArtifactKind,
}

impl<'a> Staging<'a> {
    /// Nothing yet.
    #[must_use]
    pub fn new(store: &'a ArtifactStore) -> Self {
        Self {
            store,
            folders: BTreeMap::new(),
            made: MadeFolders::default(),
            count: 0,
        }
    }

    /// Copies the artifact beside `dest`, verified while it is copied. `None` when `stop` said
    /// so: it is asked before each file.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`], or when the folder of `dest` cannot be written.
    pub fn add(
        &mut self,
        artifact: &Artifact,
        dest: &Path,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Staged>, CacheError> {
        let folder = dest
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        if !self.folders.contains_key(folder) {
            let staging = Folder::within(folder, &mut self.made);
            let staging = staging.map_err(|e| CacheError::outside(folder, e))?;
            self.folders.insert(folder.to_owned(), staging);
        }
        let staging = self.folders[folder].dir.path();
        let staged = Staged {
            new: staging.join(format!("{NEW}{}", self.count)),
            old: staging.join(format!("{OLD}{}", self.count)),
            dest: dest.to_owned(),
            kind: artifact.kind,
        };
        self.count += 1;
        let store = self.store;
        let whole = store.place(artifact, &staged.new, Placement::Copy, stop)?;
        Ok(whole.then_some(staged))
    }
}

/// An artifact in its place, and what was there before aside; as long as the staging lives.
#[derive(Debug)]
pub struct Placed {
    new: PathBuf,
    old: Option<PathBuf>,
    dest: PathBuf,
}

impl Staged {
    /// Its place.
    #[must_use]
    pub fn dest(&self) -> &Path {
        &self.dest
    }

    /// Puts it there. What was there is replaced; it is gone when the staging is.
    ///
    /// # Errors
    /// When it cannot; what was there is then as it was.
    pub fn put(self) -> Result<Placed, CacheError> {
        let dest = &self.dest;
        let outside = |e| CacheError::outside(dest, e);
        let is_folder = match dest.symlink_metadata() {
            Ok(meta) => Some(meta.is_dir()),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(outside(e)),
        };
        // A file takes the place of another at once. A folder cannot be renamed over anything, nor
        // can every file system link: then the old one steps aside first.
        let over = is_folder == Some(false)
            && self.kind == ArtifactKind::File
            && std::fs::hard_link(dest, &self.old).is_ok();
        let aside = is_folder.is_some() && !over;
        if aside {
            std::fs::rename(dest, &self.old).map_err(outside)?;
        }
        if let Err(e) = std::fs::rename(&self.new, dest) {
            if aside {
                // It would go with the folder that it lies in.
                let _ = std::fs::rename(&self.old, dest);
            }
            return Err(outside(e));
        }
        Ok(Placed {
            new: self.new,
            old: is_folder.map(|_| self.old),
            dest: self.dest,
        })
    }
}

impl Placed {
    /// Its place.
    #[must_use]
    pub fn dest(&self) -> &Path {
        &self.dest
    }

    /// Takes it away again, and puts back what was there.
    ///
    /// # Errors
    /// When that cannot be.
    pub fn undo(self) -> Result<(), CacheError> {
        let dest = &self.dest;
        let outside = |e| CacheError::outside(dest, e);
        // At once where one name may take the place of the other.
        if let Some(old) = &self.old
            && std::fs::rename(old, dest).is_ok()
        {
            return Ok(());
        }
        std::fs::rename(dest, &self.new).map_err(outside)?;
        match &self.old {
            Some(old) => std::fs::rename(old, dest).map_err(outside),
            None => Ok(()),
        }
    }
}

/// A folder in which something is staged; gone with all that is left in it when it is dropped.
#[derive(Debug)]
struct Folder {
    dir: TempDir,
    /// Where a file system has no locks, what a kill leaves behind stays.
    _held: Option<File>,
}

impl Folder {
    fn within(folder: &Path, made: &mut MadeFolders) -> io::Result<Self> {
        sweep(folder);
        let dir = {
            let _changing = changing();
            made.make(folder)?;
            let mut name = tempfile::Builder::new();
            name.prefix(PREFIX).rand_bytes(RANDOM).tempdir_in(folder)?
        };
        let held = hold(dir.path()).ok();
        Ok(Self { dir, _held: held })
    }
}

/// Folders that were not there before; those that are still empty go when it is dropped.
#[derive(Debug, Default)]
struct MadeFolders(Vec<PathBuf>);

impl MadeFolders {
    /// Makes a folder, and those above it that are missing.
    fn make(&mut self, folder: &Path) -> io::Result<()> {
        let above = folder.ancestors();
        let missing = above.take_while(|path| !path.as_os_str().is_empty() && !path.is_dir());
        let mut missing: Vec<&Path> = missing.collect();
        while let Some(path) = missing.pop() {
            match std::fs::create_dir(path) {
                Ok(()) => self.0.push(path.to_owned()),
                // Another program made it in the meantime.
                Err(_) if path.is_dir() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for MadeFolders {
    fn drop(&mut self) {
        if self.0.is_empty() {
            return;
        }
        let _changing = changing();
        while let Some(folder) = self.0.pop() {
            // One with something in it stays.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Held while folders are made or removed: none goes before another staging has begun in it.
fn changing() -> MutexGuard<'static, ()> {
    static CHANGING: Mutex<()> = Mutex::new(());
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something is staged there. A user's folder may have such a name, and then holds other things.
pub(super) fn is_staging(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let random = name.as_encoded_bytes().strip_prefix(PREFIX.as_bytes());
    let is_named = random.is_some_and(|random| {
        random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric)
    });
    if !is_named || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
        return false;
    }
    match std::fs::read_dir(entry.path()) {
        // One whose content goes at this moment holds a part of it, or nothing.
        Ok(entries) => entries.flatten().all(|entry| is_staged(&entry)),
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

/// Its name is one of those in a folder in which something is staged.
fn is_staged(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let Some(name) = name.to_str() else {
        return false;
    };
    let number = name.strip_prefix(NEW).or_else(|| name.strip_prefix(OLD));
    let is_number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    [HELD, YOUNG].contains(&name) || number.is_some_and(is_number)
}

/// Marks a folder as in use, as long as the file is open.
fn hold(staging: &Path) -> io::Result<File> {
    let young = staging.join(YOUNG);
    let file = File::create(&young)?;
    file.lock()?;
    // It is found only when it is locked.
    std::fs::rename(young, staging.join(HELD))?;
    Ok(file)
}

/// Removes what programs that were killed staged in a folder. Each program looks once. Where the
/// lock of another machine may not be seen, all stays: somebody there may be staging.
fn sweep(folder: &Path) {
    static SWEPT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let mut swept = SWEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if !swept.insert(folder.to_owned()) {
        return;
    }
    drop(swept);
    if FileSystem::of(folder).is_some_and(|there| !is_seen_by_all(there.reach)) {
        return;
    }
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if is_staging(&entry) && is_left(&entry.path()) {
            // What stays is in nobody's way.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// No lock of another machine is overlooked.
fn is_seen_by_all(reach: Reach) -> bool {
    matches!(reach, Reach::Local | Reach::All)
}

/// Whoever staged there is gone.
fn is_left(staging: &Path) -> bool {
    File::open(staging.join(HELD)).is_ok_and(|file| file.try_lock().is_ok())
}
