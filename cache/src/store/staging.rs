//! [`Staging`]: artifacts beside the places where they are wanted, until all of them are there.
//! Then only names change.
//!
//! Invariant: until [`Staged::put`] nothing at the places is touched, and what was not put is
//! gone with the staging.

use std::collections::BTreeMap;
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

impl Staged {
    /// Its place.
    #[must_use]
    pub fn dest(&self) -> &Path {
        &self.dest
    }

    /// Puts it there. What was there is replaced.
    ///
    /// # Errors
    /// When it cannot; what was there is then as it was.
    pub fn put(self) -> Result<(), CacheError> {
        let dest = &self.dest;
        // A folder cannot be renamed over a folder: the old one steps aside first.
        let aside = dest.is_dir();
        if aside {
            std::fs::rename(dest, &self.old).map_err(|e| CacheError::outside(dest, e))?;
        } else if self.kind == ArtifactKind::Tree && dest.exists() {
            std::fs::remove_file(dest).map_err(|e| CacheError::outside(dest, e))?;
        }
        std::fs::rename(&self.new, dest).map_err(|e| {
            if aside {
                // It would go with the folder that it lies in.
                let _ = std::fs::rename(&self.old, dest);
            }
            CacheError::outside(dest, e)
        })
    }
}
