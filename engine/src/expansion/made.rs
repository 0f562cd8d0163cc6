//! [`Made`]: what the steps before a step gave. Each output is asked for once, and parted by item
//! once, however many items read it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use flowrun_cache::{Artifact, OutputRecord, OutputValue};

/// A step and its output port.
type Port = (String, String);

/// What was made of each item, by the item's label; each artifact with its label within the item.
type ByItem = BTreeMap<String, Vec<(Artifact, String)>>;

/// How an output is parted by item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Parting {
    /// How many parts of a label are those of the item.
    pub(super) levels: usize,
    /// There may be several artifacts of one item, with labels of their own.
    pub(super) many: bool,
}

/// Outputs of the steps before a step.
pub(super) struct Made<F> {
    output: F,
    records: RefCell<BTreeMap<Port, Option<Rc<OutputRecord>>>>,
    parted: RefCell<BTreeMap<(Port, Parting), Option<ByItem>>>,
}

impl<F: Fn(&str, &str) -> Option<OutputRecord>> Made<F> {
    /// `output` gives the outputs of the steps before.
    pub(super) fn new(output: F) -> Self {
        Self {
            output,
            records: RefCell::default(),
            parted: RefCell::default(),
        }
    }

    /// An output of a step; `None` when it was not made.
    pub(super) fn record(&self, step: &str, port: &str) -> Option<Rc<OutputRecord>> {
        let mut records = self.records.borrow_mut();
        let record = records
            .entry((step.to_owned(), port.to_owned()))
            .or_insert_with(|| (self.output)(step, port).map(Rc::new));
        record.clone()
    }

    /// What a step of the same walk made of the item of this label, nothing where it left that out:
    /// see [`super::gather`]. `None` when the output is no list.
    pub(super) fn of_item(
        &self,
        step: &str,
        port: &str,
        parting: Parting,
        label: &str,
    ) -> Option<Vec<(Artifact, String)>> {
        let mut parted = self.parted.borrow_mut();
        let by_item = parted
            .entry(((step.to_owned(), port.to_owned()), parting))
            .or_insert_with(|| self.part(step, port, parting));
        let made = by_item.as_ref()?.get(label);
        Some(made.cloned().unwrap_or_default())
    }

    fn part(&self, step: &str, port: &str, parting: Parting) -> Option<ByItem> {
        let record = self.record(step, port)?;
        let OutputValue::List(all) = &record.value else {
            return None;
        };
        let mut by_item = ByItem::new();
        for entry in all {
            let (item, within) = parted(&entry.label, parting.levels);
            let within = match within {
                Some(within) if parting.many => within,
                // As a step without `foreach` would see it.
                None if !parting.many => port,
                _ => continue,
            };
            let made = by_item.entry(item.to_owned()).or_default();
            made.push((entry.artifact.clone(), within.to_owned()));
        }
        Some(by_item)
    }
}

/// The first `levels` parts of a label, and what comes after them. The labels of items that are
/// walked hold no `/`: it parts one level from the next.
pub(super) fn parted(label: &str, levels: usize) -> (&str, Option<&str>) {
    let cut = levels
        .checked_sub(1)
        .and_then(|before| label.match_indices('/').nth(before));
    match cut {
        Some((at, _)) => (&label[..at], Some(&label[at + 1..])),
        None => (label, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_parted_by_level() {
        assert_eq!(parted("a", 1), ("a", None));
        assert_eq!(parted("a/b/c", 1), ("a", Some("b/c")));
        assert_eq!(parted("a/b/c", 2), ("a/b", Some("c")));
        assert_eq!(parted("a/b/c", 3), ("a/b/c", None));
        assert_eq!(parted("", 1), ("", None));
        assert_eq!(parted("a/", 1), ("a", Some("")));
    }
}
