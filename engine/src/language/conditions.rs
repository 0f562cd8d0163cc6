//! Which items of a step are left out because a step before it, which walks the same items, leaves
//! them out. Knows conditions as text alone.

use std::collections::BTreeMap;

use crate::expansion::asks_for_item;
use crate::pipeline::{Source, StepNode};

/// Gives each step of a walked definition the conditions of the steps that it reads. `steps` are
/// in order.
pub(crate) fn hand_on(steps: &mut [StepNode]) {
    let mut known: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for step in steps {
        let mut conditions: Vec<String> = Vec::new();
        let ports = step.inputs.iter().filter(|(port, _)| !step.may_lack(port));
        for source in ports.flat_map(|(_, sources)| sources) {
            let Source::Sibling { step: before, .. } = source else {
                continue;
            };
            for condition in known.get(before).into_iter().flatten() {
                if !conditions.contains(condition) {
                    conditions.push(condition.clone());
                }
            }
        }
        let Some(foreach) = &mut step.foreach else {
            continue;
        };
        if foreach.walker.is_none() {
            continue;
        }
        foreach.conditions.clone_from(&conditions);
        // What only some of its own items lack is no reason to leave out the item around them.
        let own = step.when.clone().filter(|_| foreach.inner.is_empty());
        conditions.extend(own.filter(|when| asks_for_item(when)));
        known.insert(step.name.clone(), conditions);
    }
}
