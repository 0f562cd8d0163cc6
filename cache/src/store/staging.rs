//! [`Staging`]: artifacts beside the places where they are wanted, until all of them are there.
//! Then only names change.
//!
//! Invariant: until [`Staged::put`] nothing at the places is touched, what was put can be taken
//! back ([`Placed::undo`]), and what was not put is gone with the staging.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::ArtifactStore;
use super::place::Placement;
use crate::artifact::{Artifact, ArtifactKind};
use crate::error::CacheError;

/// Where artifacts lie until they are put.
#[derive(Debug)]
pub struct Staging<'a> {
    store: &'a ArtifactStore,
    /// For each folder that places lie in, one within it: names change only within a file system.
    folders: BTreeMap<PathBuf, TempDir>,
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
            std::fs::create_dir_all(folder).map_err(|e| CacheError::outside(folder, e))?;
            let staging = tempfile::Builder::new()
                .prefix(".flowrun-")
                .tempdir_in(folder)
                .map_err(|e| CacheError::outside(folder, e))?;
            self.folders.insert(folder.to_owned(), staging);
        }
        let staging = self.folders[folder].path();
        let staged = Staged {
            new: staging.join(format!("new-{}", self.count)),
            old: staging.join(format!("old-{}", self.count)),
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
