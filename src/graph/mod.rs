//! Drawings of a pipeline's graph. Knows the picture's parts, not where it goes.
//!
//! | module | does |
//! |---|---|
//! | `view` | what is shown of each step |
//! | `fold` | one node for many alike, when there are too many to read |
//! | `layout` | where nodes and edges lie |
//! | the others | one format each |

mod dot;
mod fold;
mod html;
mod json;
mod layout;
mod mermaid;
mod png;
mod svg;
mod text;
mod view;

pub(crate) use png::PngError;
pub(crate) use view::GraphView;

use crate::args::GraphFormat;

/// How a drawing is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drawing {
    /// The format.
    pub(crate) format: GraphFormat,
    /// Every step and every edge, however many there are.
    pub(crate) all: bool,
}

/// A drawing in one format. JSON is data: it has every step and every edge.
///
/// # Errors
/// [`PngError`], when a picture cannot be made.
pub(crate) fn render(view: &GraphView, drawing: Drawing) -> Result<Vec<u8>, PngError> {
    if drawing.format == GraphFormat::Json {
        return Ok(json::render(view).into_bytes());
    }
    let folded;
    let view = if drawing.all {
        view
    } else {
        let mut shown = fold::fold(view);
        if drawing.format != GraphFormat::Text {
            shown.drop_implied();
        }
        folded = shown;
        &folded
    };
    Ok(match drawing.format {
        GraphFormat::Text => text::render(view).into_bytes(),
        GraphFormat::Svg => svg::render(view).into_bytes(),
        GraphFormat::Png => png::render(view)?,
        GraphFormat::Mermaid => mermaid::render(view).into_bytes(),
        GraphFormat::Dot => dot::render(view).into_bytes(),
        GraphFormat::Json => Vec::new(),
        GraphFormat::Html => html::render(view).into_bytes(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::view::tests::{node, view};
    use super::*;

    fn text(view: &GraphView, format: GraphFormat) -> String {
        let drawing = Drawing { format, all: false };
        String::from_utf8(render(view, drawing).unwrap()).unwrap()
    }

    fn sample() -> GraphView {
        view(vec![
            node("load", &[]),
            node("left", &["load"]),
            node("right", &["load"]),
            node("join", &["left", "load", "right"]),
        ])
    }

    #[test]
    fn every_format_shows_every_step() {
        for format in [
            GraphFormat::Text,
            GraphFormat::Svg,
            GraphFormat::Mermaid,
            GraphFormat::Dot,
            GraphFormat::Json,
            GraphFormat::Html,
        ] {
            let drawing = text(&sample(), format);
            for step in ["load", "left", "right", "join"] {
                assert!(drawing.contains(step), "{format:?}: {step}");
            }
        }
    }

    #[test]
    fn edges_that_others_imply_are_left_out_of_pictures_only() {
        let of = |format| text(&sample(), format);
        assert_eq!(of(GraphFormat::Svg).matches("class=\"edge\"").count(), 4);
        assert_eq!(of(GraphFormat::Mermaid).matches("-->").count(), 4);
        assert_eq!(of(GraphFormat::Dot).matches("->").count(), 4);
        assert!(of(GraphFormat::Text).contains("← left, load, right"));
        let all = Drawing {
            format: GraphFormat::Dot,
            all: true,
        };
        let all = String::from_utf8(render(&sample(), all).unwrap()).unwrap();
        assert_eq!(all.matches("->").count(), 5);
    }

    #[test]
    fn a_name_cannot_break_a_drawing() {
        let mut odd = view(vec![node("end", &[]), node("a/b", &["end"])]);
        odd.name = "a<b\"&".into();
        assert!(text(&odd, GraphFormat::Svg).contains("a&lt;b&quot;&amp;"));
        let mermaid = text(&odd, GraphFormat::Mermaid);
        assert!(mermaid.contains("end_ --> a__b"), "{mermaid}");
    }

    #[test]
    fn a_picture_is_drawn_with_its_own_fonts() {
        let drawing = Drawing {
            format: GraphFormat::Png,
            all: false,
        };
        let png = |change: fn(&mut super::view::NodeView)| {
            let mut view = sample();
            view.nodes.iter_mut().for_each(change);
            render(&view, drawing).unwrap()
        };
        let whole = png(|_| {});
        assert!(whole.starts_with(b"\x89PNG"));
        let no_kinds = png(|n| n.kind = " ".repeat(n.kind.len()));
        let no_text = png(|n| {
            n.kind = " ".repeat(n.kind.len());
            n.name = n.name.chars().map(|_| '\u{a0}').collect();
        });
        assert!(no_kinds.len() > no_text.len() + 500, "names are drawn");
        assert!(whole.len() > no_kinds.len() + 300, "kinds are drawn");
    }
}
