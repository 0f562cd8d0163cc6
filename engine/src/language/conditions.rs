//! Which items of a step are left out because a step before it, which walks the same items, leaves
//! them out. Knows conditions as text alone.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::expansion::{asks_for_item, level_of};
use crate::pipeline::{Foreach, ForeachList, Level, Source, StepNode};

/// What decides which items of a level a step leaves out.
#[derive(Default)]
struct LeftOut {
    conditions: Vec<String>,
    /// The variables that the conditions may name, besides those that are walked.
    bound: Vec<(String, Value)>,
}

/// Gives each step of a walked definition the conditions of the steps that it reads, with what they
/// need to be asked elsewhere. `steps` are in order.
pub(crate) fn hand_on(steps: &mut [StepNode]) {
    // Of each step, by level.
    let mut known: BTreeMap<String, Vec<LeftOut>> = BTreeMap::new();
    for step in steps {
        let Some(foreach) = step.foreach.as_ref().filter(|f| f.is_walked()) else {
            continue;
        };
        let before: Vec<(&[LeftOut], usize)> = required_siblings(step, foreach)
            .filter_map(|(before, shared)| Some((known.get(before)?.as_slice(), shared)))
            .collect();
        let levels = foreach.levels.iter().enumerate();
        let taken: Vec<Taken> = levels
            .map(|(at, level)| {
                // What only some of the items within lack is no reason to leave out the one around.
                let there = before.iter().filter(|(_, shared)| at < *shared);
                Taken::by(level, there.filter_map(|(levels, _)| levels.get(at)))
            })
            .collect();
        let own = step.when.as_ref().filter(|when| asks_for_item(when));
        let own = own.map(|when| (level_of(when, &foreach.levels), when));
        let left_out: Vec<LeftOut> = foreach
            .levels
            .iter()
            .zip(&taken)
            .enumerate()
            .map(|(at, (level, taken))| {
                let own =
                    own.filter(|(place, when)| *place == at && !taken.conditions.contains(when));
                let own = own.map(|(_, when)| when);
                LeftOut {
                    conditions: taken.conditions.iter().chain(own).cloned().collect(),
                    bound: level.bound.iter().chain(&taken.handed).cloned().collect(),
                }
            })
            .collect();
        if left_out.iter().any(|level| !level.conditions.is_empty()) {
            known.insert(step.name.clone(), left_out);
        }
        let levels = step.foreach.iter_mut().flat_map(|f| &mut f.levels);
        for (level, taken) in levels.zip(taken) {
            level.conditions = taken.conditions;
            level.handed = taken.handed;
        }
    }
}

/// The conditions of a level, with those that it takes over.
struct Taken {
    conditions: Vec<String>,
    handed: Vec<(String, Value)>,
}

impl Taken {
    fn by<'a>(level: &Level, before: impl Iterator<Item = &'a LeftOut>) -> Self {
        let mut conditions = level.conditions.clone();
        let mut handed: Vec<(String, Value)> = Vec::new();
        for before in before {
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
                let mut there = level.bound.iter().chain(&handed);
                if !there.any(|(name, _)| *name == variable.0) {
                    handed.push(variable.clone());
                }
            }
        }
        Self { conditions, handed }
    }
}

/// The steps of the same walkers whose outputs a step reads or walks, and cannot do without; and how
/// many levels of items they share with it.
fn required_siblings<'a>(
    step: &'a StepNode,
    foreach: &'a Foreach,
) -> impl Iterator<Item = (&'a String, usize)> {
    let ports = step.inputs.iter();
    let ports = ports.filter(move |(port, _)| !step.may_lack(port));
    let read = ports.flat_map(|(_, sources)| sources);
    let walked = foreach.lists().flat_map(|list| match list {
        ForeachList::Artifacts(sources) => sources.as_slice(),
        ForeachList::Values(_) | ForeachList::PerItem(_) => &[],
    });
    read.chain(walked).filter_map(|source| match source {
        Source::Sibling { step, levels, .. } => Some((step, *levels)),
        _ => None,
    })
}
