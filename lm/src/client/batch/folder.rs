//! [`Folder`]: what outlives a kill: the order that is open, the file that goes up, and answers that
//! nobody has asked for yet.
//!
//! Knows no server. Invariant: the order and the answers are replaced whole, or stay as they were.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::lm::LmError;

/// Where the order stands while its answers are not here.
pub(super) const ORDER: &str = "order.json";
/// What goes up.
const REQUESTS: &str = "requests.jsonl";
/// Answers of an earlier order that nobody has asked for since, as they came.
pub(super) const KEPT: &str = "answers.jsonl";

/// A batch that was, or is about to be, ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Order {
    /// Its file at the server.
    pub(super) file: String,
    /// Its id, once that was heard.
    pub(super) batch: Option<String>,
}

/// The folder of a model's batches in a step.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    /// Writes what goes up; says where.
    pub(super) fn write_requests(&self, text: &str) -> Result<PathBuf, LmError> {
        let path = self.0.join(REQUESTS);
        std::fs::create_dir_all(&self.0)
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|e| broken(&path, &e))?;
        Ok(path)
    }

    /// The order that was written down.
    pub(super) fn order(&self) -> Result<Option<Order>, LmError> {
        let Some(text) = self.read(ORDER)? else {
            return Ok(None);
        };
        let order = serde_json::from_str(&text);
        order.map(Some).map_err(|e| broken(&self.0.join(ORDER), &e))
    }

    pub(super) fn write_order(&self, order: &Order) -> Result<(), LmError> {
        self.replace(ORDER, &json!(order).to_string())
    }

    pub(super) fn forget_order(&self) -> Result<(), LmError> {
        self.remove(ORDER)
    }

    /// The lines that are kept, by the names of their requests.
    pub(super) fn kept(&self) -> Result<BTreeMap<String, String>, LmError> {
        let text = self.read(KEPT)?.unwrap_or_default();
        let named = |text: &str| {
            let line: Value = serde_json::from_str(text).ok()?;
            Some((line["custom_id"].as_str()?.to_owned(), text.to_owned()))
        };
        Ok(text.lines().filter_map(named).collect())
    }

    /// Keeps these lines, and no others.
    pub(super) fn keep(&self, kept: &BTreeMap<String, String>) -> Result<(), LmError> {
        if kept.is_empty() {
            return self.remove(KEPT);
        }
        let mut text = String::new();
        for line in kept.values() {
            text += line;
            text.push('\n');
        }
        self.replace(KEPT, &text)
    }

    fn read(&self, name: &str) -> Result<Option<String>, LmError> {
        let path = self.0.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(broken(&path, &e)),
        }
    }

    fn replace(&self, name: &str, text: &str) -> Result<(), LmError> {
        let path = self.0.join(name);
        let part = path.with_extension("part");
        std::fs::write(&part, text)
            .and_then(|()| std::fs::rename(&part, &path))
            .map_err(|e| broken(&path, &e))
    }

    fn remove(&self, name: &str) -> Result<(), LmError> {
        let path = self.0.join(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(broken(&path, &e)),
            _ => Ok(()),
        }
    }
}

fn broken(path: &Path, why: &dyn std::fmt::Display) -> LmError {
    LmError::Unavailable(format!("{}: {why}", path.display()))
}
