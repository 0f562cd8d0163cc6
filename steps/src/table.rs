//! Tables of texts: CSV, JSON Lines and Parquet files as rows of named columns.
//!
//! Knows no data set; a column that is asked for and missing is an error that
//! lists the columns that are there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use flowrun_engine::step::StepError;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::Row;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::JsonlReader;

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Comma-separated values with a header line.
    Csv,
    /// One JSON object a line.
    Jsonl,
    /// Apache Parquet.
    Parquet,
}

impl Format {
    /// By the ending of a name; CSV when it says nothing.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        match name.rsplit('.').next() {
            Some("jsonl" | "ndjson" | "json") => Self::Jsonl,
            Some("parquet") => Self::Parquet,
            _ => Self::Csv,
        }
    }
}

/// One record: column to value.
pub type Record = BTreeMap<String, Value>;

/// Records of a file, one after the other.
pub type Records = Box<dyn Iterator<Item = Result<Record, StepError>>>;

/// Reads a whole file.
///
/// # Errors
/// As [`records`].
pub fn read_table(path: &Path, format: Format) -> Result<Vec<Record>, StepError> {
    records(path, format)?.collect()
}

/// Reads a file record by record: CSV and JSON Lines hold one in memory, Parquet a row group.
///
/// # Errors
/// When the file cannot be read; the message names the line or row.
pub fn records(path: &Path, format: Format) -> Result<Records, StepError> {
    let open = || File::open(path).map_err(|e| StepError::io(path, &e));
    match format {
        Format::Csv => csv_records(open()?, path.display().to_string()),
        Format::Jsonl => Ok(Box::new(JsonlReader::open(path)?)),
        Format::Parquet => parquet_records(open()?, path.display().to_string()),
    }
}

/// Reads CSV with a header line.
///
/// # Errors
/// When a record has another number of fields than the header, or is not UTF-8.
pub(crate) fn csv_records(source: impl Read + 'static, name: String) -> Result<Records, StepError> {
    let wrong = move |e: csv::Error| StepError::invalid(format!("{name}: {e}"));
    let mut reader = csv::Reader::from_reader(source);
    let header = reader.headers().map_err(&wrong)?.clone();
    let record = move |record: csv::Result<csv::StringRecord>| {
        let record = record.map_err(&wrong)?;
        let fields = header.iter().zip(record.iter());
        Ok(fields
            .map(|(column, text)| (column.to_owned(), Value::from(text)))
            .collect())
    };
    Ok(Box::new(reader.into_records().map(record)))
}

fn parquet_records(file: File, name: String) -> Result<Records, StepError> {
    let wrong = move |e: &dyn std::fmt::Display| StepError::invalid(format!("{name}: {e}"));
    let reader = SerializedFileReader::new(file).map_err(|e| wrong(&e))?;
    let record = move |row: parquet::errors::Result<Row>| match row
        .map_err(|e| wrong(&e))?
        .to_json_value()
    {
        Value::Object(map) => Ok(map.into_iter().collect()),
        other => Err(wrong(&other)),
    };
    Ok(Box::new(reader.into_iter().map(record)))
}

/// The text of a column; numbers and booleans are spelled out.
///
/// # Errors
/// When the record has no such column, with those that it has.
pub fn text_of(record: &Record, column: &str, at: &str) -> Result<String, StepError> {
    match record.get(column) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(Value::Bool(value)) => Ok(value.to_string()),
        Some(other) => Err(StepError::invalid(format!(
            "{at}: column `{column}` is not a text: {other}"
        ))),
        None => {
            let there: Vec<String> = record.keys().map(|k| format!("`{k}`")).collect();
            Err(
                StepError::invalid(format!("{at}: there is no column `{column}`"))
                    .help(format!("the columns are {}", there.join(", "))),
            )
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::writer::SerializedFileWriter;
    use std::sync::Arc;

    fn read_csv(text: &'static str) -> Result<Vec<Record>, StepError> {
        csv_records(text.as_bytes(), "t.csv".to_owned())?.collect()
    }

    #[test]
    fn quoted_fields_hold_newlines_and_ragged_records_are_named() {
        let rows = read_csv("text,category\n\"a\nb\",x\n").unwrap();
        assert_eq!(rows[0]["text"], "a\nb");
        let error = read_csv("text,category\na\n").unwrap_err();
        assert!(
            error.message.contains("t.csv") && error.message.contains("line: 2"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_column_lists_the_others() {
        let rows = read_csv("text,category\na,b\n").unwrap();
        let error = text_of(&rows[0], "label", "row 1").unwrap_err();
        assert_eq!(
            error.help.as_deref(),
            Some("the columns are `category`, `text`")
        );
    }

    #[test]
    fn parquet_rows_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let schema = "message m { REQUIRED BYTE_ARRAY text (UTF8); REQUIRED INT64 label; }";
        let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let texts = [ByteArray::from("größe"), ByteArray::from("b")];
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, None, None)
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<Int64Type>()
            .write_batch(&[3, 4], None, None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let rows = read_table(&path, Format::of_name("t.parquet")).unwrap();
        assert_eq!(text_of(&rows[0], "text", "").unwrap(), "größe");
        assert_eq!(text_of(&rows[1], "label", "").unwrap(), "4");
    }
}
