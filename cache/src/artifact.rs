//! [`Artifact`]: the address of a stored file or folder.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// What an artifact is.
#[derive(Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum ArtifactKind {
    /// One file.
    File,
    /// A folder: the object is a list of paths with digests.
    Tree,
}

/// The address of a stored file or folder.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Artifact {
    /// Digest of the file's bytes, or of the tree object.
    pub digest: Digest,
    /// File or folder.
    pub kind: ArtifactKind,
    /// Bytes of all files.
    pub size: u64,
}

/// A folder as an object: entries sorted by path.
#[derive(Clone, Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeObject {
    pub(crate) record: String,
    pub(crate) version: u32,
    pub(crate) entries: Vec<TreeEntry>,
}

/// One file of a folder.
#[derive(Clone, Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeEntry {
    /// Relative path with `/`.
    pub(crate) path: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) executable: bool,
}

/// Version of [`TreeObject`].
pub(crate) const TREE_VERSION: u32 = 1;
