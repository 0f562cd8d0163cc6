//! [`Together`]: whether one more item of a step's fan-out may run beside those that do.
//!
//! Each level bounds its own items, of one item of the level around: an item runs while any of the
//! items within it does.

use std::collections::BTreeMap;

use crate::pipeline::{Level, StepNode};

/// The items of one step that run now.
#[derive(Debug, Default)]
pub(super) struct Together {
    running: usize,
    /// Of a step with several levels, for each that is bounded: the level and an item of the one
    /// around, to the items within it that run, and how many actions of each.
    within: BTreeMap<(usize, String), BTreeMap<String, usize>>,
}

impl Together {
    /// The item of this label may run too.
    pub(super) fn admits(&self, node: &StepNode, label: Option<&str>) -> bool {
        let levels = levels(node);
        if let [level] = levels {
            return level
                .max_parallel
                .is_none_or(|max| self.running < max.max(1));
        }
        bounded(levels, label).iter().all(|place| {
            let beside = self.within.get(&(place.level, place.around.to_owned()));
            beside.is_none_or(|items| {
                items.contains_key(place.item) || items.len() < place.most.max(1)
            })
        })
    }

    /// An attempt at an item begins.
    pub(super) fn add(&mut self, node: &StepNode, label: Option<&str>) {
        self.running += 1;
        for place in bounded(levels(node), label) {
            let around = (place.level, place.around.to_owned());
            let beside = self.within.entry(around).or_default();
            *beside.entry(place.item.to_owned()).or_default() += 1;
        }
    }

    /// It ended.
    pub(super) fn remove(&mut self, node: &StepNode, label: Option<&str>) {
        self.running = self.running.saturating_sub(1);
        for place in bounded(levels(node), label) {
            let around = (place.level, place.around.to_owned());
            let Some(beside) = self.within.get_mut(&around) else {
                continue;
            };
            if let Some(actions) = beside.get_mut(place.item) {
                *actions -= 1;
                if *actions == 0 {
                    beside.remove(place.item);
                }
            }
            if beside.is_empty() {
                self.within.remove(&around);
            }
        }
    }
}

/// The most items of a step that run at the same time, as far as its levels bound them.
pub(super) fn most_together(node: &StepNode) -> usize {
    let most = levels(node)
        .iter()
        .map(|level| level.max_parallel.map_or(usize::MAX, |most| most.max(1)));
    most.fold(1, usize::saturating_mul)
}

fn levels(node: &StepNode) -> &[Level] {
    match &node.foreach {
        Some(foreach) => &foreach.levels,
        None => &[],
    }
}

/// An item of a level that is bounded.
struct Place<'a> {
    level: usize,
    /// The labels of the item around.
    around: &'a str,
    /// Its own, after them.
    item: &'a str,
    most: usize,
}

/// The places that an action takes by its label; none where there is one level alone.
fn bounded<'a>(levels: &'a [Level], label: Option<&'a str>) -> Vec<Place<'a>> {
    let Some(label) = label.filter(|_| levels.len() > 1) else {
        return Vec::new();
    };
    let mut places = Vec::with_capacity(levels.len());
    let mut around = "";
    let ends = label.match_indices('/').map(|(at, _)| at);
    for (number, (level, end)) in levels.iter().zip(ends.chain([label.len()])).enumerate() {
        let item = &label[..end];
        if let Some(most) = level.max_parallel {
            places.push(Place {
                level: number,
                around,
                item,
                most,
            });
        }
        around = item;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Foreach;
    use crate::testing::node;

    fn step(most: &[Option<usize>]) -> StepNode {
        let level = |max_parallel: &Option<usize>| Level {
            max_parallel: *max_parallel,
            ..Level::default()
        };
        let mut step = node("s");
        step.foreach = Some(Foreach {
            levels: most.iter().map(level).collect(),
        });
        step
    }

    #[test]
    fn each_level_bounds_its_own_items() {
        let step = step(&[Some(2), Some(1)]);
        let mut together = Together::default();
        let admits = |together: &Together, label| together.admits(&step, Some(label));
        together.add(&step, Some("a/1"));
        assert!(!admits(&together, "a/2"), "one within each");
        assert!(admits(&together, "b/1"));
        together.add(&step, Some("b/2"));
        assert!(!admits(&together, "c/1"), "two around");
        together.remove(&step, Some("a/1"));
        assert!(admits(&together, "a/2") && admits(&together, "c/1"));
        assert!(!admits(&together, "b/1"));
        together.remove(&step, Some("b/2"));
        assert!(together.within.is_empty() && together.running == 0);
    }

    #[test]
    fn an_item_runs_while_one_within_it_does() {
        let step = step(&[Some(1), None]);
        let mut together = Together::default();
        together.add(&step, Some("/1"));
        together.add(&step, Some("/2"));
        assert!(together.admits(&step, Some("/3")) && !together.admits(&step, Some("b/1")));
        together.remove(&step, Some("/1"));
        assert!(!together.admits(&step, Some("b/1")));
        together.remove(&step, Some("/2"));
        assert!(together.admits(&step, Some("b/1")));
    }

    #[test]
    fn levels_bound_together_what_runs_at_once() {
        for (levels, most) in [
            (vec![Some(0)], 1),
            (vec![Some(3)], 3),
            (vec![None], usize::MAX),
            (vec![Some(2), Some(3)], 6),
            (vec![Some(2), None], usize::MAX),
        ] {
            assert_eq!(most_together(&step(&levels)), most, "{levels:?}");
        }
        assert_eq!(most_together(&node("s")), 1);
    }

    #[test]
    fn a_single_level_counts_what_runs() {
        let bounded = step(&[Some(2)]);
        let mut together = Together::default();
        together.add(&bounded, Some("a/b"));
        assert!(together.admits(&bounded, Some("a")));
        together.add(&bounded, Some("a"));
        assert!(!together.admits(&bounded, Some("c")));
        assert!(together.admits(&step(&[None]), Some("c")));
        assert!(together.admits(&node("s"), None), "no fan-out");
    }
}
