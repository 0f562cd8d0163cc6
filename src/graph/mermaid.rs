//! The graph as a Mermaid flowchart.

use super::view::GraphView;
use crate::reporter::status_word;

/// Words that Mermaid takes for its own.
const RESERVED: [&str; 11] = [
    "end",
    "graph",
    "flowchart",
    "subgraph",
    "style",
    "class",
    "click",
    "call",
    "href",
    "default",
    "linkstyle",
];

pub(super) fn render(view: &GraphView) -> String {
    let mut out = String::from("flowchart TD\n");
    for node in &view.nodes {
        let class = node.status.map(|s| format!(":::{}", status_word(s)));
        out.push_str(&format!(
            "    {}[\"{}<br/><small>{}</small>\"]{}\n",
            id(&node.name),
            node.name,
            node.caption(),
            class.unwrap_or_default(),
        ));
    }
    for node in &view.nodes {
        for need in &node.needs {
            out.push_str(&format!("    {} --> {}\n", id(need), id(&node.name)));
        }
    }
    if view.nodes.iter().any(|n| n.status.is_some()) {
        out.push_str(
            "    classDef ran fill:#e6f6ec,stroke:#1d8348\n\
             \x20   classDef cached fill:#e8f1fb,stroke:#2a6db0\n\
             \x20   classDef failed fill:#fdeae8,stroke:#b3261e\n\
             \x20   classDef skipped fill:#eff0f2,stroke:#8a8f98\n",
        );
    }
    out
}

/// The name as Mermaid takes it: step names are distinct without `/` and spaces too.
fn id(name: &str) -> String {
    let id = name.replace('/', "__").replace(" … ", "___");
    if RESERVED.contains(&id.as_str()) {
        format!("{id}_")
    } else {
        id
    }
}
