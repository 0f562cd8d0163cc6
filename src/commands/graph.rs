//! `flowrun graph`.

use std::io::IsTerminal;
use std::path::Path;

use flowrun_cache::CacheReader;
use flowrun_engine::pipeline::Pipeline;

use crate::args::{GlobalArgs, GraphArgs, GraphFormat};
use crate::exit::{Exit, Failure};
use crate::graph::{Drawing, GraphView, render};
use crate::{output, recorded, surroundings};

/// Draws a pipeline's graph.
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
    let drawing = Drawing {
        format,
        all: args.all,
    };
    let drawing =
        render(&view, drawing).map_err(|e| Failure::new(Exit::Internal, e.to_string()))?;
    match &args.output {
        None if format == GraphFormat::Png && std::io::stdout().is_terminal() => {
            let text = "a picture is not for a terminal; write it to a file with `-o graph.png`";
            return Err(Failure::usage(text));
        }
        None => return output::print_bytes(&drawing),
        Some(path) => std::fs::write(path, drawing)
            .map_err(|e| Failure::new(Exit::Internal, format!("{}: {e}", path.display())))?,
    }
    Ok(Exit::Ok)
}

fn format_of(path: &Path) -> Result<GraphFormat, Failure> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => Ok(GraphFormat::Svg),
        Some("png") => Ok(GraphFormat::Png),
        Some("mmd" | "mermaid") => Ok(GraphFormat::Mermaid),
        Some("dot" | "gv") => Ok(GraphFormat::Dot),
        Some("json") => Ok(GraphFormat::Json),
        Some("html") => Ok(GraphFormat::Html),
        Some("txt") => Ok(GraphFormat::Text),
        _ => Err(Failure::usage(format!(
            "{}: the ending says no format; use .svg, .png, .mmd, .dot, .json, .html or .txt, or --format",
            path.display()
        ))),
    }
}

fn add_status(
    view: &mut GraphView,
    pipeline: &Pipeline,
    global: &GlobalArgs,
) -> Result<(), Failure> {
    let runs = CacheReader::open(&global.cache_dir).runs();
    let mut records = runs.iter().filter_map(|dir| recorded::load(dir).ok());
    let last = records.find(|record| record.pipeline == pipeline.name);
    let record = last.ok_or_else(|| {
        let text = format!(
            "{} holds no run of `{}`",
            global.cache_dir.display(),
            pipeline.name
        );
        Failure::usage(text)
    })?;
    view.add_status(&record);
    Ok(())
}
