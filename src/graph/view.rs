//! [`GraphView`]: what a drawing shows of a pipeline.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use flowrun_engine::dag::predecessors;
use flowrun_engine::event::StepStatus;
use flowrun_engine::pipeline::{Action, Pipeline};
use flowrun_engine::record::RunRecord;
use serde::Serialize;

use crate::reporter::status_word;

/// What a drawing shows.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct GraphView {
    /// Pipeline name.
    pub(crate) name: String,
    /// Steps in topological order.
    pub(crate) nodes: Vec<NodeView>,
}

/// One step in a drawing, or several alike.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct NodeView {
    /// Step name; of several, the first and the last.
    pub(crate) name: String,
    /// Step kind.
    pub(crate) kind: String,
    /// One sentence for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) about: Option<String>,
    /// It fans out.
    pub(crate) foreach: bool,
    /// Its row: the longest way to it.
    pub(crate) layer: usize,
    /// Names of the nodes it needs.
    pub(crate) needs: Vec<String>,
    /// How it ended in the last run; of several items, the worst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<StepStatus>,
    /// Its items in the last run, by how they ended.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) items: BTreeMap<&'static str, usize>,
    /// Of a node that stands for several steps: how many.
    #[serde(skip)]
    pub(crate) steps: usize,
    /// Of a node that stands for several steps: how many kinds they are of.
    #[serde(skip)]
    pub(crate) kinds: usize,
}

impl GraphView {
    /// The view of a pipeline.
    pub(crate) fn of(pipeline: &Pipeline) -> Self {
        let nodes = pipeline.steps.iter().map(|step| NodeView {
            name: step.name.clone(),
            kind: match &step.action {
                Action::Uses(kind) => kind.kind().to_owned(),
                Action::Run(_) => "run".to_owned(),
            },
            about: step.about.clone(),
            foreach: step.foreach.is_some(),
            needs: predecessors(step).into_iter().collect(),
            steps: 1,
            ..NodeView::default()
        });
        let mut view = Self {
            name: pipeline.name.clone(),
            nodes: nodes.collect(),
        };
        view.find_layers();
        view
    }

    /// Gives each node its layer. Nodes are in topological order.
    pub(crate) fn find_layers(&mut self) {
        let mut layers: HashMap<String, usize> = HashMap::with_capacity(self.nodes.len());
        for node in &mut self.nodes {
            let above = node.needs.iter().filter_map(|n| layers.get(n)).max();
            node.layer = above.map_or(0, |layer| layer + 1);
            layers.insert(node.name.clone(), node.layer);
        }
    }

    /// For each node, the places of those it needs.
    pub(crate) fn edges(&self) -> Vec<Vec<usize>> {
        let nodes = self.nodes.iter().enumerate();
        let places: HashMap<&str, usize> = nodes.map(|(i, n)| (n.name.as_str(), i)).collect();
        let needs = |node: &NodeView| {
            let needs = node.needs.iter();
            needs
                .filter_map(|n| places.get(n.as_str()).copied())
                .collect()
        };
        self.nodes.iter().map(needs).collect()
    }

    /// Leaves out the edges that a longer way implies.
    pub(crate) fn drop_implied(&mut self) {
        let edges = self.edges();
        let mut before: Vec<BTreeSet<usize>> = Vec::with_capacity(edges.len());
        for needs in &edges {
            let mut all: BTreeSet<usize> = needs.iter().copied().collect();
            needs.iter().for_each(|n| all.extend(&before[*n]));
            before.push(all);
        }
        for (node, needs) in self.nodes.iter_mut().zip(&edges) {
            let implied = |n: usize| needs.iter().any(|m| before[*m].contains(&n));
            let kept = needs.iter().filter(|n| !implied(**n));
            let kept: BTreeSet<usize> = kept.copied().collect();
            let mut place = needs.iter();
            node.needs
                .retain(|_| place.next().is_some_and(|n| kept.contains(n)));
        }
    }

    /// Marks each step with how its items ended.
    pub(crate) fn add_status(&mut self, record: &RunRecord) {
        let mut ends: HashMap<&str, Vec<StepStatus>> = HashMap::new();
        for step in &record.steps {
            let name = step.step.split('[').next().unwrap_or_default();
            ends.entry(name).or_default().push(step.status);
        }
        for node in &mut self.nodes {
            for status in ends.get(node.name.as_str()).into_iter().flatten() {
                *node.items.entry(status_word(*status)).or_default() += 1;
                node.status = worst(node.status, Some(*status));
            }
        }
    }
}

/// The worse of two ends.
pub(crate) fn worst(a: Option<StepStatus>, b: Option<StepStatus>) -> Option<StepStatus> {
    let rank = |status: &Option<StepStatus>| match status {
        Some(StepStatus::Failed) => 4,
        Some(StepStatus::Skipped) => 3,
        Some(StepStatus::Ran) => 2,
        Some(StepStatus::Cached) => 1,
        None => 0,
    };
    if rank(&b) > rank(&a) { b } else { a }
}

impl NodeView {
    /// The second line: its kind, how many it stands for, how its items ended.
    pub(crate) fn caption(&self) -> String {
        let steps = thousands(self.steps);
        let mut text = match (self.steps > 1, self.kinds > 1) {
            (true, true) => format!("{steps} steps of {} kinds", self.kinds),
            (true, false) => format!("{} × {steps} steps", self.kind),
            _ => self.kind.clone(),
        };
        let several = self.items.values().sum::<usize>() > 1;
        match (several, self.foreach && self.steps == 1) {
            (true, _) => {
                let parts = self.items.iter();
                let parts: Vec<String> = parts
                    .map(|(word, n)| format!("{} {word}", thousands(*n)))
                    .collect();
                text.push_str(&format!(" · {}", parts.join(", ")));
            }
            (false, true) => text.push_str(" × each"),
            (false, false) => {}
        }
        text
    }
}

/// `12,345`
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn node(name: &str, needs: &[&str]) -> NodeView {
        NodeView {
            name: name.into(),
            kind: "run".into(),
            needs: needs.iter().map(|n| (*n).to_owned()).collect(),
            steps: 1,
            ..NodeView::default()
        }
    }

    pub(crate) fn view(nodes: Vec<NodeView>) -> GraphView {
        let mut view = GraphView {
            name: "sample".into(),
            nodes,
        };
        view.find_layers();
        view
    }

    #[test]
    fn a_caption_says_what_is_known() {
        let mut node = node("a", &[]);
        node.foreach = true;
        assert_eq!(node.caption(), "run × each");
        node.items = BTreeMap::from([("cached", 1_200), ("failed", 2)]);
        assert_eq!(node.caption(), "run · 1,200 cached, 2 failed");
        node.steps = 12_345;
        assert_eq!(
            node.caption(),
            "run × 12,345 steps · 1,200 cached, 2 failed"
        );
    }

    #[test]
    fn only_edges_that_others_imply_are_dropped() {
        let mut view = view(vec![
            node("a", &[]),
            node("b", &["a"]),
            node("c", &["a", "b"]),
            node("d", &["a", "c", "nowhere"]),
        ]);
        view.drop_implied();
        let needs: Vec<_> = view.nodes.iter().map(|n| n.needs.join(" ")).collect();
        assert_eq!(needs[..3], ["", "a", "b"]);
        assert_eq!(view.edges(), [vec![], vec![0], vec![1], vec![2]]);
    }
}
