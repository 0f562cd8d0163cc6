//! The graph as SVG, drawn here without an external program.

use flowrun_engine::event::StepStatus;

use super::layout::{Block, Layout, RISE, layout};
use super::view::{GraphView, NodeView};
use crate::reporter::status_word;

/// Pixels.
const BOX_HEIGHT: f64 = 46.0;
const MARGIN: f64 = 28.0;
const TITLE: f64 = 34.0;
const LEGEND: f64 = 30.0;
/// Characters of a name; a longer one is cut in its middle.
const NAME: usize = 34;
/// Width of a character of the 13-pixel fixed-width font, and of the 11-pixel one beside it.
const NAME_CHAR: f64 = 7.9;
const KIND_CHAR: f64 = 5.9;

const STYLE: &str = "\
.name{font-size:13px;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#16202c}\
.kind,.title{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}\
.kind{font-size:11px;fill:#536172}.title{font-size:18px;fill:#16202c}\
.node{fill:#fff;stroke:#8d9bac;stroke-width:1.2}.behind{fill:#f4f6f9;stroke:#b6c0cc}\
.edge{fill:none;stroke:#8b99aa;stroke-width:1.3}.head{fill:#8b99aa}\
.ran{stroke:#1d8348;fill:#e6f6ec}.cached{stroke:#2a6db0;fill:#e8f1fb}\
.failed{stroke:#b3261e;fill:#fdeae8;stroke-width:2}.skipped{stroke:#8a8f98;fill:#eff0f2;stroke-dasharray:4 3}";

pub(super) fn render(view: &GraphView) -> String {
    let blocks: Vec<Block> = view
        .nodes
        .iter()
        .zip(view.edges())
        .map(|(node, needs)| Block {
            width: box_width(node),
            layer: node.layer,
            needs,
        })
        .collect();
    let laid = layout(&blocks, BOX_HEIGHT);
    let has_status = view.nodes.iter().any(|n| n.status.is_some());
    let below = if has_status { LEGEND } else { 0.0 };
    let least = if has_status { 320.0 } else { 200.0 };
    let width = laid.width.max(least) + 2.0 * MARGIN;
    let height = laid.height + 2.0 * MARGIN + TITLE + below;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" aria-label=\"Graph of {0}\">\n\
         <style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fbfcfd\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"{1}\">{0}</text>\n",
        escape(&view.name),
        MARGIN + 14.0,
    );
    let left = MARGIN + (width - 2.0 * MARGIN - laid.width) / 2.0;
    out.push_str(&format!(
        "<g transform=\"translate({left:.1} {:.1})\">\n",
        MARGIN + TITLE
    ));
    draw(view, &blocks, &laid, &mut out);
    out.push_str("</g>\n");
    if has_status {
        out.push_str(&legend(height - MARGIN));
    }
    out.push_str("</svg>\n");
    out
}

fn draw(view: &GraphView, blocks: &[Block], laid: &Layout, out: &mut String) {
    for edge in &laid.edges {
        out.push_str(&curve(edge));
    }
    let layers = super::layout::rows(blocks);
    for ((node, block), (left, layer)) in view
        .nodes
        .iter()
        .zip(blocks)
        .zip(laid.left.iter().zip(layers))
    {
        let top = layer as f64 * (BOX_HEIGHT + RISE);
        out.push_str(&boxed(node, *left, top, block.width));
    }
}

/// A curve through the points, straight down at each, with a head at its end.
fn curve(points: &[(f64, f64)]) -> String {
    let Some(((x, y), rest)) = points.split_first() else {
        return String::new();
    };
    let mut path = format!("M{x:.1} {y:.1}");
    let (mut x1, mut y1) = (*x, *y);
    for (i, (x2, y2)) in rest.iter().enumerate() {
        let y2 = if i + 1 == rest.len() { y2 - 5.0 } else { *y2 };
        if (x1 - x2).abs() < 0.5 {
            path.push_str(&format!("L{x2:.1} {y2:.1}"));
        } else {
            let bend = (y1 + y2) / 2.0;
            path.push_str(&format!(
                "C{x1:.1} {bend:.1} {x2:.1} {bend:.1} {x2:.1} {y2:.1}"
            ));
        }
        (x1, y1) = (*x2, y2);
    }
    format!(
        "<path class=\"edge\" d=\"{path}\"/><path class=\"head\" d=\"M{:.1} {:.1}h7l-3.5 6z\"/>\n",
        x1 - 3.5,
        y1 - 1.0
    )
}

fn boxed(node: &NodeView, left: f64, top: f64, width: f64) -> String {
    let status = node.status.map(status_word).unwrap_or_default();
    let rect = |class: &str, shift: f64| {
        format!(
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{BOX_HEIGHT}\" rx=\"7\"/>",
            left + shift,
            top + shift
        )
    };
    let mut out = format!("<g><title>{}</title>", escape(&tooltip(node)));
    if node.foreach || node.steps > 1 {
        // A pile: it stands for several.
        out.push_str(&rect("node behind", 4.0));
    }
    out.push_str(&rect(&format!("node {status}"), 0.0));
    let middle = left + width / 2.0;
    out.push_str(&format!(
        "<text class=\"name\" x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"kind\" x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></g>\n",
        top + 20.0,
        escape(&shortened(&node.name)),
        top + 36.0,
        escape(&node.caption()),
    ));
    out
}

fn tooltip(node: &NodeView) -> String {
    let mut lines = vec![node.name.clone(), node.caption()];
    lines.extend(node.about.clone());
    if !node.needs.is_empty() {
        lines.push(format!("after {}", node.needs.join(", ")));
    }
    lines.join("\n")
}

fn legend(y: f64) -> String {
    let all = [
        StepStatus::Ran,
        StepStatus::Cached,
        StepStatus::Failed,
        StepStatus::Skipped,
    ];
    let mut out = String::new();
    let mut x = MARGIN;
    for status in all {
        let word = status_word(status);
        out.push_str(&format!(
            "<rect class=\"node {word}\" x=\"{x}\" y=\"{:.1}\" width=\"14\" height=\"14\" rx=\"3\"/>\
             <text class=\"kind\" x=\"{:.1}\" y=\"{y:.1}\">{word}</text>\n",
            y - 11.0,
            x + 20.0,
        ));
        x += 80.0;
    }
    out
}

fn box_width(node: &NodeView) -> f64 {
    let name = shortened(&node.name).chars().count() as f64 * NAME_CHAR;
    let kind = node.caption().chars().count() as f64 * KIND_CHAR;
    (name.max(kind) + 26.0).max(90.0).ceil()
}

fn shortened(name: &str) -> String {
    let count = name.chars().count();
    if count <= NAME {
        return name.to_owned();
    }
    let start: String = name.chars().take(NAME / 2).collect();
    let end: String = name.chars().skip(count - NAME / 2 + 1).collect();
    format!("{start}…{end}")
}

/// The text with what XML reserves replaced.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
