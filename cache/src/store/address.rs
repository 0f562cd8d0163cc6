//! The address of a file or folder: its digest, and for a folder the tree object.
//!
//! Links are followed. Invariant: a walk ends. A link that leads to a folder it lies in is refused.

use std::fs::{DirEntry, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::staging;
use crate::artifact::{Artifact, ArtifactKind, TREE_VERSION, TreeEntry, TreeObject, is_executable};
use crate::digest::Digest;
use crate::error::CacheError;

/// Gives a file its digest.
pub(super) type DigestFile<'a> = &'a mut dyn FnMut(&Path, &Metadata) -> Result<Digest, CacheError>;

pub(super) struct Address {
    pub(super) artifact: Artifact,
    /// The tree object's text.
    pub(super) tree: Option<String>,
}

/// Walks a folder, and gives each file to `digest`.
pub(super) fn address(path: &Path, digest: DigestFile<'_>) -> Result<Address, CacheError> {
    address_of(path, None, digest)
}

/// As [`address`], of what lies in a project: the cache, and what is staged there, are no part of it.
pub(super) fn address_in_project(
    path: &Path,
    cache: &Path,
    digest: DigestFile<'_>,
) -> Result<Address, CacheError> {
    let omitted = Omitted {
        cache: std::fs::metadata(cache).ok().map(|meta| identity(&meta)),
    };
    address_of(path, Some(omitted), digest)
}

fn address_of(
    path: &Path,
    omitted: Option<Omitted>,
    digest: DigestFile<'_>,
) -> Result<Address, CacheError> {
    let meta = std::fs::metadata(path).map_err(|e| CacheError::outside(path, e))?;
    if !meta.is_dir() {
        check_kind(path, &meta)?;
        return Ok(Address {
            artifact: Artifact::of_file(digest(path, &meta)?, &meta),
            tree: None,
        });
    }
    let mut walk = Walk {
        digest,
        omitted,
        above: Vec::new(),
        entries: Vec::new(),
        folders: Vec::new(),
    };
    walk.folder(path, &meta, "")?;
    let Walk {
        mut entries,
        mut folders,
        ..
    } = walk;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    folders.sort();
    let size = entries.iter().map(|e| e.size).sum();
    let tree = crate::canonical_json(&TreeObject {
        record: "tree".into(),
        version: TREE_VERSION,
        entries,
        folders,
    });
    let artifact = Artifact {
        digest: Digest::of_bytes(tree.as_bytes()),
        kind: ArtifactKind::Tree,
        size,
        executable: false,
    };
    Ok(Address {
        artifact,
        tree: Some(tree),
    })
}

/// What tells a folder from another, whatever its name: device and inode.
type Identity = (u64, u64);

fn identity(meta: &Metadata) -> Identity {
    (meta.dev(), meta.ino())
}

/// What is no part of a project, beside what is staged.
struct Omitted {
    cache: Option<Identity>,
}

/// A walk through a folder.
struct Walk<'a> {
    digest: DigestFile<'a>,
    omitted: Option<Omitted>,
    /// The folders around, outermost first.
    above: Vec<Identity>,
    entries: Vec<TreeEntry>,
    /// Those that hold nothing.
    folders: Vec<String>,
}

impl Walk<'_> {
    /// `prefix`: where it lies in the folder that is walked; empty, or with a `/` at its end.
    fn folder(&mut self, folder: &Path, meta: &Metadata, prefix: &str) -> Result<(), CacheError> {
        let fail = |e| CacheError::outside(folder, e);
        let identity = identity(meta);
        if self.above.contains(&identity) && self.is_above(folder) {
            return Err(CacheError::Unstorable {
                path: folder.to_owned(),
                reason: "the link leads to a folder that it lies in",
            });
        }
        self.above.push(identity);
        let mut is_empty = true;
        for entry in std::fs::read_dir(folder).map_err(fail)? {
            is_empty &= !self.entry(&entry.map_err(fail)?, prefix)?;
        }
        self.above.pop();
        if is_empty && let Some(path) = prefix.strip_suffix('/') {
            self.folders.push(path.to_owned());
        }
        Ok(())
    }

    /// False when it is left out.
    fn entry(&mut self, entry: &DirEntry, prefix: &str) -> Result<bool, CacheError> {
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| CacheError::Unstorable {
            path: path.clone(),
            reason: "its name is not Unicode",
        })?;
        // Not looked at further: it may be gone by now.
        if self.omitted.is_some() && staging::is_staging(entry) {
            return Ok(false);
        }
        let relative = format!("{prefix}{name}");
        let meta = std::fs::metadata(&path).map_err(|e| CacheError::outside(&path, e))?;
        if meta.is_dir() {
            if self.is_cache(&meta) {
                return Ok(false);
            }
            self.folder(&path, &meta, &format!("{relative}/"))?;
            return Ok(true);
        }
        check_kind(&path, &meta)?;
        self.entries.push(TreeEntry {
            path: relative,
            digest: (self.digest)(&path, &meta)?,
            size: meta.len(),
            executable: is_executable(&meta),
        });
        Ok(true)
    }

    fn is_cache(&self, meta: &Metadata) -> bool {
        let cache = self.omitted.as_ref().and_then(|omitted| omitted.cache);
        cache == Some(identity(meta))
    }

    /// One of the folders around is this one. Where a file system gives inodes twice, these alone do
    /// not tell.
    fn is_above(&self, folder: &Path) -> bool {
        let Ok(place) = folder.canonicalize() else {
            return true;
        };
        let mut around = folder.ancestors().skip(1).take(self.above.len());
        around.any(|above| above.canonicalize().is_ok_and(|above| above == place))
    }
}

/// A pipe or a device has no bytes of its own: to read one may wait for ever.
fn check_kind(path: &Path, meta: &Metadata) -> Result<(), CacheError> {
    match meta.is_file() {
        true => Ok(()),
        false => Err(CacheError::Unstorable {
            path: path.to_owned(),
            reason: "it is neither a file nor a folder",
        }),
    }
}
