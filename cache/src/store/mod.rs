//! [`ArtifactStore`]: files and folders by the digest of their bytes.
//!
//! Objects are written to a temporary name (or taken as they lie) and renamed, mode
//! 0444, and verified whenever they are read. Large ones are synced at once, small
//! ones in batches. A damaged object is moved to `quarantine/`.

mod address;
mod lent;
mod place;
mod staging;
mod taking;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::HashMap;
use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use self::address::{address, address_in_project};
pub use self::lent::Lent;
use self::lent::Stamp;
pub use self::staging::{Placed, Staged, Staging};
use crate::artifact::{Artifact, ArtifactKind, TREE_VERSION, TreeObject};
use crate::digest::Digest;
use crate::durability::Unsynced;
use crate::error::CacheError;
use crate::record::folder;

/// How the text of every tree object begins: its fields are sorted.
const TREE_START: [u8; 12] = *b"{\"entries\":[";
/// Folder of damaged objects.
const QUARANTINE: &str = "quarantine";
/// Bytes moved at a time.
const CHUNK: usize = 1 << 16;
/// From this many bytes on, an object is synced by itself.
const LARGE: u64 = 1 << 20;

/// Files and folders by digest. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ArtifactStore {
    root: Arc<PathBuf>,
    /// Absent for readers.
    unsynced: Option<Arc<Unsynced>>,
}

impl ArtifactStore {
    pub(crate) fn new(root: PathBuf, unsynced: Option<Arc<Unsynced>>) -> Self {
        Self {
            root: Arc::new(root),
            unsynced,
        }
    }

    /// Where an object lies, or would lie.
    #[must_use]
    pub fn object_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root.join(&hex[..2]).join(&hex[2..])
    }

    /// Stores bytes as a file object.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<Artifact, CacheError> {
        let digest = Digest::of_bytes(bytes);
        if !self.has_object(&digest, bytes.len() as u64) {
            self.write_object(&digest, &mut io::Cursor::new(bytes))?;
        }
        Ok(Artifact {
            digest,
            kind: ArtifactKind::File,
            size: bytes.len() as u64,
            executable: false,
        })
    }

    /// Stores a file or a folder. Symbolic links are followed; empty folders, and whether a file may be
    /// run, are kept.
    ///
    /// # Errors
    /// When something cannot be read or written, or a link leads to a folder that it lies in.
    pub fn put_path(&self, path: &Path) -> Result<Artifact, CacheError> {
        address(path, &mut |path, meta| self.put_file(path, meta.len())).and_then(|found| {
            if let Some(tree) = &found.tree {
                self.put_bytes(tree.as_bytes())?;
            }
            Ok(found.artifact)
        })
    }

    /// The address that [`ArtifactStore::put_path`] would give; nothing is stored.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn address_of(path: &Path) -> Result<Artifact, CacheError> {
        let hash = &mut |path: &Path, _: &Metadata| {
            Digest::of_file(path).map_err(|e| CacheError::outside(path, e))
        };
        address(path, hash).map(|found| found.artifact)
    }

    /// As [`ArtifactStore::put_path`], of a file or folder of a project: this cache, and what is being
    /// published there, are no part of it.
    ///
    /// # Errors
    /// As [`ArtifactStore::put_path`].
    pub fn put_project_path(&self, path: &Path) -> Result<Artifact, CacheError> {
        let digest = &mut |path: &Path, meta: &Metadata| self.put_file(path, meta.len());
        let found = address_in_project(path, self.cache_dir(), digest)?;
        if let Some(tree) = &found.tree {
            self.put_bytes(tree.as_bytes())?;
        }
        Ok(found.artifact)
    }

    /// The address that [`ArtifactStore::put_project_path`] would give; nothing is stored.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn address_in_project(&self, path: &Path) -> Result<Artifact, CacheError> {
        let hash = &mut |path: &Path, _: &Metadata| {
            Digest::of_file(path).map_err(|e| CacheError::outside(path, e))
        };
        address_in_project(path, self.cache_dir(), hash).map(|found| found.artifact)
    }

    /// The folder of the cache that the store is a part of.
    fn cache_dir(&self) -> &Path {
        self.root.parent().unwrap_or(&self.root)
    }

    fn put_file(&self, path: &Path, size: u64) -> Result<Digest, CacheError> {
        let digest = Digest::of_file(path).map_err(|e| CacheError::outside(path, e))?;
        if !self.has_object(&digest, size) {
            let mut file = File::open(path).map_err(|e| CacheError::outside(path, e))?;
            self.write_object(&digest, &mut file)?;
        }
        Ok(digest)
    }

    fn written(&self, path: &Path, bytes: u64) {
        if let Some(unsynced) = &self.unsynced {
            unsynced.add(path, bytes);
        }
    }

    /// An object of this length is there. A file cut short does not count.
    pub(crate) fn has_object(&self, digest: &Digest, size: u64) -> bool {
        std::fs::metadata(self.object_path(digest)).is_ok_and(|m| m.len() == size)
    }

    fn write_object(&self, digest: &Digest, source: &mut dyn Read) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        let mut temp =
            tempfile::NamedTempFile::new_in(folder).map_err(|e| CacheError::io(folder, e))?;
        let fail = |e: io::Error| CacheError::io(&path, e);
        let written = copy_hashed(source, temp.as_file_mut()).map_err(fail)?;
        if written != *digest {
            return Err(changed(&path));
        }
        temp.as_file()
            .set_permissions(Permissions::from_mode(0o444))
            .map_err(fail)?;
        let bytes = temp.as_file().metadata().map_err(fail)?.len();
        if bytes >= LARGE {
            temp.as_file().sync_data().map_err(fail)?;
        }
        temp.persist(&path)
            .map_err(|e| CacheError::io(&path, e.error))?;
        self.written(&path, bytes);
        Ok(())
    }

    /// Every object with its length, and what unfinished writes left among them.
    pub(crate) fn objects(&self) -> (HashMap<Digest, u64>, Vec<PathBuf>) {
        let (mut objects, mut leftovers) = (HashMap::new(), Vec::new());
        for sub in folder(&self.root) {
            let start = sub.file_name().unwrap_or_default().to_string_lossy();
            if start == QUARANTINE {
                continue;
            }
            if !sub.is_dir() {
                leftovers.push(sub);
                continue;
            }
            for path in folder(&sub) {
                let rest = path.file_name().unwrap_or_default().to_string_lossy();
                match (Digest::parse(&format!("{start}{rest}")), path.metadata()) {
                    (Some(digest), Ok(meta)) => drop(objects.insert(digest, meta.len())),
                    (None, Ok(_)) => leftovers.push(path),
                    (_, Err(_)) => {}
                }
            }
        }
        (objects, leftovers)
    }

    /// Where damaged objects are set aside.
    pub(crate) fn quarantine_path(&self) -> PathBuf {
        self.root.join(QUARANTINE)
    }

    /// The members of an object that is a tree; none for one that is not. Nothing is verified.
    pub(crate) fn members(&self, digest: &Digest) -> Vec<Digest> {
        let path = self.object_path(digest);
        let mut start = [0u8; TREE_START.len()];
        let read = File::open(&path).and_then(|mut file| file.read_exact(&mut start));
        if read.is_err() || start != TREE_START {
            return Vec::new();
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        let tree = serde_json::from_slice::<TreeObject>(&bytes).ok();
        let entries = tree.into_iter().flat_map(|t| t.entries);
        entries.map(|entry| entry.digest).collect()
    }

    /// Hashes every object that was written since; the damaged ones are set aside. How many they were.
    pub(crate) fn verify_since(&self, since: SystemTime) -> usize {
        let folders = std::fs::read_dir(&*self.root)
            .into_iter()
            .flatten()
            .flatten();
        let files = folders.flat_map(|folder| {
            let name = folder.file_name();
            let files = std::fs::read_dir(folder.path()).into_iter().flatten();
            files.flatten().map(move |file| (name.clone(), file))
        });
        let mut damaged = 0;
        for (folder, file) in files {
            let hex = folder.to_string_lossy().into_owned() + &file.file_name().to_string_lossy();
            // A moved file brings its time along; the one of its inode nobody can set.
            let recent = file.metadata().map_or(true, |meta| {
                let changed = u64::try_from(meta.ctime()).unwrap_or_default();
                let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(changed + 1);
                changed >= since || meta.modified().map_or(true, |at| at >= since)
            });
            if let Some(digest) = Digest::parse(&hex).filter(|_| recent) {
                damaged += usize::from(self.verify_object(&digest).is_err());
            }
        }
        damaged
    }

    /// The object, and for a tree all its members, are there with the right
    /// lengths. Nothing is hashed but the tree object itself.
    #[must_use]
    pub fn contains(&self, artifact: &Artifact) -> bool {
        match artifact.kind {
            ArtifactKind::File => self.has_object(&artifact.digest, artifact.size),
            ArtifactKind::Tree => self
                .tree(&artifact.digest)
                .is_ok_and(|t| t.entries.iter().all(|e| self.has_object(&e.digest, e.size))),
        }
    }

    /// The bytes of an object, verified.
    ///
    /// # Errors
    /// [`CacheError::Missing`], or [`CacheError::Damaged`] once, after which it is missing.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, CacheError> {
        let path = self.object_path(digest);
        let bytes = std::fs::read(&path).map_err(|e| self.lookup_error(digest, &path, e))?;
        if Digest::of_bytes(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(self.quarantine(digest))
        }
    }

    /// Hashes the object, and for a tree all its members.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`].
    pub fn verify(&self, artifact: &Artifact) -> Result<(), CacheError> {
        match artifact.kind {
            ArtifactKind::File => self.verify_object(&artifact.digest),
            ArtifactKind::Tree => self
                .tree(&artifact.digest)?
                .entries
                .iter()
                .try_for_each(|entry| self.verify_object(&entry.digest)),
        }
    }

    /// The objects of an artifact: the file, or the tree and its members.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`], for the tree itself.
    pub fn parts(&self, artifact: &Artifact) -> Result<Vec<Digest>, CacheError> {
        let mut all = vec![artifact.digest];
        if artifact.kind == ArtifactKind::Tree {
            all.extend(self.objects_of(artifact)?);
        }
        Ok(all)
    }

    /// Removes an object, if it is there: for whoever has the store alone and knows that nothing
    /// needs the object any more.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, digest: &Digest) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CacheError::io(&path, e)),
            _ => Ok(()),
        }
    }

    /// Hashes one object.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`].
    pub fn verify_object(&self, digest: &Digest) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        let actual = Digest::of_file(&path).map_err(|e| self.lookup_error(digest, &path, e))?;
        if actual == *digest {
            Ok(())
        } else {
            Err(self.quarantine(digest))
        }
    }

    /// The file objects that an artifact consists of.
    fn objects_of(&self, artifact: &Artifact) -> Result<Vec<Digest>, CacheError> {
        Ok(match artifact.kind {
            ArtifactKind::File => vec![artifact.digest],
            ArtifactKind::Tree => {
                let entries = self.tree(&artifact.digest)?.entries;
                entries.into_iter().map(|entry| entry.digest).collect()
            }
        })
    }

    fn stamp(&self, digest: &Digest) -> Result<Stamp, CacheError> {
        let path = self.object_path(digest);
        let meta = std::fs::metadata(&path).map_err(|e| self.lookup_error(digest, &path, e))?;
        Ok(Stamp::of(&meta))
    }

    /// A tree object. Paths that would leave the folder make it damaged.
    pub(crate) fn tree(&self, digest: &Digest) -> Result<TreeObject, CacheError> {
        let bytes = self.read(digest)?;
        serde_json::from_slice::<TreeObject>(&bytes)
            .ok()
            .filter(|t| {
                let mut paths = t.entries.iter().map(|e| &e.path).chain(&t.folders);
                t.version == TREE_VERSION && paths.all(|path| stays_inside(path))
            })
            .ok_or(CacheError::Missing { digest: *digest })
    }

    fn lookup_error(&self, digest: &Digest, path: &Path, error: io::Error) -> CacheError {
        if error.kind() == io::ErrorKind::NotFound {
            CacheError::Missing { digest: *digest }
        } else {
            CacheError::io(path, error)
        }
    }

    /// Moves a damaged object away.
    pub(crate) fn set_aside(&self, digest: &Digest) {
        drop(self.quarantine(digest));
    }

    fn quarantine(&self, digest: &Digest) -> CacheError {
        let from = self.object_path(digest);
        // A reader holds nothing: what it read may have been replaced by now.
        if self.unsynced.is_none() {
            return CacheError::Damaged {
                digest: *digest,
                path: from,
            };
        }
        let path = self.quarantine_path().join(digest.to_hex());
        let moved = std::fs::create_dir_all(self.quarantine_path())
            .and_then(|()| std::fs::rename(&from, &path));
        // In a cache that cannot be written the object stays, and is refused again next time.
        let path = if moved.is_ok() { path } else { from };
        CacheError::Damaged {
            digest: *digest,
            path,
        }
    }
}

fn changed(path: &Path) -> CacheError {
    CacheError::Unstorable {
        path: path.to_owned(),
        reason: "the file changed while it was stored",
    }
}

fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
}

fn copy_hashed(source: &mut dyn Read, dest: &mut File) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; CHUNK];
    loop {
        let n = source.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        dest.write_all(&buffer[..n])?;
    }
    Digest::parse(&hasher.finalize().to_hex())
        .ok_or_else(|| io::Error::other("blake3 gave no hexadecimal text"))
}
