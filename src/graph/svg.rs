//! The graph as SVG: layers from left to right, edges as curves. Drawn here,
//! without an external program.

use std::collections::BTreeMap;

use flowrun_engine::event::StepStatus;

use super::{GraphView, NodeView};

/// Pixels.
const ROW: usize = 64;
const BOX_HEIGHT: usize = 44;
const GAP: usize = 56;
const MARGIN: usize = 24;
const TITLE: usize = 36;
/// Width of one character of the 13-pixel label font.
const CHAR: usize = 8;

const STYLE: &str = "text{font-family:system-ui,sans-serif;fill:#1c2430}\
.name{font-size:13px;font-weight:600}.kind{font-size:11px;fill:#5b6675}.title{font-size:16px;font-weight:600}\
.node{fill:#fff;stroke:#8a97a8}.edge{fill:none;stroke:#9aa7b8;stroke-width:1.4}\
.ran{stroke:#1f8a4c;fill:#e9f7ef}.cached{stroke:#2f6fb2;fill:#eaf2fb}\
.failed{stroke:#b3261e;fill:#fdecea}.skipped{stroke:#8a8f98;fill:#f1f2f4}";

struct Place {
    x: usize,
    y: usize,
    width: usize,
}

pub(super) fn render(view: &GraphView) -> String {
    let (places, width, height) = layout(view);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\">\n<style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fbfcfd\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"{}\">{}</text>\n",
        MARGIN + 4,
        escape(&view.name)
    );
    for node in &view.nodes {
        for need in &node.needs {
            if let (Some(from), Some(to)) = (places.get(need), places.get(&node.name)) {
                out.push_str(&edge(from, to));
            }
        }
    }
    for node in &view.nodes {
        if let Some(place) = places.get(&node.name) {
            out.push_str(&boxed(node, place));
        }
    }
    out.push_str("</svg>\n");
    out
}

fn layout(view: &GraphView) -> (BTreeMap<String, Place>, usize, usize) {
    let layers = view.nodes.iter().map(|n| n.layer + 1).max().unwrap_or(0);
    let members = |layer| view.nodes.iter().filter(move |n| n.layer == layer);
    let tallest = (0..layers).map(|l| members(l).count()).max().unwrap_or(0);
    let mut places: BTreeMap<String, Place> = BTreeMap::new();
    let mut x = MARGIN;
    for layer in 0..layers {
        let width = members(layer).map(box_width).max().unwrap_or(0);
        let mut nodes: Vec<&NodeView> = members(layer).collect();
        // Nearest to what they need, so that fewer edges cross.
        nodes.sort_by_key(|node| {
            let ys: Vec<usize> = node
                .needs
                .iter()
                .filter_map(|n| Some(places.get(n)?.y))
                .collect();
            ys.iter().sum::<usize>() / ys.len().max(1)
        });
        let top = MARGIN + TITLE + (tallest - nodes.len()) * ROW / 2;
        for (i, node) in nodes.into_iter().enumerate() {
            places.insert(
                node.name.clone(),
                Place {
                    x,
                    y: top + i * ROW,
                    width,
                },
            );
        }
        x += width + GAP;
    }
    let width = (x + MARGIN).saturating_sub(GAP).max(2 * MARGIN + 200);
    (places, width, MARGIN * 2 + TITLE + tallest * ROW)
}

fn box_width(node: &NodeView) -> usize {
    let longest = node
        .name
        .chars()
        .count()
        .max(node.caption().chars().count());
    longest * CHAR + 24
}

fn edge(from: &Place, to: &Place) -> String {
    let (x1, y1) = (from.x + from.width, from.y + BOX_HEIGHT / 2);
    let (x2, y2) = (to.x, to.y + BOX_HEIGHT / 2);
    let bend = GAP / 2;
    format!(
        "<path class=\"edge\" d=\"M{x1} {y1} C{} {y1} {} {y2} {x2} {y2}\"/>\n",
        x1 + bend,
        x2.saturating_sub(bend)
    )
}

fn boxed(node: &NodeView, place: &Place) -> String {
    let status = match node.status {
        None => "",
        Some(StepStatus::Ran) => " ran",
        Some(StepStatus::Cached) => " cached",
        Some(StepStatus::Failed) => " failed",
        Some(StepStatus::Skipped) => " skipped",
    };
    let Place { x, y, width } = place;
    let middle = x + width / 2;
    format!(
        "<rect class=\"node{status}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{BOX_HEIGHT}\" rx=\"6\"/>\n\
         <text class=\"name\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
         <text class=\"kind\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
        y + 19,
        escape(&node.name),
        y + 35,
        escape(&node.caption())
    )
}

/// The text with what XML reserves replaced.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
