//! Puts artifacts where somebody wants them: copies to keep, and links to read only.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{ArtifactStore, Lent, Staging, copy_hashed};
use crate::artifact::{Artifact, ArtifactKind};
use crate::digest::Digest;
use crate::error::CacheError;

/// How an artifact is put somewhere.
#[derive(Clone, Copy)]
pub(super) enum Placement {
    Copy,
    Link,
}

impl ArtifactStore {
    /// Copies the artifact to `dest`, verified while it is copied. What was at `dest` is replaced.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`], or when `dest` cannot be written; `dest` is then as it was.
    pub fn materialize(&self, artifact: &Artifact, dest: &Path) -> Result<(), CacheError> {
        let mut staging = Staging::new(self);
        match staging.add(artifact, dest, &|| false)? {
            Some(staged) => staged.put().map(drop),
            // Nobody asked to stop.
            None => Ok(()),
        }
    }

    /// Places the artifact at `dest` for reading only: hard links where the
    /// file system allows, else copies. Verified first; [`Lent::check`] tells
    /// whether whoever had it left it as it was.
    ///
    /// # Errors
    /// As [`ArtifactStore::materialize`].
    pub fn link_read_only(&self, artifact: &Artifact, dest: &Path) -> Result<Lent, CacheError> {
        // Stamped before it is verified: a change meanwhile shows in one or the other.
        let stamps = self
            .objects_of(artifact)?
            .into_iter()
            .map(|digest| Ok((digest, self.stamp(&digest)?)))
            .collect::<Result<_, CacheError>>()?;
        self.verify(artifact)?;
        self.place(artifact, dest, Placement::Link, &|| false)?;
        Ok(Lent { stamps })
    }

    /// False when `stop` said so, which is asked before each file: then only a part is there.
    pub(super) fn place(
        &self,
        artifact: &Artifact,
        dest: &Path,
        how: Placement,
        stop: &dyn Fn() -> bool,
    ) -> Result<bool, CacheError> {
        match artifact.kind {
            ArtifactKind::File if stop() => Ok(false),
            ArtifactKind::File => {
                self.place_file(&artifact.digest, dest, artifact.executable, how)?;
                Ok(true)
            }
            ArtifactKind::Tree => {
                let tree = self.tree(&artifact.digest)?;
                let empty = tree.folders.iter().map(|folder| dest.join(folder));
                for folder in std::iter::once(dest.to_owned()).chain(empty) {
                    std::fs::create_dir_all(&folder)
                        .map_err(|e| CacheError::outside(&folder, e))?;
                }
                for entry in tree.entries {
                    if stop() {
                        return Ok(false);
                    }
                    let path = dest.join(&entry.path);
                    if let Some(folder) = path.parent() {
                        std::fs::create_dir_all(folder)
                            .map_err(|e| CacheError::outside(folder, e))?;
                    }
                    self.place_file(&entry.digest, &path, entry.executable, how)?;
                }
                Ok(true)
            }
        }
    }

    fn place_file(
        &self,
        digest: &Digest,
        dest: &Path,
        executable: bool,
        how: Placement,
    ) -> Result<(), CacheError> {
        let object = self.object_path(digest);
        // An object has one mode for all its links, so an executable is copied.
        if matches!(how, Placement::Link)
            && !executable
            && std::fs::hard_link(&object, dest).is_ok()
        {
            return Ok(());
        }
        let mut source = File::open(&object).map_err(|e| self.lookup_error(digest, &object, e))?;
        let mut file = File::create(dest).map_err(|e| CacheError::outside(dest, e))?;
        let copied =
            copy_hashed(&mut source, &mut file).map_err(|e| CacheError::outside(dest, e))?;
        if copied != *digest {
            return Err(self.quarantine(digest));
        }
        let mode = if executable { 0o755 } else { 0o644 };
        std::fs::set_permissions(dest, Permissions::from_mode(mode))
            .map_err(|e| CacheError::outside(dest, e))
    }
}
