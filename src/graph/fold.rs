//! [`fold`]: one node for many alike, until a drawing can be read.
//!
//! Tried in turn, each coarser than the one before: the steps of one use of a step definition;
//! steps with equal neighbours; steps of a layer whose names differ in numbers; the same over
//! several layers; steps of a layer of one kind; whole bands of layers. The first that makes the
//! graph small enough, and no circle, is taken.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::view::{GraphView, NodeView, worst};

/// Most nodes of a drawing that can be read.
const NODES: usize = 40;
/// Most nodes beside each other.
const ABREAST: usize = 12;
/// Bands of a graph that is very deep.
const BANDS: usize = 16;

/// The view with alike steps folded; the same when it is small enough.
pub(super) fn fold(view: &GraphView) -> GraphView {
    if is_readable(view) {
        return view.clone();
    }
    let edges = view.edges();
    let depth = view.nodes.iter().map(|n| n.layer + 1).max().unwrap_or(1);
    let band = |node: &NodeView| node.layer * BANDS / depth.max(BANDS);
    let strategies: [&dyn Fn() -> Vec<String>; 7] = [
        &|| labels(view, use_of),
        &|| twins(view, &edges),
        &|| labels(view, |n| format!("{} {}", n.layer, stem(&n.name))),
        &|| labels(view, |n| format!("{} {}", band(n), stem(&n.name))),
        &|| labels(view, |n| format!("{} {}", n.layer, n.kind)),
        &|| labels(view, |n| format!("{} {}", band(n), n.kind)),
        &|| labels(view, |n| band(n).to_string()),
    ];
    let mut best = view.clone();
    for strategy in strategies {
        let Some(folded) = merge(view, &edges, &strategy()) else {
            continue;
        };
        if folded.nodes.len() < best.nodes.len() {
            best = folded;
        }
        if is_readable(&best) {
            break;
        }
    }
    best
}

fn is_readable(view: &GraphView) -> bool {
    let mut abreast: BTreeMap<usize, usize> = BTreeMap::new();
    for node in &view.nodes {
        *abreast.entry(node.layer).or_default() += 1;
    }
    view.nodes.len() <= NODES && abreast.values().all(|n| *n <= ABREAST)
}

fn labels(view: &GraphView, label: impl Fn(&NodeView) -> String) -> Vec<String> {
    view.nodes.iter().map(label).collect()
}

/// The use of a step definition that the step belongs to, else the step itself.
fn use_of(node: &NodeView) -> String {
    match node.name.split_once('/') {
        Some((used, _)) => format!("{used}/"),
        None => node.name.clone(),
    }
}

/// The name without its numbers.
fn stem(name: &str) -> String {
    name.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// Steps of one kind with the same steps before and after them.
fn twins(view: &GraphView, edges: &[Vec<usize>]) -> Vec<String> {
    let mut after: Vec<Vec<usize>> = vec![Vec::new(); edges.len()];
    for (i, needs) in edges.iter().enumerate() {
        needs.iter().for_each(|n| after[*n].push(i));
    }
    let nodes = view.nodes.iter().enumerate();
    let of = |(i, n): (usize, &NodeView)| format!("{} {:?} {:?}", n.kind, edges[i], after[i]);
    nodes.map(of).collect()
}

/// One node for each label. None when they would need each other in a circle.
fn merge(view: &GraphView, edges: &[Vec<usize>], labels: &[String]) -> Option<GraphView> {
    let mut groups: HashMap<&str, usize> = HashMap::new();
    let mut members: Vec<Vec<usize>> = Vec::new();
    let mut group_of = Vec::with_capacity(labels.len());
    for (i, label) in labels.iter().enumerate() {
        let group = *groups.entry(label).or_insert_with(|| {
            members.push(Vec::new());
            members.len() - 1
        });
        members[group].push(i);
        group_of.push(group);
    }
    let mut needs: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); members.len()];
    for (i, before) in edges.iter().enumerate() {
        let others = before.iter().map(|b| group_of[*b]);
        needs[group_of[i]].extend(others.filter(|g| *g != group_of[i]));
    }
    let order = order(&needs)?;
    let mut nodes: Vec<NodeView> = members
        .iter()
        .map(|members| together(view, members))
        .collect();
    let names: Vec<String> = nodes.iter().map(|n| n.name.clone()).collect();
    for (node, needs) in nodes.iter_mut().zip(&needs) {
        node.needs = needs.iter().map(|g| names[*g].clone()).collect();
    }
    let mut folded = GraphView {
        name: view.name.clone(),
        nodes: order
            .into_iter()
            .map(|g| std::mem::take(&mut nodes[g]))
            .collect(),
    };
    folded.find_layers();
    Some(folded)
}

/// Groups after those they need, ties in order. None when there is a circle.
fn order(needs: &[BTreeSet<usize>]) -> Option<Vec<usize>> {
    let mut missing: Vec<usize> = needs.iter().map(BTreeSet::len).collect();
    let mut after: Vec<Vec<usize>> = vec![Vec::new(); needs.len()];
    for (group, before) in needs.iter().enumerate() {
        before.iter().for_each(|b| after[*b].push(group));
    }
    let mut ready: BTreeSet<usize> = (0..needs.len()).filter(|g| missing[*g] == 0).collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(group) = ready.pop_first() {
        order.push(group);
        for next in &after[group] {
            missing[*next] -= 1;
            if missing[*next] == 0 {
                ready.insert(*next);
            }
        }
    }
    (order.len() == needs.len()).then_some(order)
}

/// One node for several.
fn together(view: &GraphView, members: &[usize]) -> NodeView {
    let nodes = || members.iter().map(|i| &view.nodes[*i]);
    let (Some(first), Some(last)) = (nodes().next(), nodes().next_back()) else {
        return NodeView::default();
    };
    if members.len() == 1 {
        return first.clone();
    }
    let kinds: BTreeSet<&str> = nodes().map(|n| n.kind.as_str()).collect();
    let mut node = NodeView {
        name: joint_name(&first.name, &last.name, nodes().map(|n| n.name.as_str())),
        kind: first.kind.clone(),
        kinds: kinds.len(),
        foreach: nodes().any(|n| n.foreach),
        steps: nodes().map(|n| n.steps).sum(),
        ..NodeView::default()
    };
    for member in nodes() {
        node.status = worst(node.status, member.status);
        for (word, n) in &member.items {
            *node.items.entry(word).or_default() += n;
        }
    }
    node
}

/// The name of the use that all belong to, else the first and the last.
fn joint_name<'a>(first: &str, last: &str, mut names: impl Iterator<Item = &'a str>) -> String {
    let used = first.split_once('/').map(|(used, _)| format!("{used}/"));
    match used.filter(|used| names.all(|n| n.starts_with(used.as_str()))) {
        Some(used) => used,
        None => format!("{first} … {last}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::tests::{node, view};
    use super::*;

    fn named(view: &GraphView) -> Vec<String> {
        view.nodes
            .iter()
            .map(|n| format!("{} ({})", n.name, n.steps))
            .collect()
    }

    fn steps(view: &GraphView) -> usize {
        view.nodes.iter().map(|n| n.steps).sum()
    }

    #[test]
    fn a_small_graph_is_left_alone() {
        let small = view(vec![node("a", &[]), node("b", &["a"])]);
        assert_eq!(named(&fold(&small)), ["a (1)", "b (1)"]);
    }

    #[test]
    fn a_large_layer_is_one_node() {
        let mut nodes = vec![node("split", &[])];
        nodes.extend((0..9_998).map(|i| node(&format!("part-{i}"), &["split"])));
        let parts: Vec<String> = nodes[1..].iter().map(|n| n.name.clone()).collect();
        let mut join = node("join", &[]);
        join.needs = parts;
        nodes.push(join);
        let folded = fold(&view(nodes));
        assert_eq!(
            named(&folded),
            ["split (1)", "part-0 … part-9997 (9998)", "join (1)"]
        );
        assert_eq!(folded.nodes[2].needs, ["part-0 … part-9997"]);
    }

    #[test]
    fn a_use_of_a_definition_is_one_node() {
        let mut nodes = vec![node("load", &[])];
        for i in 0..20 {
            nodes.push(node(&format!("clean-{i}/a"), &["load"]));
            nodes.push(node(&format!("clean-{i}/b"), &[&format!("clean-{i}/a")]));
        }
        let folded = fold(&view(nodes[..13].to_vec()));
        assert_eq!(folded.nodes.len(), 13, "still readable");
        let folded = fold(&view(nodes));
        assert!(folded.nodes.len() <= 3, "{:?}", named(&folded));
        assert_eq!(steps(&folded), 41);
    }

    #[test]
    fn a_deep_or_tangled_graph_becomes_bands() {
        let chain: Vec<NodeView> = (0..10_000)
            .map(|i| match i {
                0 => node("s0", &[]),
                _ => node(&format!("s{i}"), &[&format!("s{}", i - 1)]),
            })
            .collect();
        let folded = fold(&view(chain));
        assert_eq!((folded.nodes.len(), steps(&folded)), (BANDS, 10_000));
        let tangle: Vec<NodeView> = (0..10_000usize)
            .map(|i| {
                let before = [i.wrapping_sub(100), i.wrapping_sub(137)];
                let needs: Vec<String> = before
                    .iter()
                    .filter(|b| **b < i)
                    .map(|b| format!("n{b}"))
                    .collect();
                let needs: Vec<&str> = needs.iter().map(String::as_str).collect();
                node(&format!("n{i}"), &needs)
            })
            .collect();
        let folded = fold(&view(tangle));
        assert!(is_readable(&folded), "{:?}", named(&folded));
        assert_eq!(steps(&folded), 10_000);
    }
}
