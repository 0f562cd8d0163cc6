//! [`Ready`]: the items that wait for room, oldest first.
//!
//! Items that ask for the same stand in one line. When the first of a line finds no room, neither
//! would the others, so they are not asked: a hundred thousand items behind a pool of one place
//! cost whoever ends no more than one does.

use std::collections::{BTreeMap, VecDeque};

use crate::pipeline::StepNode;

/// A step and one of its items.
type Place = (usize, usize);

/// What decides whether an item may run now.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Demand {
    cpu: u64,
    gpu: u64,
    memory: u64,
    pool: Option<String>,
    runner: Option<String>,
    /// The step, where it bounds how many of its items run together.
    alone: Option<usize>,
}

/// The items that wait for room.
#[derive(Debug, Default)]
pub(super) struct Ready {
    lines: Vec<VecDeque<(u64, Place)>>,
    by_demand: BTreeMap<Demand, usize>,
    /// The line of each step that had an item here.
    by_step: BTreeMap<usize, usize>,
    /// The number of the first item of each line that is not empty, to the line.
    heads: BTreeMap<u64, usize>,
    next: u64,
}

impl Ready {
    /// An item waits from now on.
    pub(super) fn push(&mut self, place: Place, node: &StepNode) {
        let line = match self.by_step.get(&place.0) {
            Some(line) => *line,
            None => {
                let empty = self.lines.len();
                let line = *self.by_demand.entry(demand(node, place.0)).or_insert(empty);
                if line == empty {
                    self.lines.push(VecDeque::new());
                }
                self.by_step.insert(place.0, line);
                line
            }
        };
        let number = self.next;
        self.next += 1;
        if self.lines[line].is_empty() {
            self.heads.insert(number, line);
        }
        self.lines[line].push_back((number, place));
    }

    /// The first of the lines whose first items have this number or a later one.
    pub(super) fn head(&self, from: u64) -> Option<(u64, Place)> {
        let (number, line) = self.heads.range(from..).next()?;
        let (_, place) = self.lines[*line].front()?;
        Some((*number, *place))
    }

    /// Takes the first item away of the line that begins with this number.
    pub(super) fn pop(&mut self, head: u64) -> Option<Place> {
        self.take(head, |_| true)
    }

    /// Takes the first item away that is wanted, of the line that begins with this number.
    pub(super) fn take(&mut self, head: u64, wanted: impl Fn(Place) -> bool) -> Option<Place> {
        let line = *self.heads.get(&head)?;
        let items = &mut self.lines[line];
        let at = items.iter().position(|(_, place)| wanted(*place))?;
        let (_, place) = items.remove(at)?;
        if at == 0 {
            self.heads.remove(&head);
            if let Some((number, _)) = items.front() {
                self.heads.insert(*number, line);
            }
        }
        Some(place)
    }
}

fn demand(node: &StepNode, step: usize) -> Demand {
    let levels = node.foreach.iter().flat_map(|foreach| &foreach.levels);
    let bounded = levels.into_iter().any(|level| level.max_parallel.is_some());
    Demand {
        cpu: node.resources.cpu.to_bits(),
        gpu: node.resources.gpu.to_bits(),
        memory: node.resources.memory,
        pool: node.pool.clone(),
        runner: node.runner.job().map(ToString::to_string),
        alone: bounded.then_some(step),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::node;

    #[test]
    fn lines_are_asked_by_the_age_of_their_first_items() {
        let mut ready = Ready::default();
        let (free, mut pooled) = (node("free"), node("pooled"));
        pooled.pool = Some("p".into());
        for item in 0..3 {
            ready.push((1, item), &pooled);
            ready.push((0, item), &free);
            ready.push((2, item), &free);
        }
        // The pool is full: its line is left alone.
        let (number, place) = ready.head(0).unwrap_or_default();
        assert_eq!(place, (1, 0));
        let mut order = Vec::new();
        while let Some((head, _)) = ready.head(number + 1) {
            order.extend(ready.pop(head));
        }
        assert_eq!(order, [(0, 0), (2, 0), (0, 1), (2, 1), (0, 2), (2, 2)]);
        assert_eq!(ready.take(number, |(_, item)| item == 1), Some((1, 1)));
        assert_eq!(ready.take(number, |(_, item)| item == 1), None);
        assert_eq!(ready.pop(number), Some((1, 0)));
        let (last, place) = ready.head(0).unwrap_or_default();
        assert_eq!(place, (1, 2));
        ready.pop(last);
        assert_eq!(ready.head(0), None);
        ready.push((1, 7), &pooled);
        assert_eq!(ready.head(0).map(|(_, place)| place), Some((1, 7)));
    }
}
