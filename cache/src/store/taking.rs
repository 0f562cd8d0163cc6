//! Stores what nobody needs any more: files are moved, not copied.

use std::fs::{File, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::address::address;
use super::lent::Stamp;
use super::{ArtifactStore, LARGE, changed};
use crate::artifact::Artifact;
use crate::digest::Digest;
use crate::error::CacheError;

impl ArtifactStore {
    /// As [`ArtifactStore::put_path`], for a file or folder that nobody needs any
    /// more: its files are moved, not copied, where that can be done. Where it holds a
    /// symbolic link nothing is moved: what a link names is somebody else's, or met twice.
    ///
    /// # Errors
    /// As [`ArtifactStore::put_path`].
    pub fn take_path(&self, path: &Path) -> Result<Artifact, CacheError> {
        let own = std::fs::symlink_metadata(path).map_err(|e| CacheError::outside(path, e))?;
        if own.is_file() {
            return Ok(Artifact::of_file(self.take_file(path, &own)?, &own));
        }
        if Self::has_link(path)? {
            return self.put_path(path);
        }
        address(path, &mut |path, meta| self.take_file(path, meta)).and_then(|found| {
            if let Some(tree) = &found.tree {
                self.put_bytes(tree.as_bytes())?;
            }
            Ok(found.artifact)
        })
    }

    /// It is a symbolic link, or a folder that holds one at any depth.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn has_link(path: &Path) -> Result<bool, CacheError> {
        let fail = |e| CacheError::outside(path, e);
        let kind = std::fs::symlink_metadata(path).map_err(fail)?.file_type();
        if !kind.is_dir() {
            return Ok(kind.is_symlink());
        }
        for entry in std::fs::read_dir(path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let kind = entry.file_type().map_err(fail)?;
            if kind.is_symlink() || kind.is_dir() && Self::has_link(&entry.path())? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// `meta` is of the file itself, not of what a link names.
    fn take_file(&self, path: &Path, meta: &Metadata) -> Result<Digest, CacheError> {
        let fail = |e| CacheError::io(path, e);
        let digest = Digest::of_file(path).map_err(fail)?;
        if self.has_object(&digest, meta.len()) {
            return Ok(digest);
        }
        // What has another name is not ours alone: it could change under it.
        if !meta.is_file() || meta.nlink() > 1 {
            let mut file = File::open(path).map_err(fail)?;
            self.write_object(&digest, &mut file)?;
            return Ok(digest);
        }
        std::fs::set_permissions(path, Permissions::from_mode(0o444)).map_err(fail)?;
        if meta.len() >= LARGE {
            File::open(path).and_then(|f| f.sync_data()).map_err(fail)?;
        }
        let object = self.object_path(&digest);
        let moved = std::fs::rename(path, &object).or_else(|_| {
            std::fs::create_dir_all(object.parent().unwrap_or(&self.root))?;
            std::fs::rename(path, &object)
        });
        if moved.is_err() {
            // Another file system.
            let mut file = File::open(path).map_err(fail)?;
            self.write_object(&digest, &mut file)?;
            return Ok(digest);
        }
        self.check_taken(&digest, path, meta)?;
        self.written(&object, meta.len());
        Ok(digest)
    }

    /// An object is there that was a file at `path` with this metadata when it was hashed; or one of
    /// the same bytes that another thread put there.
    pub(super) fn check_taken(
        &self,
        digest: &Digest,
        path: &Path,
        meta: &Metadata,
    ) -> Result<(), CacheError> {
        let object = self.object_path(digest);
        let now = std::fs::metadata(&object).map_err(|e| CacheError::io(&object, e))?;
        let (stamp, hashed) = (Stamp::of(&now), Stamp::of(meta));
        if stamp == hashed && now.nlink() == 1 {
            return Ok(());
        }
        if now.ino() == meta.ino() && stamp != hashed {
            // Set aside: what it holds is not what was hashed.
            let _ = self.quarantine(digest);
            return Err(changed(path));
        }
        // Another thread took the same bytes, or who needs them has linked them by now.
        self.verify_object(digest).map_err(|_| changed(path))
    }
}
