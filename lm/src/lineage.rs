//! [`Lineage`]: which rows a program or model learned from, and which chose it. It travels with
//! the program and the checkpoint, so that a score can say whether its rows took part.
//!
//! Knows no step and no data set. Rows are told apart by id; a row of another id with an equal
//! text is reported apart, because real data may hold one text twice on purpose.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Row id → digest of its text.
type Rows = BTreeMap<String, String>;

/// What rows had a part in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// Rows that weights, demos or a classifier were made from.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    trained: Rows,
    /// Rows whose scores chose between programs or checkpoints.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    selected: Rows,
}

/// Rows to be scored that had a part in what is scored, by id and in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overlap {
    /// Rows that it was trained on.
    pub trained: Vec<String>,
    /// Rows that it was selected by and not trained on.
    pub selected: Vec<String>,
    /// Rows that took no part themselves, but whose text did under another id.
    pub same_text: Vec<String>,
}

impl Lineage {
    /// Adds rows that something is made from, as (id, text).
    pub fn train<'a>(&mut self, rows: impl IntoIterator<Item = (&'a str, &'a str)>) {
        self.trained.extend(rows.into_iter().map(entry));
    }

    /// Adds rows that something is chosen by, as (id, text).
    pub fn select<'a>(&mut self, rows: impl IntoIterator<Item = (&'a str, &'a str)>) {
        self.selected.extend(rows.into_iter().map(entry));
    }

    /// Adds what is known of another part of the same thing.
    pub fn merge(&mut self, other: &Self) {
        self.trained.extend(other.trained.clone());
        self.selected.extend(other.selected.clone());
    }

    /// Rows that it was made from, and rows that it was chosen by.
    pub fn counts(&self) -> (usize, usize) {
        (self.trained.len(), self.selected.len())
    }

    /// Which of these rows, given as (id, text), had a part in it.
    pub fn overlap<'a>(&self, rows: impl IntoIterator<Item = (&'a str, &'a str)>) -> Overlap {
        let texts: BTreeSet<&str> = (self.trained.values().chain(self.selected.values()))
            .map(String::as_str)
            .collect();
        let mut overlap = Overlap::default();
        for (id, text) in rows {
            let list = if self.trained.contains_key(id) {
                &mut overlap.trained
            } else if self.selected.contains_key(id) {
                &mut overlap.selected
            } else if texts.contains(text_digest(text).as_str()) {
                &mut overlap.same_text
            } else {
                continue;
            };
            list.push(id.to_owned());
        }
        overlap
    }
}

impl Overlap {
    /// Whether no row had a part in it.
    pub fn is_empty(&self) -> bool {
        self.trained.is_empty() && self.selected.is_empty() && self.same_text.is_empty()
    }

    /// The ids of all rows that are not clean.
    pub fn ids(&self) -> BTreeSet<&str> {
        (self.trained.iter())
            .chain(&self.selected)
            .chain(&self.same_text)
            .map(String::as_str)
            .collect()
    }
}

fn entry((id, text): (&str, &str)) -> (String, String) {
    (id.to_owned(), text_digest(text))
}

/// Equal for texts that differ in case and spaces only.
fn text_digest(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let digest = Sha256::digest(words.join(" ").to_lowercase());
    digest[..8].iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_told_apart_by_id_and_equal_texts_apart() {
        let mut lineage = Lineage::default();
        lineage.train([("d:train:0", "Where is  my card?"), ("d:train:1", "b")]);
        lineage.select([("d:train:1", "b"), ("d:train:2", "c")]);
        let found = lineage.overlap([
            ("d:train:2", "c"),
            ("d:test:0", "where is my card?"),
            ("d:test:1", "new"),
            ("d:train:1", "b"),
        ]);
        assert_eq!(found.trained, ["d:train:1"]);
        assert_eq!(found.selected, ["d:train:2"]);
        assert_eq!(found.same_text, ["d:test:0"]);
        assert_eq!(found.ids().len(), 3);
        assert!(lineage.overlap([("d:test:1", "new")]).is_empty());
    }

    #[test]
    fn it_is_kept_and_merged() {
        let mut one = Lineage::default();
        one.train([("a", "x")]);
        let mut two = Lineage::default();
        two.select([("b", "y")]);
        one.merge(&two);
        assert_eq!(one.counts(), (1, 1));
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<Lineage>(&text).unwrap(), one);
        assert_eq!(serde_json::to_string(&Lineage::default()).unwrap(), "{}");
    }
}
