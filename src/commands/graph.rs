//! `flowrun graph`.

use std::path::Path;

use flowrun_engine::pipeline::Pipeline;

use crate::args::{GlobalArgs, GraphArgs, GraphFormat};
use crate::exit::{Exit, Failure};
use crate::graph::{GraphView, render};
use crate::{recorded, surroundings};

/// Draws a pipeline's graph.
#[allow(clippy::print_stdout)]
pub(crate) fn graph(args: &GraphArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let loaded = surroundings::load(&args.select, global)?;
    let format = match (args.format, &args.output) {
        (Some(format), _) => format,
        (None, Some(path)) => format_of(path)?,
        (None, None) if global.json => GraphFormat::Json,
        (None, None) => GraphFormat::Text,
    };
    let mut view = GraphView::of(&loaded.pipeline);
    if args.status {
        add_status(&mut view, &loaded.pipeline, global)?;
    }
    let drawing = render(&view, format);
    match &args.output {
        None => print!("{drawing}"),
        Some(path) => std::fs::write(path, drawing)
            .map_err(|e| Failure::new(Exit::Internal, format!("{}: {e}", path.display())))?,
    }
    Ok(Exit::Ok)
}

fn format_of(path: &Path) -> Result<GraphFormat, Failure> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => Ok(GraphFormat::Svg),
        Some("mmd" | "mermaid") => Ok(GraphFormat::Mermaid),
        Some("dot" | "gv") => Ok(GraphFormat::Dot),
        Some("json") => Ok(GraphFormat::Json),
        Some("html") => Ok(GraphFormat::Html),
        Some("txt") => Ok(GraphFormat::Text),
        _ => Err(Failure::usage(format!(
            "{}: the ending says no format; use .svg, .mmd, .dot, .json, .html or .txt, or --format",
            path.display()
        ))),
    }
}

fn add_status(
    view: &mut GraphView,
    pipeline: &Pipeline,
    global: &GlobalArgs,
) -> Result<(), Failure> {
    let (_, record) = recorded::find(None, global)?;
    if record.pipeline == pipeline.name {
        view.add_status(&record);
    }
    Ok(())
}
