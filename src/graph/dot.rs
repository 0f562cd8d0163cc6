//! The graph for Graphviz.

use super::GraphView;

pub(super) fn render(view: &GraphView) -> String {
    let mut out = format!(
        "digraph {:?} {{\n    rankdir=LR;\n    node [shape=box];\n",
        view.name
    );
    for node in &view.nodes {
        let label = format!("{}\\n{}", node.name, node.caption());
        out.push_str(&format!("    \"{}\" [label=\"{label}\"];\n", node.name));
    }
    for node in &view.nodes {
        for need in &node.needs {
            out.push_str(&format!("    \"{need}\" -> \"{}\";\n", node.name));
        }
    }
    out.push_str("}\n");
    out
}
