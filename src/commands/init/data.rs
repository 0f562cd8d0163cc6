//! [`Data`]: the user's table, and what can be told from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use flowrun_steps::table::{Format, Record, read_table};
use serde_json::Value;

use super::question::Asker;
use crate::exit::{Exit, Failure};

/// Names that columns of texts have.
const TEXT_NAMES: [&str; 10] = [
    "text",
    "query",
    "sentence",
    "utterance",
    "message",
    "question",
    "body",
    "content",
    "title",
    "input",
];
/// Names that columns of labels have.
const LABEL_NAMES: [&str; 9] = [
    "label",
    "category",
    "intent",
    "class",
    "target",
    "topic",
    "tag",
    "label_text",
    "output",
];
/// Most labels that the pipeline takes.
const MOST_LABELS: usize = 50;
/// Labelled rows without which nothing can be learnt and tested.
const FEWEST_ROWS: usize = 30;

/// The user's table.
pub(super) struct Data {
    file: PathBuf,
    rows: Vec<Record>,
    columns: BTreeSet<String>,
}

/// What the table holds.
pub(super) struct Facts {
    /// Labels that the pipeline takes: the most frequent.
    pub(super) labels: usize,
    /// Rows with a label, before test rows are set aside.
    pub(super) labelled: usize,
    /// Rows without.
    pub(super) unlabelled: usize,
    /// Labelled rows to train on, about.
    pub(super) train: usize,
}

impl Data {
    pub(super) fn read(file: &Path) -> Result<Self, Failure> {
        let name = file.display();
        let format = Format::of_name(&name.to_string());
        let rows = read_table(file, format)
            .map_err(|e| Failure::new(Exit::Invalid, format!("error: {}\n", e.message)))?;
        let columns: BTreeSet<String> = rows.iter().flat_map(|row| row.keys().cloned()).collect();
        if columns.len() < 2 {
            let text = format!("error: {name} needs a column of texts and one of labels\n");
            return Err(Failure::new(Exit::Invalid, text));
        }
        Ok(Self {
            file: file.to_owned(),
            rows,
            columns,
        })
    }

    /// The column that is meant: by flag, by answer, or where the guess is good.
    pub(super) fn column(
        &self,
        given: Option<&str>,
        guess: Option<&str>,
        what: &str,
        asker: &mut Asker<'_>,
    ) -> Result<String, Failure> {
        let columns: Vec<&str> = self.columns.iter().map(String::as_str).collect();
        let list = columns.join(", ");
        let question = format!("Column of the {what}s ({list})");
        let chosen = match given {
            Some(column) => Some(column.to_owned()),
            None => asker.ask(&question, guess).or(guess.map(str::to_owned)),
        };
        match chosen {
            Some(column) if self.columns.contains(&column) => Ok(column),
            Some(column) => Err(Failure::usage(format!(
                "{} has no column `{column}`; it has {list}",
                self.file.display()
            ))),
            None => Err(Failure::usage(format!(
                "which column holds the {what}s? Say `--{what} COLUMN`; there are {list}"
            ))),
        }
    }

    pub(super) fn guess_text(&self) -> Option<&str> {
        self.named(&TEXT_NAMES)
    }

    /// By name; else the other of two columns.
    pub(super) fn guess_label(&self, text: &str) -> Option<&str> {
        self.named(&LABEL_NAMES).or_else(|| {
            let mut others = self.columns.iter().filter(|column| *column != text);
            match (others.next(), others.next()) {
                (Some(only), None) => Some(only.as_str()),
                _ => None,
            }
        })
    }

    fn named(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| {
            let same = |column: &&String| column.eq_ignore_ascii_case(name);
            self.columns.iter().find(same).map(String::as_str)
        })
    }

    /// Counts labels and rows.
    pub(super) fn facts(&self, text: &str, label: &str, has_test: bool) -> Result<Facts, Failure> {
        if text == label {
            let text = format!("`{text}` cannot be both the text and the label");
            return Err(Failure::usage(text));
        }
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for row in &self.rows {
            let label = match row.get(label) {
                None | Some(Value::Null) => continue,
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            };
            if !label.trim().is_empty() {
                *counts.entry(label).or_default() += 1;
            }
        }
        let mut sizes: Vec<usize> = counts.into_values().collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.truncate(MOST_LABELS);
        // A label that is so rare may be missing from the training rows.
        sizes.retain(|size| *size > 2);
        let labelled: usize = sizes.iter().sum();
        if sizes.len() < 2 || labelled < FEWEST_ROWS {
            let text = format!(
                "error: {} has {labelled} rows of {} labels that occur at least three times; \
                 at least {FEWEST_ROWS} rows of 2 labels are needed\n  help: is `{label}` the column of the labels?\n",
                self.file.display(),
                sizes.len()
            );
            return Err(Failure::new(Exit::Invalid, text));
        }
        let has_label = |row: &&Record| match row.get(label) {
            None | Some(Value::Null) => false,
            Some(Value::String(text)) => !text.trim().is_empty(),
            Some(_) => true,
        };
        let with_label = self.rows.iter().filter(has_label).count();
        Ok(Facts {
            labels: sizes.len(),
            labelled,
            unlabelled: self.rows.len() - with_label,
            train: if has_test { labelled } else { labelled * 3 / 4 },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(columns: &[&str], rows: &[&[&str]]) -> Data {
        let record = |row: &&[&str]| -> Record {
            let fields = columns.iter().zip(row.iter());
            fields
                .map(|(c, v)| ((*c).to_owned(), Value::from(*v)))
                .collect()
        };
        Data {
            file: "f.csv".into(),
            rows: rows.iter().map(record).collect(),
            columns: columns.iter().map(|c| (*c).to_owned()).collect(),
        }
    }

    #[test]
    fn columns_are_guessed_by_name_or_by_what_is_left() {
        let named = data(&["id", "Query", "intent"], &[]);
        assert_eq!(named.guess_text(), Some("Query"));
        assert_eq!(named.guess_label("Query"), Some("intent"));
        let two = data(&["text", "x"], &[]);
        assert_eq!(two.guess_label("text"), Some("x"));
        let unclear = data(&["a", "b", "c"], &[]);
        assert_eq!(
            (unclear.guess_text(), unclear.guess_label("a")),
            (None, None)
        );
        let mut silent = Asker::new(None);
        let error = unclear.column(None, None, "text", &mut silent).err();
        assert!(error.is_some_and(|e| e.to_string().contains("--text COLUMN")));
    }

    #[test]
    fn rare_labels_and_empty_ones_do_not_count() {
        let mut rows: Vec<&[&str]> = vec![&["t", "a"]; 20];
        rows.extend(vec![&["t", "b"][..]; 12]);
        rows.extend(vec![&["t", ""][..]; 7]);
        rows.push(&["t", "rare"]);
        let data = data(&["text", "label"], &rows);
        let facts = data.facts("text", "label", true).ok();
        let facts = facts.map(|f| (f.labels, f.labelled, f.unlabelled));
        assert_eq!(facts, Some((2, 32, 7)));
        assert!(data.facts("text", "text", true).is_err());
    }
}
