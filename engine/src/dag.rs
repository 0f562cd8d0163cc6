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
    /// The graph of a pipeline.
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
}

/// The steps that `step` takes data from or waits for.
#[must_use]
pub fn predecessors(step: &StepNode) -> BTreeSet<String> {
    let foreach = step
        .foreach
        .iter()
        .flat_map(|f| f.vars.values())
        .flat_map(|list| match list {
            ForeachList::Artifacts(sources) => sources.as_slice(),
            ForeachList::Values(_) => &[],
        });
    let named = step
        .inputs
        .values()
        .flatten()
        .chain(foreach)
        .filter_map(|source| match source {
            Source::Output { step, .. } => Some(step.clone()),
            Source::File(_) | Source::Item(_) => None,
        });
    named.chain(step.needs.iter().cloned()).collect()
}
