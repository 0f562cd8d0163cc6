//! The graph for Graphviz.

use flowrun_engine::event::StepStatus;

use super::view::GraphView;

pub(super) fn render(view: &GraphView) -> String {
    let mut out = format!(
        "digraph {:?} {{\n    node [shape=box, style=\"rounded,filled\", fillcolor=white];\n",
        view.name
    );
    for node in &view.nodes {
        let colour = match node.status {
            None => "",
            Some(StepStatus::Ran) => ", fillcolor=\"#e6f6ec\", color=\"#1d8348\"",
            Some(StepStatus::Cached) => ", fillcolor=\"#e8f1fb\", color=\"#2a6db0\"",
            Some(StepStatus::Failed) => ", fillcolor=\"#fdeae8\", color=\"#b3261e\"",
            Some(StepStatus::Skipped) => ", fillcolor=\"#eff0f2\", color=\"#8a8f98\"",
        };
        out.push_str(&format!(
            "    \"{0}\" [label=\"{0}\\n{1}\"{colour}];\n",
            node.name,
            node.caption()
        ));
    }
    for node in &view.nodes {
        for need in &node.needs {
            out.push_str(&format!("    \"{need}\" -> \"{}\";\n", node.name));
        }
    }
    out.push_str("}\n");
    out
}
