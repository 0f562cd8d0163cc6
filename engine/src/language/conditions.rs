//! Which items of a step are left out because a step before it, which walks the same items, leaves
//! them out. Knows conditions as text alone.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::expansion::{asks_for_item, names_one_of};
use crate::pipeline::{Foreach, ForeachList, Source, StepNode};

/// What decides which items a step leaves out.
struct LeftOut {
    conditions: Vec<String>,
    /// The variables that the conditions may name, besides those that are walked.
    bound: Vec<(String, Value)>,
}

/// Gives each step of a walked definition the conditions of the steps that it reads, with what they
/// need to be asked elsewhere. `steps` are in order.
pub(crate) fn hand_on(steps: &mut [StepNode]) {
    let mut known: BTreeMap<String, LeftOut> = BTreeMap::new();
    for step in steps {
        let Some(foreach) = step.foreach.as_ref().filter(|f| f.walker.is_some()) else {
            continue;
        };
        let mut conditions = foreach.conditions.clone();
        let mut handed: Vec<(String, Value)> = Vec::new();
        for before in required_siblings(step, foreach) {
            let Some(before) = known.get(before) else {
                continue;
            };
            let count = conditions.len();
            for condition in &before.conditions {
                if !conditions.contains(condition) {
                    conditions.push(condition.clone());
                }
            }
            if conditions.len() == count {
                continue;
            }
            for variable in &before.bound {
                let mut there = foreach.bound.iter().chain(&handed);
                if !there.any(|(name, _)| *name == variable.0) {
                    handed.push(variable.clone());
                }
            }
        }
        // What only some of its own items lack is no reason to leave out the item around them.
        let own = step.when.as_ref();
        let own = own.filter(|when| asks_for_item(when) && !names_one_of(when, &foreach.inner));
        let own = own.filter(|own| !conditions.contains(own));
        let all: Vec<String> = conditions.iter().chain(own).cloned().collect();
        if !all.is_empty() {
            let left_out = LeftOut {
                conditions: all,
                bound: foreach.bound.iter().chain(&handed).cloned().collect(),
            };
            known.insert(step.name.clone(), left_out);
        }
        if let Some(foreach) = &mut step.foreach {
            foreach.conditions = conditions;
            foreach.handed = handed;
        }
    }
}

/// The steps of the same walker whose outputs a step reads or walks, and cannot do without.
fn required_siblings<'a>(
    step: &'a StepNode,
    foreach: &'a Foreach,
) -> impl Iterator<Item = &'a String> {
    let ports = step.inputs.iter();
    let ports = ports.filter(move |(port, _)| !step.may_lack(port));
    let read = ports.flat_map(|(_, sources)| sources);
    let walked = foreach.inner.values().flat_map(|list| match list {
        ForeachList::Artifacts(sources) => sources.as_slice(),
        ForeachList::Values(_) => &[],
    });
    read.chain(walked).filter_map(|source| match source {
        Source::Sibling { step, .. } => Some(step),
        _ => None,
    })
}
