//! [`Dag`]: which step needs which, as a petgraph graph.
//!
//! Knows names only; its invariant: it has no cycle, because a pipeline with
//! one does not pass the checks.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};

use crate::pipeline::{ForeachList, Pipeline, Source, StepNode};

/// Steps and the edges between them.
#[derive(Debug, Clone)]
pub struct Dag {
    graph: DiGraph<String, ()>,
    nodes: BTreeMap<String, NodeIndex>,
}

impl Dag {
    /// The graph of a pipeline. A name that no step has makes no edge.
    #[must_use]
    pub fn of(pipeline: &Pipeline) -> Self {
        let mut graph = DiGraph::new();
        let nodes: BTreeMap<String, NodeIndex> = pipeline
            .steps
            .iter()
            .map(|step| (step.name.clone(), graph.add_node(step.name.clone())))
            .collect();
        for step in &pipeline.steps {
            for before in predecessors(step) {
                if let Some(&from) = nodes.get(&before) {
                    graph.add_edge(from, nodes[&step.name], ());
                }
            }
        }
        Self { graph, nodes }
    }

    /// The petgraph graph: nodes are step names in the pipeline's order, an
    /// edge goes from a step to one that needs it.
    #[must_use]
    pub fn graph(&self) -> &DiGraph<String, ()> {
        &self.graph
    }

    /// The steps that must finish before `step` starts, by name.
    #[must_use]
    pub fn before(&self, step: &str) -> BTreeSet<String> {
        self.near(step, Direction::Incoming)
    }

    /// The steps that need `step`, by name.
    #[must_use]
    pub fn after(&self, step: &str) -> BTreeSet<String> {
        self.near(step, Direction::Outgoing)
    }

    fn near(&self, step: &str, direction: Direction) -> BTreeSet<String> {
        let Some(&node) = self.nodes.get(step) else {
            return BTreeSet::new();
        };
        self.graph
            .neighbors_directed(node, direction)
            .map(|n| self.graph[n].clone())
            .collect()
    }

    /// `step` and everything that depends on it.
    #[must_use]
    pub fn cone(&self, step: &str) -> BTreeSet<String> {
        self.reach(step, Direction::Outgoing)
    }

    /// `step` and everything it depends on.
    #[must_use]
    pub fn needed_for(&self, step: &str) -> BTreeSet<String> {
        self.reach(step, Direction::Incoming)
    }

    fn reach(&self, step: &str, direction: Direction) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut next: Vec<NodeIndex> = self.nodes.get(step).copied().into_iter().collect();
        while let Some(node) = next.pop() {
            if found.insert(self.graph[node].clone()) {
                next.extend(self.graph.neighbors_directed(node, direction));
            }
        }
        found
    }

    /// Steps by depth: a step lies one layer below the deepest step it needs.
    /// Steps of one layer could all run at once.
    #[must_use]
    pub fn layers(&self) -> Vec<Vec<String>> {
        let Ok(order) = petgraph::algo::toposort(&self.graph, None) else {
            return Vec::new();
        };
        let mut depth: BTreeMap<NodeIndex, usize> = BTreeMap::new();
        for node in order {
            let above = self
                .graph
                .neighbors_directed(node, Direction::Incoming)
                .filter_map(|n| depth.get(&n))
                .max();
            let own = above.map_or(0, |d| d + 1);
            depth.insert(node, own);
        }
        let mut layers = vec![Vec::new(); depth.values().max().map_or(0, |d| d + 1)];
        // Node indexes are in the pipeline's order.
        for (node, depth) in depth {
            layers[depth].push(self.graph[node].clone());
        }
        layers
    }
}

/// The steps that `step` takes data from or waits for.
#[must_use]
pub fn predecessors(step: &StepNode) -> BTreeSet<String> {
    let mut all = data_predecessors(step);
    all.extend(step.needs.iter().cloned());
    all
}

/// The steps that `step` takes data from.
#[must_use]
pub fn data_predecessors(step: &StepNode) -> BTreeSet<String> {
    let foreach = step
        .foreach
        .iter()
        .flat_map(|f| f.lists())
        .flat_map(|list| match list {
            ForeachList::Artifacts(sources) => sources.as_slice(),
            ForeachList::Values(_) | ForeachList::PerItem(_) => &[],
        });
    step.inputs
        .values()
        .flatten()
        .chain(foreach)
        .filter_map(|source| match source {
            Source::Output { step, .. } | Source::Sibling { step, .. } => Some(step.clone()),
            Source::File(_) | Source::Item(_) => None,
        })
        .collect()
}

/// The steps that `step` takes data from and cannot do without: when one of them is skipped,
/// so is `step`. What only an optional port reads may be missing.
#[must_use]
pub fn required_predecessors(step: &StepNode) -> BTreeSet<String> {
    let mut required = step.clone();
    required.inputs.retain(|port, _| !step.may_lack(port));
    data_predecessors(&required)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{node, pipeline};

    /// Steps `s0..sn`; each needs only earlier ones.
    fn random_pipeline(masks: &[u16]) -> Pipeline {
        let step = |(i, mask): (usize, &u16)| {
            let mut step = node(&format!("s{i}"));
            for before in (0..i).filter(|b| mask >> b & 1 == 1) {
                if before % 2 == 0 {
                    step.needs.push(format!("s{before}"));
                } else {
                    let source = Source::Output {
                        step: format!("s{before}"),
                        output: "out".into(),
                    };
                    step.inputs.entry("parts".into()).or_default().push(source);
                }
            }
            step
        };
        pipeline(masks.iter().enumerate().map(step).collect())
    }

    proptest! {
        #[test]
        fn layers_hold_every_step_once_and_respect_every_edge(masks in proptest::collection::vec(any::<u16>(), 1..14)) {
            let pipeline = random_pipeline(&masks);
            let dag = Dag::of(&pipeline);
            let layers = dag.layers();
            let depth: BTreeMap<&String, usize> = layers
                .iter()
                .enumerate()
                .flat_map(|(d, steps)| steps.iter().map(move |s| (s, d)))
                .collect();
            prop_assert_eq!(depth.len(), pipeline.steps.len());
            prop_assert_eq!(layers.iter().map(Vec::len).sum::<usize>(), pipeline.steps.len());
            for step in &pipeline.steps {
                let before = predecessors(step);
                for b in &before {
                    prop_assert!(depth[b] < depth[&step.name]);
                }
                let deepest = before.iter().map(|b| depth[b] + 1).max().unwrap_or(0);
                prop_assert_eq!(depth[&step.name], deepest);
            }
        }

        #[test]
        fn a_step_is_in_the_cone_of_exactly_what_it_needs(masks in proptest::collection::vec(any::<u16>(), 1..14)) {
            let pipeline = random_pipeline(&masks);
            let dag = Dag::of(&pipeline);
            for a in &pipeline.steps {
                let cone = dag.cone(&a.name);
                prop_assert!(cone.contains(&a.name));
                for b in &pipeline.steps {
                    let needed = dag.needed_for(&b.name).contains(&a.name);
                    prop_assert_eq!(cone.contains(&b.name), needed);
                }
                for b in dag.after(&a.name) {
                    prop_assert!(dag.before(&b).contains(&a.name) && cone.contains(&b));
                }
            }
        }
    }

    #[test]
    fn a_step_that_does_not_exist_has_no_neighbours() {
        let dag = Dag::of(&pipeline(vec![node("a")]));
        assert!(dag.cone("b").is_empty() && dag.before("b").is_empty());
        assert_eq!(dag.layers(), [["a"]]);
        assert_eq!(dag.graph().node_count(), 1);
    }
}
