//! The graph as text: a line a step, in topological order, indented by layer.

use super::view::GraphView;
use crate::reporter::status_word;

/// Deepest indentation, in layers.
const DEEPEST: usize = 16;
/// Needs that are named.
const NAMED: usize = 8;

pub(super) fn render(view: &GraphView) -> String {
    let indent = |layer: usize| 2 * layer.min(DEEPEST);
    let names = view
        .nodes
        .iter()
        .map(|n| indent(n.layer) + n.name.chars().count());
    let width = names.max().unwrap_or(0);
    let captions = view.nodes.iter().map(|n| n.caption().chars().count());
    let caption_width = captions.max().unwrap_or(0);
    let steps: usize = view.nodes.iter().map(|n| n.steps).sum();
    let mut out = format!("{} ({steps} steps)\n", view.name);
    if view.nodes.len() < steps {
        out.push_str("alike steps are folded; `--all` shows each\n");
    }
    for node in &view.nodes {
        let name = format!("{}{}", " ".repeat(indent(node.layer)), node.name);
        let status = node
            .status
            .map(|s| format!("{:8}", status_word(s)))
            .unwrap_or_default();
        let line = format!(
            "{status}{name:width$}  {:caption_width$}  {}",
            node.caption(),
            from(&node.needs)
        );
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn from(needs: &[String]) -> String {
    let named = needs[..needs.len().min(NAMED)].join(", ");
    match needs.len() {
        0 => String::new(),
        n if n > NAMED => format!("← {named} and {} more", n - NAMED),
        _ => format!("← {named}"),
    }
}
