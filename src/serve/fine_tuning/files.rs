//! [`Files`]: uploaded chats, each a file with a note beside it.

use std::path::PathBuf;

use axum::http::StatusCode;
use flowrun_steps::finetune::tuning::read_chats;
use serde::{Deserialize, Serialize};

use super::{is_id, new_id, now, write};
use crate::serve::problem::Problem;

/// Bytes of an uploaded file at most, and of the form around it.
pub(in crate::serve) const FILE: usize = 64 << 20;
/// What files are for here.
pub(super) const PURPOSE: &str = "fine-tune";
const PREFIX: &str = "file";

/// The folder of the uploaded files.
#[derive(Clone)]
pub(super) struct Files {
    folder: PathBuf,
}

/// OpenAI's file object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FileObject {
    pub(super) id: String,
    object: String,
    bytes: usize,
    created_at: u64,
    filename: String,
    purpose: String,
    status: String,
}

impl Files {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Keeps a file of chats.
    pub(super) fn add(&self, filename: &str, bytes: &[u8]) -> Result<FileObject, Problem> {
        let id = new_id(PREFIX);
        let path = self.chats(&id);
        write(&path, bytes).map_err(|e| Problem::internal(e.to_string()))?;
        if let Err(error) = read_chats(&path) {
            // It was never announced.
            let _ = std::fs::remove_file(&path);
            let shown = path.display().to_string();
            return Err(Problem::bad(error.message.replace(&shown, filename)).of("file"));
        }
        let object = FileObject {
            id: id.clone(),
            object: "file".to_owned(),
            bytes: bytes.len(),
            created_at: now(),
            filename: filename.to_owned(),
            purpose: PURPOSE.to_owned(),
            status: "processed".to_owned(),
        };
        let note = serde_json::to_vec(&object).map_err(|e| Problem::internal(e.to_string()))?;
        write(&self.note(&id), &note).map_err(|e| Problem::internal(e.to_string()))?;
        Ok(object)
    }

    /// All of them, the newest first.
    pub(super) fn list(&self) -> Vec<FileObject> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let ids = names.filter_map(|name| name.strip_suffix(".json").map(str::to_owned));
        let mut all: Vec<_> = ids.filter_map(|id| self.get(&id).ok()).collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
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

    pub(super) fn content(&self, id: &str) -> Result<Vec<u8>, Problem> {
        self.get(id)?;
        std::fs::read(self.chats(id)).map_err(|e| Problem::internal(e.to_string()))
    }

    pub(super) fn delete(&self, id: &str) -> Result<(), Problem> {
        self.get(id)?;
        std::fs::remove_file(self.note(id))
            .and_then(|()| std::fs::remove_file(self.chats(id)))
            .map_err(|e| Problem::internal(e.to_string()))
    }

    /// The chats of a file.
    pub(super) fn chats(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.jsonl"))
    }

    fn note(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}
