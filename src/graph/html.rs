//! The graph as a page of its own.

use super::{GraphView, svg};

pub(super) fn render(view: &GraphView) -> String {
    let title = svg::escape(&view.name);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <style>body{{margin:2rem;font-family:system-ui,sans-serif;color-scheme:light dark}}\
         svg{{max-width:100%;height:auto}}</style></head>\n<body><h1>{title}</h1>\n{}</body></html>\n",
        svg::render(view)
    )
}
