//! [`RowsOf`]: records of a table as rows.

use std::path::Path;

use flowrun_engine::step::StepError;
use serde_json::Value;

use crate::rows::Row;
use crate::table::{Record, text_of};

/// What makes rows of records.
#[derive(Clone, Copy)]
pub(crate) struct RowsOf<'a> {
    /// First part of every id.
    pub(crate) dataset: &'a str,
    /// Second part.
    pub(crate) split: &'a str,
    /// Column of the text.
    pub(crate) text: &'a str,
    /// Column of the label.
    pub(crate) label: &'a str,
    /// Where the records are from, for messages.
    pub(crate) origin: &'a str,
}

impl<'a> RowsOf<'a> {
    /// Rows with ids `<dataset>:<split>:<index>`.
    pub(crate) fn of(
        self,
        records: impl Iterator<Item = Result<Record, StepError>> + 'a,
    ) -> impl Iterator<Item = Result<Row, StepError>> + 'a {
        let numbered = records.enumerate();
        numbered.map(move |(index, record)| self.row(index, record?))
    }

    fn row(self, index: usize, mut record: Record) -> Result<Row, StepError> {
        let at = format!("{}: row {}", Path::new(self.origin).display(), index + 1);
        let mut row = Row::new(
            format!("{}:{}:{index}", self.dataset, self.split),
            text_of(&record, self.text, &at)?,
            label_of(&record, self.label, &at)?,
        );
        record.remove(self.text);
        record.remove(self.label);
        row.extra = record;
        Ok(row)
    }
}

/// The label; none where the column is empty.
fn label_of(record: &Record, column: &str, at: &str) -> Result<Option<String>, StepError> {
    if record.get(column).is_some_and(Value::is_null) {
        return Ok(None);
    }
    let label = text_of(record, column, at)?;
    Ok(Some(label).filter(|label| !label.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_label_is_none_and_a_missing_column_an_error() {
        let record = |label: Value| Record::from([("label".to_owned(), label)]);
        for empty in [Value::Null, "".into(), "  ".into()] {
            assert_eq!(label_of(&record(empty), "label", "f").ok(), Some(None));
        }
        assert!(label_of(&record("a".into()), "lable", "f").is_err());
    }
}
