//! [`Artifact`]: the address of a stored file or folder.

use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt;

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
    /// It is a file that is a program; what a folder holds is told in its object. Left out where it
    /// is not so: as in the records of caches that did not know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

impl Artifact {
    /// A file of these bytes, with the length and mode that it has.
    #[must_use]
    pub fn of_file(digest: Digest, meta: &Metadata) -> Self {
        Self {
            digest,
            kind: ArtifactKind::File,
            size: meta.len(),
            executable: is_executable(meta),
        }
    }
}

/// Its owner may run it.
#[must_use]
pub fn is_executable(meta: &Metadata) -> bool {
    meta.permissions().mode() & 0o100 != 0
}

/// A folder as an object: entries and folders sorted by path.
#[derive(Clone, Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeObject {
    pub(crate) record: String,
    pub(crate) version: u32,
    pub(crate) entries: Vec<TreeEntry>,
    /// Relative paths of the folders in it that hold nothing. Left out when there is none: as in
    /// the trees of caches that did not know them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) folders: Vec<String>,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn records_of_caches_that_knew_no_programs_and_no_empty_folders_stay_as_they_are() {
        let digest = Digest::of_bytes(b"x");
        let old = format!(r#"{{"digest":"{digest}","kind":"file","size":1}}"#);
        let artifact: Artifact = serde_json::from_str(&old).unwrap();
        assert!(!artifact.executable);
        assert_eq!(crate::canonical_json(&artifact), old);
        let entry = format!(r#"{{"digest":"{digest}","executable":false,"path":"a","size":1}}"#);
        let old = format!(r#"{{"entries":[{entry}],"record":"tree","version":1}}"#);
        let tree: TreeObject = serde_json::from_str(&old).unwrap();
        assert!(tree.folders.is_empty());
        assert_eq!(crate::canonical_json(&tree), old);
    }

    #[test]
    fn a_program_is_told_in_the_record() {
        let artifact = Artifact {
            digest: Digest::of_bytes(b"x"),
            kind: ArtifactKind::File,
            size: 1,
            executable: true,
        };
        let text = crate::canonical_json(&artifact);
        assert!(text.contains(r#""executable":true"#), "{text}");
        assert_eq!(serde_json::from_str::<Artifact>(&text).unwrap(), artifact);
    }
}
