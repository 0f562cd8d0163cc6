//! The graph as a page of its own: the drawing and a table of what it shows.

use super::svg;
use super::view::GraphView;
use crate::reporter::status_word;

const STYLE: &str = "body{margin:2rem;font-family:system-ui,sans-serif;color:#16202c;background:#fff}\
figure{margin:0 0 2rem;overflow:auto;border:1px solid #dde3ea;border-radius:8px;background:#fbfcfd}\
svg{display:block;margin:auto}\
table{border-collapse:collapse;font-size:.9rem}td,th{text-align:left;padding:.3rem .9rem;border-bottom:1px solid #e6eaef}\
td:first-child{font-family:ui-monospace,monospace}\
.failed{color:#b3261e;font-weight:600}.ran{color:#1d8348}.cached{color:#2a6db0}.skipped{color:#6a7079}";

pub(super) fn render(view: &GraphView) -> String {
    let title = svg::escape(&view.name);
    let rows: String = view.nodes.iter().map(row).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<style>{STYLE}</style></head>\n\
         <body>\n<figure>\n{}</figure>\n<table>\n\
         <tr><th>step</th><th>kind</th><th>last run</th><th>after</th><th>about</th></tr>\n\
         {rows}</table>\n</body></html>\n",
        svg::render(view)
    )
}

fn row(node: &super::view::NodeView) -> String {
    let status = node.status.map(status_word).unwrap_or_default();
    format!(
        "<tr><td>{}</td><td>{}</td><td class=\"{status}\">{status}</td><td>{}</td><td>{}</td></tr>\n",
        svg::escape(&node.name),
        svg::escape(&node.caption()),
        svg::escape(&node.needs.join(", ")),
        svg::escape(node.about.as_deref().unwrap_or_default()),
    )
}
