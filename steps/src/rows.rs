//! Rows of an `examples` artifact: JSON Lines, one object a line.
//!
//! A row's `id` is `<dataset>:<split>:<index>` and never changes on its way
//! through a pipeline, so every score can say which data it was measured on.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

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

    /// The row without a label and all that was said with it.
    #[must_use]
    pub(crate) fn unanswered(self) -> Self {
        Self {
            extra: self.extra,
            ..Self::new(self.id, self.text, None)
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
pub(crate) fn dataset_of(id: &str) -> &str {
    id.split(':').next().unwrap_or(id)
}

/// Reads all rows.
///
/// # Errors
/// When the file cannot be read or a line is not a row; the message names file and line.
pub(crate) fn read_rows(path: &Path) -> Result<Vec<Row>, StepError> {
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
pub(crate) fn read_jsonl<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, StepError> {
    JsonlReader::open(path)?.collect()
}

/// The records of a JSON Lines file, one after the other: no more than one is in memory. Errors
/// name file and line.
pub struct JsonlReader<T> {
    path: PathBuf,
    file: BufReader<File>,
    line: String,
    number: usize,
    /// Where the next line begins.
    offset: u64,
    record: PhantomData<fn() -> T>,
}

impl<T: serde::de::DeserializeOwned> JsonlReader<T> {
    /// At the first record.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, StepError> {
        let file = File::open(path).map_err(|e| StepError::io(path, &e))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::new(file),
            line: String::new(),
            number: 0,
            offset: 0,
            record: PhantomData,
        })
    }

    /// The next record and where its line begins, in bytes.
    fn next_at(&mut self) -> Option<Result<(u64, T), StepError>> {
        loop {
            self.line.clear();
            self.number += 1;
            let start = self.offset;
            match self.file.read_line(&mut self.line) {
                Ok(0) => return None,
                Ok(bytes) => self.offset += bytes as u64,
                Err(error) => return Some(Err(StepError::io(&self.path, &error))),
            }
            if !self.line.trim().is_empty() {
                let record = self.parsed(&self.number);
                return Some(record.map(|record| (start, record)));
            }
        }
    }

    /// The record whose line begins there.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub fn at(&mut self, offset: u64) -> Result<T, StepError> {
        self.line.clear();
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_line(&mut self.line))
            .map_err(|e| StepError::io(&self.path, &e))?;
        self.parsed(&format_args!("byte {offset}"))
    }

    /// Each record with where its line begins, for [`JsonlReader::at`].
    pub(crate) fn with_offsets(mut self) -> impl Iterator<Item = Result<(u64, T), StepError>> {
        std::iter::from_fn(move || self.next_at())
    }

    fn parsed(&self, place: &dyn Display) -> Result<T, StepError> {
        serde_json::from_str(&self.line)
            .map_err(|e| StepError::invalid(format!("{}:{place}: {e}", self.path.display())))
    }
}

impl<T: serde::de::DeserializeOwned> Iterator for JsonlReader<T> {
    type Item = Result<T, StepError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_at()?;
        Some(next.map(|(_, record)| record))
    }
}

/// Writes a JSON Lines file, one record after the other.
pub struct JsonlWriter {
    path: PathBuf,
    file: BufWriter<File>,
    written: usize,
}

impl JsonlWriter {
    /// An empty file.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(path: &Path) -> Result<Self, StepError> {
        let file = File::create(path).map_err(|e| StepError::io(path, &e))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
            written: 0,
        })
    }

    /// Adds a record.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, record: &impl Serialize) -> Result<(), StepError> {
        serde_json::to_writer(&mut self.file, record)
            .map_err(std::io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"))
            .map_err(|e| StepError::io(&self.path, &e))?;
        self.written += 1;
        Ok(())
    }

    /// Records so far.
    #[must_use]
    pub fn written(&self) -> usize {
        self.written
    }

    /// Brings the last records to the file; how many there are.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn finish(mut self) -> Result<usize, StepError> {
        self.file
            .flush()
            .map_err(|e| StepError::io(&self.path, &e))?;
        Ok(self.written)
    }
}

/// Writes a JSON Lines file of any record.
///
/// # Errors
/// As [`write_rows`].
pub(crate) fn write_jsonl<T: Serialize>(
    path: &Path,
    records: impl IntoIterator<Item = T>,
) -> Result<(), StepError> {
    let mut out = JsonlWriter::create(path)?;
    for record in records {
        out.write(&record)?;
    }
    out.finish().map(|_| ())
}

/// Reads the next line that is not blank into `line`, its end included; false when there is none.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    loop {
        line.clear();
        if reader.read_until(b'\n', line)? == 0 {
            return Ok(false);
        }
        if !line.trim_ascii().is_empty() {
            if line.last() != Some(&b'\n') {
                line.push(b'\n');
            }
            return Ok(true);
        }
    }
}

/// Reads one JSON document.
///
/// # Errors
/// When the file cannot be read or does not fit; the message names file and place.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, StepError> {
    let bytes = std::fs::read(path).map_err(|e| StepError::io(path, &e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| StepError::invalid(format!("{}: {e}", path.display())))
}

/// Writes one JSON document, indented.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StepError> {
    let io = |e: std::io::Error| StepError::io(path, &e);
    let mut out = BufWriter::new(File::create(path).map_err(io)?);
    serde_json::to_writer_pretty(&mut out, value).map_err(|e| io(e.into()))?;
    out.write_all(b"\n").and_then(|()| out.flush()).map_err(io)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

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
    fn a_record_is_found_again_by_its_offset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.jsonl");
        std::fs::write(&path, "1\n\n\"größe\"\n  \n[3]").unwrap();
        let reader = || JsonlReader::<Value>::open(&path).unwrap();
        let all: Vec<(u64, Value)> = reader().with_offsets().map(Result::unwrap).collect();
        assert_eq!(all.len(), 3);
        let mut again = reader();
        for (offset, value) in all.iter().rev() {
            assert_eq!(again.at(*offset).unwrap(), *value);
        }
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

    #[test]
    fn a_row_is_asked_anew_without_what_was_said_of_it() {
        let asked = json!({"id": "d:train:3", "text": "t", "extra": {"n": 1}});
        let mut answered = asked.clone();
        for field in [
            "label",
            "teacher",
            "raw_label",
            "sanitised_label",
            "reasoning",
            "dropped",
        ] {
            answered[field] = "x".into();
        }
        answered["confidence"] = 0.5.into();
        let row = |value: Value| -> Row { serde_json::from_value(value).unwrap() };
        assert_eq!(row(answered).unanswered(), row(asked));
    }
}
