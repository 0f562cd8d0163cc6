//! The graph as a Mermaid flowchart.

use super::GraphView;

pub(super) fn render(view: &GraphView) -> String {
    let mut out = String::from("flowchart LR\n");
    for node in &view.nodes {
        let id = &node.name;
        out.push_str(&format!(
            "    {id}[\"{id}<br/><small>{}</small>\"]\n",
            node.caption()
        ));
    }
    for node in &view.nodes {
        for need in &node.needs {
            out.push_str(&format!("    {need} --> {}\n", node.name));
        }
    }
    out
}
