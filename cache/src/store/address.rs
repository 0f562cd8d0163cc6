//! The address of a file or folder: its digest, and for a folder the tree object.

use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::artifact::{Artifact, ArtifactKind, TREE_VERSION, TreeEntry, TreeObject};
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
    let meta = std::fs::metadata(path).map_err(|e| CacheError::outside(path, e))?;
    if !meta.is_dir() {
        check_kind(path, &meta)?;
        let artifact = Artifact {
            digest: digest(path, &meta)?,
            kind: ArtifactKind::File,
            size: meta.len(),
        };
        return Ok(Address {
            artifact,
            tree: None,
        });
    }
    let mut entries = Vec::new();
    walk_tree(path, "", &mut entries, digest)?;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let size = entries.iter().map(|e| e.size).sum();
    let tree = crate::canonical_json(&TreeObject {
        record: "tree".into(),
        version: TREE_VERSION,
        entries,
    });
    let artifact = Artifact {
        digest: Digest::of_bytes(tree.as_bytes()),
        kind: ArtifactKind::Tree,
        size,
    };
    Ok(Address {
        artifact,
        tree: Some(tree),
    })
}

fn walk_tree(
    folder: &Path,
    prefix: &str,
    entries: &mut Vec<TreeEntry>,
    digest: DigestFile<'_>,
) -> Result<(), CacheError> {
    for entry in std::fs::read_dir(folder).map_err(|e| CacheError::outside(folder, e))? {
        let path = entry.map_err(|e| CacheError::outside(folder, e))?.path();
        let name =
            path.file_name()
                .and_then(|n| n.to_str())
                .ok_or_else(|| CacheError::Unstorable {
                    path: path.clone(),
                    reason: "its name is not Unicode",
                })?;
        let relative = format!("{prefix}{name}");
        let meta = std::fs::metadata(&path).map_err(|e| CacheError::outside(&path, e))?;
        if meta.is_dir() {
            walk_tree(&path, &format!("{relative}/"), entries, digest)?;
        } else {
            check_kind(&path, &meta)?;
            entries.push(TreeEntry {
                path: relative,
                digest: digest(&path, &meta)?,
                size: meta.len(),
                executable: meta.permissions().mode() & 0o100 != 0,
            });
        }
    }
    Ok(())
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
