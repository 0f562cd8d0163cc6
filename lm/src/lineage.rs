//! [`Lineage`]: which rows a program or model learned from, which chose it, and which rows its
//! teachers came from. It travels with the program and the checkpoint, so that a score can say
//! whether its rows took part.
//!
//! Knows no step and no data set. Rows are told apart by id; a row of another id with an equal
//! text is reported apart, because real data may hold one text twice on purpose.

mod long;
mod rows;

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

pub use self::long::{FinishedLineage, LongLineage, Scratch};
use self::rows::{Rows, text_digest};

/// What rows had a part in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// Rows that weights, demos or a classifier were made from.
    #[serde(default, skip_serializing_if = "Rows::is_empty")]
    trained: Rows,
    /// Rows whose scores chose between programs or checkpoints.
    #[serde(default, skip_serializing_if = "Rows::is_empty")]
    selected: Rows,
    /// Rows that a teacher came from in any of these ways, whose labels it learned.
    #[serde(default, skip_serializing_if = "Rows::is_empty")]
    taught: Rows,
    /// Teachers whose labels it learned, and whose rows are not known.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    unknown_teachers: BTreeSet<String>,
}

/// How many rows of a set had which part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Parts {
    /// Rows that weights, demos or a classifier were made from.
    pub trained: usize,
    /// Rows whose scores chose between programs or checkpoints.
    pub selected: usize,
    /// Rows that a teacher came from.
    pub taught: usize,
}

/// A row to be scored.
#[derive(Debug, Clone, Copy)]
pub struct ScoredRow<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its text.
    pub text: &'a str,
    /// Whether its label is a teacher's own: then the score is the agreement with that teacher,
    /// and what the teacher came from is no leak.
    pub by_teacher: bool,
}

/// Rows to be scored that had a part in what is scored, by id and in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overlap {
    /// Rows that it was trained on.
    pub trained: Vec<String>,
    /// Rows that it was selected by and not trained on.
    pub selected: Vec<String>,
    /// Rows that neither trained nor selected it, but that a teacher of it came from.
    pub taught: Vec<String>,
    /// Rows that took no part themselves, but whose text did under another id.
    pub same_text: Vec<String>,
    /// Whether a teacher's rows are not known: then there may be more.
    pub unknown_teacher: bool,
}

impl Lineage {
    /// Adds rows that something is made from, as (id, text).
    pub fn train<'a>(&mut self, rows: impl IntoIterator<Item = (&'a str, &'a str)>) {
        self.trained.add(rows);
    }

    /// Adds rows that something is chosen by, as (id, text).
    pub fn select<'a>(&mut self, rows: impl IntoIterator<Item = (&'a str, &'a str)>) {
        self.selected.add(rows);
    }

    /// Adds the rows that something else is made of as rows that this is chosen by.
    pub fn select_by(&mut self, other: &Self) {
        self.selected.merge(&other.trained);
        self.selected.merge(&other.selected);
        self.taught.merge(&other.taught);
        (self.unknown_teachers).extend(other.unknown_teachers.iter().cloned());
    }

    /// Adds what is known of another part of the same thing.
    pub fn merge(&mut self, other: &Self) {
        self.trained.merge(&other.trained);
        self.selected.merge(&other.selected);
        self.taught.merge(&other.taught);
        (self.unknown_teachers).extend(other.unknown_teachers.iter().cloned());
    }

    /// Adds the rows that a teacher came from, whose labels something is made from or chosen by.
    pub fn learn_from(&mut self, teacher: &Self) {
        for rows in [&teacher.trained, &teacher.selected, &teacher.taught] {
            self.taught.merge(rows);
        }
        (self.unknown_teachers).extend(teacher.unknown_teachers.iter().cloned());
    }

    /// Adds a teacher whose rows are not known.
    pub fn learn_from_unknown(&mut self, teacher: impl Into<String>) {
        self.unknown_teachers.insert(teacher.into());
    }

    /// What the rows of each data set and split (`banking77:train`) had a part in; rows of no set
    /// are under "".
    pub fn sets(&self) -> BTreeMap<&str, Parts> {
        let mut all: BTreeMap<&str, Parts> = BTreeMap::new();
        for (set, count) in self.trained.sets() {
            all.entry(set).or_default().trained += count;
        }
        for (set, count) in self.selected.sets() {
            all.entry(set).or_default().selected += count;
        }
        for (set, count) in self.taught.sets() {
            all.entry(set).or_default().taught += count;
        }
        all
    }

    /// Whether it learned from teachers whose rows are not known.
    pub fn has_unknown_teachers(&self) -> bool {
        !self.unknown_teachers.is_empty()
    }

    /// Rows that it was made from, and rows that it was chosen by.
    pub fn counts(&self) -> (usize, usize) {
        (self.trained.len(), self.selected.len())
    }

    /// Which of these rows had a part in it.
    pub fn overlap<'a>(&self, rows: impl IntoIterator<Item = ScoredRow<'a>>) -> Overlap {
        let own: HashSet<u64> = self.trained.texts().chain(self.selected.texts()).collect();
        let taught: HashSet<u64> = self.taught.texts().collect();
        let mut overlap = Overlap {
            unknown_teacher: !self.unknown_teachers.is_empty(),
            ..Overlap::default()
        };
        for ScoredRow {
            id,
            text,
            by_teacher,
        } in rows
        {
            let digest = text_digest(text);
            let list = if self.trained.contains(id) {
                &mut overlap.trained
            } else if self.selected.contains(id) {
                &mut overlap.selected
            } else if !by_teacher && self.taught.contains(id) {
                &mut overlap.taught
            } else if own.contains(&digest) || !by_teacher && taught.contains(&digest) {
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
    /// Whether no row is known to have had a part in it.
    pub fn is_empty(&self) -> bool {
        self.ids().is_empty()
    }

    /// The ids of all rows that are not clean.
    pub fn ids(&self) -> BTreeSet<&str> {
        (self.trained.iter())
            .chain(&self.selected)
            .chain(&self.taught)
            .chain(&self.same_text)
            .map(String::as_str)
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn gold<'a>(rows: &[(&'a str, &'a str)]) -> Vec<ScoredRow<'a>> {
        let row = |&(id, text): &(&'a str, &'a str)| ScoredRow {
            id,
            text,
            by_teacher: false,
        };
        rows.iter().map(row).collect()
    }

    #[test]
    fn what_a_teacher_came_from_counts_for_gold_labels_and_not_for_its_own() {
        let mut first = Lineage::default();
        first.train([("d:test:0", "a")]);
        let mut teacher = Lineage::default();
        teacher.select([("d:train:0", "b")]);
        teacher.learn_from(&first);
        let mut student = Lineage::default();
        student.train([("d:train:1", "c")]);
        student.learn_from(&teacher);
        let rows = [("d:test:0", "a"), ("d:train:0", "b"), ("d:test:1", "A")];
        let found = student.overlap(gold(&rows));
        assert_eq!(found.taught, ["d:test:0", "d:train:0"]);
        assert_eq!(found.same_text, ["d:test:1"]);
        assert!(!found.unknown_teacher);
        let own = gold(&rows).into_iter().map(|row| ScoredRow {
            by_teacher: true,
            ..row
        });
        assert!(student.overlap(own).is_empty());

        let mut other = Lineage::default();
        other.learn_from_unknown("ab12");
        student.merge(&other);
        assert!(student.overlap(gold(&rows)).unknown_teacher);
    }

    #[test]
    fn rows_are_told_apart_by_id_and_equal_texts_apart() {
        let mut lineage = Lineage::default();
        lineage.train([("d:train:0", "Where is  my card?"), ("d:train:1", "b")]);
        lineage.select([("d:train:1", "b"), ("d:train:2", "c")]);
        let found = lineage.overlap(gold(&[
            ("d:train:2", "c"),
            ("d:test:0", "where is my card?"),
            ("d:test:1", "new"),
            ("d:train:1", "b"),
        ]));
        assert_eq!(found.trained, ["d:train:1"]);
        assert_eq!(found.selected, ["d:train:2"]);
        assert_eq!(found.same_text, ["d:test:0"]);
        assert_eq!(found.ids().len(), 3);
        assert!(lineage.overlap(gold(&[("d:test:1", "new")])).is_empty());
    }

    #[test]
    fn rows_of_something_else_choose_and_bring_their_teachers() {
        let mut teacher = Lineage::default();
        teacher.train([("d:test:0", "t")]);
        let mut held = Lineage::default();
        held.train([("d:train:0", "a"), ("d:train:1", "b")]);
        held.learn_from(&teacher);
        held.learn_from_unknown("ab12");
        let mut student = Lineage::default();
        student.train([("d:train:1", "b")]);
        student.select_by(&held);
        assert_eq!(student.counts(), (1, 2));
        let rows = [("d:train:0", "a"), ("d:train:1", "b"), ("d:test:0", "t")];
        let found = student.overlap(gold(&rows));
        assert_eq!(found.selected, ["d:train:0"]);
        assert_eq!(found.trained, ["d:train:1"]);
        assert_eq!(found.taught, ["d:test:0"]);
        assert!(found.unknown_teacher);
    }

    #[test]
    fn its_rows_are_counted_by_set() {
        let mut lineage = Lineage::default();
        lineage.train([("d:train:0", "a"), ("d:train:1", "b"), ("odd", "c")]);
        lineage.select([("d:test:7", "d"), ("d:train:1", "b")]);
        let parts = |trained, selected| Parts {
            trained,
            selected,
            taught: 0,
        };
        let expected = [
            ("", parts(1, 0)),
            ("d:test", parts(0, 1)),
            ("d:train", parts(2, 1)),
        ];
        assert_eq!(lineage.sets(), BTreeMap::from(expected));
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
