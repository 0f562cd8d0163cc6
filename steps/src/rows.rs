//! Rows of an `examples` artifact: JSON Lines, one object a line.
//!
//! A row's `id` is `<dataset>:<split>:<index>` and never changes on its way
//! through a pipeline, so every score can say which data it was measured on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use flowrun_engine::step::StepError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `<dataset>:<split>:<index>`.
    pub id: String,
    /// The query.
    pub text: String,
    /// Its label: gold, or the teacher's; absent when it was deleted or never known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The [`mark`](crate::leakage::mark) of the teacher that gave `label`; absent where the label is gold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// What the teacher wrote before it was sanitised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_label: Option<String>,
    /// `raw_label` in lower case, trimmed, spaces as underscores: what was looked up among the labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sanitised_label: Option<String>,
    /// The teacher's probability of `label`, or the share of its draws that agree; 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f64>,
    /// The teacher's rationale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Why the row was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<String>,
    /// Further columns of the source.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Value>,
}

impl Row {
    /// A row with just a text and perhaps a label.
    #[must_use]
    pub fn new(id: String, text: String, label: Option<String>) -> Self {
        Self {
            id,
            text,
            label,
            teacher: None,
            raw_label: None,
            sanitised_label: None,
            confidence: None,
            reasoning: None,
            dropped: None,
            extra: BTreeMap::new(),
        }
    }

    /// The data set that the row's id names.
    #[must_use]
    pub fn dataset(&self) -> &str {
        dataset_of(&self.id)
    }
}

/// The data set that a row id names.
#[must_use]
pub fn dataset_of(id: &str) -> &str {
    id.split(':').next().unwrap_or(id)
}

/// Reads all rows.
///
/// # Errors
/// When the file cannot be read or a line is not a row; the message names file and line.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, StepError> {
    read_jsonl(path)
}

/// Writes rows, one a line.
///
/// # Errors
/// When the file cannot be written.
pub fn write_rows<'a>(
    path: &Path,
    rows: impl IntoIterator<Item = &'a Row>,
) -> Result<(), StepError> {
    write_jsonl(path, rows)
}

/// Reads a JSON Lines file of any record.
///
/// # Errors
/// As [`read_rows`].
pub fn read_jsonl<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, StepError> {
    let file = File::open(path).map_err(|e| StepError::io(path, &e))?;
    let mut out = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| StepError::io(path, &e))?;
        if line.trim().is_empty() {
            continue;
        }
        let record = serde_json::from_str(&line)
            .map_err(|e| StepError::invalid(format!("{}:{}: {e}", path.display(), number + 1)))?;
        out.push(record);
    }
    Ok(out)
}

/// Writes a JSON Lines file of any record.
///
/// # Errors
/// As [`write_rows`].
pub fn write_jsonl<T: Serialize>(
    path: &Path,
    records: impl IntoIterator<Item = T>,
) -> Result<(), StepError> {
    let io = |e: std::io::Error| StepError::io(path, &e);
    let mut out = BufWriter::new(File::create(path).map_err(io)?);
    for record in records {
        serde_json::to_writer(&mut out, &record).map_err(|e| io(e.into()))?;
        out.write_all(b"\n").map_err(io)?;
    }
    out.flush().map_err(io)
}

/// Reads one JSON document.
///
/// # Errors
/// When the file cannot be read or does not fit; the message names file and place.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, StepError> {
    let bytes = std::fs::read(path).map_err(|e| StepError::io(path, &e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| StepError::invalid(format!("{}: {e}", path.display())))
}

/// Writes one JSON document, indented.
///
/// # Errors
/// When the file cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StepError> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|e| StepError::failed(format!("{}: {e}", path.display())))?;
    text.push('\n');
    std::fs::write(path, text).map_err(|e| StepError::io(path, &e))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, "{\"id\":\"a:train:0\",\"text\":\"x\"}\n{oops\n").unwrap();
        let error = read_rows(&path).unwrap_err();
        assert!(error.message.contains("rows.jsonl:2:"), "{}", error.message);
    }

    #[test]
    fn rows_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let mut row = Row::new("d:train:3".into(), "a\nb \"c\"".into(), Some("l".into()));
        row.confidence = Some(0.1 + 0.2);
        write_rows(&path, [&row]).unwrap();
        assert_eq!(read_rows(&path).unwrap(), vec![row.clone()]);
        assert_eq!(row.dataset(), "d");
    }
}
