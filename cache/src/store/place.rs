//! Puts artifacts where somebody wants them: copies to keep, and links to read only.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{ArtifactStore, Lent, copy_hashed};
use crate::artifact::{Artifact, ArtifactKind};
use crate::digest::Digest;
use crate::error::CacheError;

#[derive(Clone, Copy)]
enum Placement {
    Copy,
    Link,
}

impl ArtifactStore {
    /// Copies the artifact to `dest`, verified while it is copied. What was at `dest` is replaced.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`], or when `dest` cannot be written; `dest` is then as it was.
    pub fn materialize(&self, artifact: &Artifact, dest: &Path) -> Result<(), CacheError> {
        let folder = dest
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| CacheError::outside(folder, e))?;
        let staging = tempfile::Builder::new()
            .prefix(".flowrun-")
            .tempdir_in(folder)
            .map_err(|e| CacheError::outside(folder, e))?;
        let staged = staging.path().join("new");
        self.place(artifact, &staged, Placement::Copy)?;
        // A folder cannot be renamed over a folder: the old one steps aside first.
        let old = staging.path().join("old");
        let aside = dest.is_dir();
        if aside {
            std::fs::rename(dest, &old).map_err(|e| CacheError::outside(dest, e))?;
        } else if artifact.kind == ArtifactKind::Tree && dest.exists() {
            std::fs::remove_file(dest).map_err(|e| CacheError::outside(dest, e))?;
        }
        std::fs::rename(&staged, dest).map_err(|e| {
            if aside {
                // It would go with the folder that it lies in.
                let _ = std::fs::rename(&old, dest);
            }
            CacheError::outside(dest, e)
        })
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
        self.place(artifact, dest, Placement::Link)?;
        Ok(Lent { stamps })
    }

    fn place(&self, artifact: &Artifact, dest: &Path, how: Placement) -> Result<(), CacheError> {
        match artifact.kind {
            ArtifactKind::File => self.place_file(&artifact.digest, dest, false, how),
            ArtifactKind::Tree => {
                std::fs::create_dir_all(dest).map_err(|e| CacheError::outside(dest, e))?;
                for entry in self.tree(&artifact.digest)?.entries {
                    let path = dest.join(&entry.path);
                    if let Some(folder) = path.parent() {
                        std::fs::create_dir_all(folder)
                            .map_err(|e| CacheError::outside(folder, e))?;
                    }
                    self.place_file(&entry.digest, &path, entry.executable, how)?;
                }
                Ok(())
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
