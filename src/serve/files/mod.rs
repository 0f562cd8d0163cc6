//! `/v1/files`: what callers upload, and what batches answer, each a file with a note beside it.
//!
//! | file | what |
//! |---|---|
//! | `mod` | a folder of files |
//! | `routes` | the paths |
//! | `openapi` | what the OpenAPI document says of them |
//!
//! Knows no contents. Invariant: a file without its note does not exist for callers.

pub(super) mod openapi;
mod routes;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::kept::{is_id, new_id, now, write};
use super::problem::Problem;

pub(super) use routes::{delete, file, file_content, files, upload};

/// Bytes of an uploaded file at most, and of the form around it.
pub(super) const FILE: usize = 64 << 20;
/// Files of a folder at most.
const MOST: usize = 1000;
/// Bytes of a file's name at most.
const NAME: usize = 255;
const PREFIX: &str = "file-";

/// A folder of files.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Files {
    folder: PathBuf,
}

/// OpenAI's file object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FileObject {
    pub(super) id: String,
    object: String,
    bytes: u64,
    created_at: u64,
    filename: String,
    pub(super) purpose: String,
    status: String,
}

impl Files {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The id of a file that is to be written.
    pub(super) fn next_id() -> String {
        new_id(PREFIX)
    }

    /// Keeps a file of a caller's, unless `check` has something against it.
    pub(super) fn add(
        &self,
        filename: &str,
        purpose: &str,
        bytes: &[u8],
        check: impl FnOnce(&Path) -> Result<(), Problem>,
    ) -> Result<FileObject, Problem> {
        if filename.len() > NAME {
            let text = format!("the name of a file has at most {NAME} bytes");
            return Err(Problem::bad(text).of("file"));
        }
        self.room(1).map_err(|problem| problem.of("file"))?;
        let id = Self::next_id();
        let path = self.content(&id);
        let kept = write(&path, bytes)
            .map_err(|e| Problem::internal(e.to_string()))
            .and_then(|()| check(&path))
            .and_then(|()| {
                let announced = self.announce(&id, filename, purpose);
                announced.map_err(|e| Problem::internal(e.to_string()))
            });
        if kept.is_err() {
            // It was never announced.
            let _ = std::fs::remove_file(&path);
        }
        kept
    }

    /// Lets callers see a file whose content is there.
    pub(super) fn announce(
        &self,
        id: &str,
        filename: &str,
        purpose: &str,
    ) -> std::io::Result<FileObject> {
        let object = FileObject {
            id: id.to_owned(),
            object: "file".to_owned(),
            bytes: std::fs::metadata(self.content(id))?.len(),
            created_at: now(),
            filename: filename.to_owned(),
            purpose: purpose.to_owned(),
            status: "processed".to_owned(),
        };
        write(&self.note(id), &serde_json::to_vec(&object)?)?;
        Ok(object)
    }

    /// Whether `more` files can be kept.
    pub(super) fn room(&self, more: usize) -> Result<(), Problem> {
        if self.ids().count() + more > MOST {
            let text = format!(
                "this server keeps {MOST} files at most, those that its batches will answer \
                 included; delete some of them"
            );
            return Err(Problem::bad(text).code("too_many_files"));
        }
        Ok(())
    }

    fn ids(&self) -> impl Iterator<Item = String> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
    }

    /// All of them, in no order.
    fn list(&self) -> Vec<FileObject> {
        self.ids().filter_map(|id| self.get(&id).ok()).collect()
    }

    pub(super) fn get(&self, id: &str) -> Result<FileObject, Problem> {
        let missing = || {
            let text = format!("there is no file `{id}` here");
            Problem::new(StatusCode::NOT_FOUND, text)
        };
        if !is_id(id, PREFIX) {
            return Err(missing());
        }
        let note = std::fs::read(self.note(id)).map_err(|_| missing())?;
        serde_json::from_slice(&note).map_err(|_| missing())
    }

    /// The note goes last: a content without one would stay for ever.
    fn delete(&self, id: &str) -> Result<(), Problem> {
        self.get(id)?;
        for path in [self.content(id), self.note(id)] {
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Problem::internal(e.to_string()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where a file's content lies.
    pub(super) fn content(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.jsonl"))
    }

    fn note(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_refused_or_one_too_many_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path().to_owned());
        let refused = files.add("a", "batch", b"x", |_| Err(Problem::bad("no")));
        assert!(refused.is_err());
        let long = "a".repeat(NAME + 1);
        assert!(files.add(&long, "batch", b"x", |_| Ok(())).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let kept = files.add("a", "batch", b"xyz", |_| Ok(())).unwrap();
        assert_eq!((kept.bytes, kept.purpose.as_str()), (3, "batch"));
        for more in 1..MOST {
            std::fs::write(dir.path().join(format!("{more}.json")), "{}").unwrap();
        }
        assert!(files.add("a", "batch", b"x", |_| Ok(())).is_err());
        // What a kill left of an earlier try is deleted too.
        std::fs::remove_file(files.content(&kept.id)).unwrap();
        files.delete(&kept.id).unwrap();
        assert!(files.get(&kept.id).is_err());
        files.add("a", "batch", b"x", |_| Ok(())).unwrap();
    }
}
