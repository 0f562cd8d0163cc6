//! The graph as JSON.

use super::view::GraphView;

pub(super) fn render(view: &GraphView) -> String {
    let text = serde_json::to_string_pretty(view).unwrap_or_default();
    format!("{text}\n")
}
