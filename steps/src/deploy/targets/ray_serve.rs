//! Ray Serve: this program's server as an application of a Ray cluster; and, where adapters lie in
//! an object store, Ray Serve LLM with them.

use flowrun_engine::step::StepError;
use serde_json::json;

use super::{Content, Facts, File, Target, text};
use crate::models::adapter_place::RAY_STORES;

pub(super) const TARGET: Target = Target {
    name: "ray-serve",
    about: "An application for Ray Serve; with `adapters_url` also one for Ray Serve LLM.",
    render,
};

fn render(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let name = facts.dns_name()?;
    let cpus: f64 = match facts.settings.cpu.strip_suffix('m') {
        Some(milli) => milli.parse::<f64>().map(|milli| milli / 1000.0),
        None => facts.settings.cpu.parse(),
    }
    .map_err(|_| StepError::invalid(format!("`cpu`: `{}` is no number", facts.settings.cpu)))?;
    let more = [
        ("app", json!(name)),
        ("cpus", json!(cpus)),
        ("folder", json!(format!("/opt/flowrun/{name}"))),
        ("fetched", json!(facts.fetched()?)),
    ];
    let fill = |template: &str| facts.fill(template, &more);
    let mut files = vec![
        text(
            "serve.yaml",
            fill(include_str!("../../../templates/deploy/ray_serve.yaml"))?,
        ),
        text(
            "flowrun_app.py",
            fill(include_str!("../../../templates/deploy/flowrun_app.py"))?,
        ),
    ];
    files.push(File {
        path: "bundle".into(),
        content: Content::CopyOf(facts.bundle.folder.clone()),
    });
    let Some(url) = &facts.settings.adapters_url else {
        return Ok(files);
    };
    if !RAY_STORES.iter().any(|store| url.starts_with(store)) || url.contains('"') {
        return Err(StepError::invalid(format!(
            "`adapters_url`: Ray loads adapters from {}, not from `{url}`",
            RAY_STORES.join(", ")
        )));
    }
    let (base, id) = facts.base_model("ray-serve")?;
    facts.check_plain("ray-serve")?;
    let more = [
        ("app", json!(name)),
        ("base", json!(base)),
        ("base_id", json!(id)),
        ("rank", json!(facts.rank()?.unwrap_or(16).max(16))),
        ("adapters_url", json!(url.trim_end_matches('/'))),
    ];
    let llm = facts.fill(
        include_str!("../../../templates/deploy/ray_serve_llm.yaml"),
        &more,
    )?;
    files.push(text("serve_llm.yaml", llm));
    if let (Some(adapter), Some((_, checkpoint))) = (
        facts.bundle.adapter()?,
        facts.manifest().model_id.split_once(':'),
    ) {
        // As it has to lie below `adapters_url`.
        files.push(File {
            path: std::path::Path::new("adapters").join(checkpoint),
            content: Content::CopyOf(adapter),
        });
    }
    files.extend(facts.gateway("http://127.0.0.1:8000/v1")?);
    Ok(files)
}
