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

/// Outputs of the steps before a step.
pub(super) struct Made<F> {
    output: F,
    records: RefCell<BTreeMap<Port, Option<Rc<OutputRecord>>>>,
    parted: RefCell<BTreeMap<(Port, bool), Option<ByItem>>>,
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
        many: bool,
        label: &str,
    ) -> Option<Vec<(Artifact, String)>> {
        let mut parted = self.parted.borrow_mut();
        let by_item = parted
            .entry(((step.to_owned(), port.to_owned()), many))
            .or_insert_with(|| self.part(step, port, many));
        let made = by_item.as_ref()?.get(label);
        Some(made.cloned().unwrap_or_default())
    }

    /// Labels of items that are walked hold no `/`.
    fn part(&self, step: &str, port: &str, many: bool) -> Option<ByItem> {
        let record = self.record(step, port)?;
        let OutputValue::List(all) = &record.value else {
            return None;
        };
        let mut by_item = ByItem::new();
        for entry in all {
            let parts = if many {
                entry.label.split_once('/')
            } else {
                // As a step without `foreach` would see it.
                Some((entry.label.as_str(), port))
            };
            if let Some((item, within)) = parts {
                let made = by_item.entry(item.to_owned()).or_default();
                made.push((entry.artifact.clone(), within.to_owned()));
            }
        }
        Some(by_item)
    }
}
