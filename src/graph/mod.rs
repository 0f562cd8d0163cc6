//! Drawings of a pipeline's graph. Knows the picture's parts, not where it goes.

mod dot;
mod html;
mod json;
mod mermaid;
mod svg;
mod text;

use flowrun_engine::dag::{Dag, predecessors};
use flowrun_engine::event::StepStatus;
use flowrun_engine::pipeline::{Action, Pipeline};
use flowrun_engine::record::RunRecord;
use serde::Serialize;

use crate::args::GraphFormat;

/// What a drawing shows.
#[derive(Debug, Serialize)]
pub(crate) struct GraphView {
    /// Pipeline name.
    pub(crate) name: String,
    /// Steps in topological order.
    pub(crate) nodes: Vec<NodeView>,
}

/// One step in a drawing.
#[derive(Debug, Serialize)]
pub(crate) struct NodeView {
    /// Step name.
    pub(crate) name: String,
    /// Step kind.
    pub(crate) kind: String,
    /// It fans out.
    pub(crate) foreach: bool,
    /// Its column: the longest way to it.
    pub(crate) layer: usize,
    /// Steps it needs.
    pub(crate) needs: Vec<String>,
    /// How it ended in the last run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<StepStatus>,
}

impl GraphView {
    /// The view of a pipeline.
    pub(crate) fn of(pipeline: &Pipeline) -> Self {
        let layers = Dag::of(pipeline).layers();
        let layer_of = |name: &String| layers.iter().position(|l| l.contains(name)).unwrap_or(0);
        let nodes = pipeline.steps.iter().map(|step| NodeView {
            name: step.name.clone(),
            kind: match &step.action {
                Action::Uses(kind) => kind.kind().to_owned(),
                Action::Run(_) => "run".to_owned(),
            },
            foreach: step.foreach.is_some(),
            layer: layer_of(&step.name),
            needs: predecessors(step).into_iter().collect(),
            status: None,
        });
        Self {
            name: pipeline.name.clone(),
            nodes: nodes.collect(),
        }
    }

    /// Marks each step with how its items ended; the worst counts.
    pub(crate) fn add_status(&mut self, record: &RunRecord) {
        let rank = |status: &StepStatus| match status {
            StepStatus::Failed => 3,
            StepStatus::Skipped => 2,
            StepStatus::Ran => 1,
            StepStatus::Cached => 0,
        };
        for node in &mut self.nodes {
            let of_node = |id: &str| id == node.name || id.starts_with(&format!("{}[", node.name));
            node.status = record
                .steps
                .iter()
                .filter(|s| of_node(&s.step))
                .map(|s| s.status)
                .max_by_key(rank);
        }
    }
}

impl NodeView {
    /// `kind`, with a mark when the step fans out.
    pub(crate) fn caption(&self) -> String {
        if self.foreach {
            format!("{} × n", self.kind)
        } else {
            self.kind.clone()
        }
    }
}

/// A drawing in one format.
pub(crate) fn render(view: &GraphView, format: GraphFormat) -> String {
    match format {
        GraphFormat::Text => text::render(view),
        GraphFormat::Svg => svg::render(view),
        GraphFormat::Mermaid => mermaid::render(view),
        GraphFormat::Dot => dot::render(view),
        GraphFormat::Json => json::render(view),
        GraphFormat::Html => html::render(view),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn sample() -> GraphView {
        let node = |name: &str, layer, needs: &[&str], foreach| NodeView {
            name: name.into(),
            kind: format!("kind-{name}"),
            foreach,
            layer,
            needs: needs.iter().map(|n| (*n).to_owned()).collect(),
            status: None,
        };
        GraphView {
            name: "a<b".into(),
            nodes: vec![
                node("load", 0, &[], false),
                node("left", 1, &["load"], false),
                node("right", 1, &["load"], true),
                node("join", 2, &["left", "right"], false),
            ],
        }
    }

    #[test]
    fn every_format_shows_every_step_and_edge() {
        let view = sample();
        for format in [
            GraphFormat::Text,
            GraphFormat::Svg,
            GraphFormat::Mermaid,
            GraphFormat::Dot,
            GraphFormat::Json,
            GraphFormat::Html,
        ] {
            let drawing = render(&view, format);
            for node in &view.nodes {
                assert!(drawing.contains(&node.name), "{format:?}: {}", node.name);
            }
        }
        assert_eq!(
            svg::render(&view).matches("<path class=\"edge\"").count(),
            4
        );
        assert_eq!(mermaid::render(&view).matches("-->").count(), 4);
        assert_eq!(dot::render(&view).matches("->").count(), 4);
        assert!(svg::render(&view).contains("a&lt;b"));
    }
}
