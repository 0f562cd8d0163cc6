//! The order of steps: topological, ties in file order; and the circles that make
//! it impossible. Knows steps only by number.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;

use super::source_map::Span;

/// What a step waits for, and where it says so.
pub(crate) type Dependencies = DiGraph<(), Span>;

/// A circle of steps.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Circle {
    /// The steps along it; the first comes first in the file.
    pub(crate) steps: Vec<usize>,
    /// Where the first step names the last.
    pub(crate) span: Span,
}

/// A graph of `count` steps; add an edge from a step to each that waits for it.
pub(crate) fn graph(count: usize) -> Dependencies {
    let mut graph = DiGraph::with_capacity(count, count * 2);
    for _ in 0..count {
        graph.add_node(());
    }
    graph
}

/// The steps in order.
///
/// # Errors
/// One circle for each group of steps that wait for each other.
pub(crate) fn order(graph: &Dependencies) -> Result<Vec<usize>, Vec<Circle>> {
    let mut waits: Vec<usize> = vec![0; graph.node_count()];
    for edge in graph.edge_references() {
        waits[edge.target().index()] += 1;
    }
    let ready = (0..waits.len()).filter(|i| waits[*i] == 0).map(Reverse);
    let mut ready: BinaryHeap<Reverse<usize>> = ready.collect();
    let mut order = Vec::with_capacity(waits.len());
    while let Some(Reverse(step)) = ready.pop() {
        order.push(step);
        for next in graph.edges(NodeIndex::new(step)) {
            let next = next.target().index();
            waits[next] -= 1;
            if waits[next] == 0 {
                ready.push(Reverse(next));
            }
        }
    }
    if order.len() == graph.node_count() {
        Ok(order)
    } else {
        Err(circles(graph))
    }
}

fn circles(graph: &Dependencies) -> Vec<Circle> {
    let mut found: Vec<Circle> = kosaraju_scc(graph)
        .into_iter()
        .filter_map(|group| {
            let start = *group.iter().min()?;
            circle(graph, start, &group)
        })
        .collect();
    found.sort_by_key(|c| c.steps.first().copied());
    found
}

/// The shortest way within `group` from `start` back to it.
fn circle(graph: &Dependencies, start: NodeIndex, group: &[NodeIndex]) -> Option<Circle> {
    let members: std::collections::HashSet<NodeIndex> = group.iter().copied().collect();
    let mut came_from: HashMap<NodeIndex, NodeIndex> = HashMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for edge in graph.edges(node) {
            let next = edge.target();
            if next == start {
                let mut steps = vec![node.index()];
                let mut at = node;
                while let Some(before) = came_from.get(&at) {
                    steps.push(before.index());
                    at = *before;
                }
                steps.reverse();
                return Some(Circle {
                    steps,
                    span: *edge.weight(),
                });
            }
            if members.contains(&next) && !came_from.contains_key(&next) {
                came_from.insert(next, node);
                queue.push_back(next);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(count: usize, edges: &[(usize, usize)]) -> Result<Vec<usize>, Vec<Vec<usize>>> {
        let mut graph = graph(count);
        for (from, to) in edges {
            graph.add_edge(NodeIndex::new(*from), NodeIndex::new(*to), Span::default());
        }
        order(&graph).map_err(|circles| circles.into_iter().map(|c| c.steps).collect())
    }

    #[test]
    fn ties_keep_the_order_of_the_file() {
        assert_eq!(of(4, &[(3, 0)]), Ok(vec![1, 2, 3, 0]));
        assert_eq!(of(4, &[(0, 2), (0, 2), (1, 3)]), Ok(vec![0, 1, 2, 3]));
        assert_eq!(of(0, &[]), Ok(vec![]));
    }

    #[test]
    fn each_circle_is_told_once() {
        assert_eq!(of(2, &[(1, 1)]), Err(vec![vec![1]]));
        let edges = [(0, 1), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3), (4, 5)];
        assert_eq!(of(6, &edges), Err(vec![vec![0, 1, 2], vec![3, 4]]));
    }
}
