//! [`gather`]: the outputs of all items of a step, as the steps after it see them.

use std::collections::BTreeMap;

use flowrun_cache::{ListItem, OutputRecord, OutputValue};

use crate::pipeline::StepNode;

/// The outputs of a fan-out: a list for each port, in the order of the items.
/// An item's own list is put in its place, labels joined by `/`.
pub(crate) fn gather(
    node: &StepNode,
    ends: &[(Option<&str>, &BTreeMap<String, OutputRecord>)],
) -> BTreeMap<String, OutputRecord> {
    let port = |name: &str, ty: &str| {
        let mut list = Vec::new();
        for (label, outputs) in ends {
            let label = label.unwrap_or_default();
            match outputs.get(name).map(|o| &o.value) {
                Some(OutputValue::One(artifact)) => list.push(ListItem {
                    label: label.to_owned(),
                    artifact: artifact.clone(),
                }),
                Some(OutputValue::List(inner)) => list.extend(inner.iter().map(|i| ListItem {
                    label: format!("{label}/{}", i.label),
                    artifact: i.artifact.clone(),
                })),
                None => {}
            }
        }
        OutputRecord {
            ty: ty.to_owned(),
            value: OutputValue::List(list),
        }
    };
    let ports = node.outputs.iter();
    ports
        .map(|p| (p.name.clone(), port(&p.name, &p.ty)))
        .collect()
}
