//! The graph as text: a line a step, in topological order, indented by layer.

use super::GraphView;
use crate::reporter::status_word;

pub(super) fn render(view: &GraphView) -> String {
    let names = view
        .nodes
        .iter()
        .map(|n| n.layer * 2 + n.name.chars().count());
    let width = names.max().unwrap_or(0);
    let captions = view.nodes.iter().map(|n| n.caption().chars().count());
    let caption_width = captions.max().unwrap_or(0);
    let mut out = format!("{} ({} steps)\n", view.name, view.nodes.len());
    for node in &view.nodes {
        let name = format!("{}{}", "  ".repeat(node.layer), node.name);
        let status = node
            .status
            .map(|s| format!("{:8}", status_word(s)))
            .unwrap_or_default();
        let from = match node.needs.as_slice() {
            [] => String::new(),
            needs => format!("← {}", needs.join(", ")),
        };
        let line = format!(
            "{status}{name:width$}  {:caption_width$}  {from}",
            node.caption()
        );
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}
