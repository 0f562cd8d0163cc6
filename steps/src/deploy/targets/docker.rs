//! Containers: an image of the program with the bundle and its weights, and a composition that runs
//! it. The image fetches nothing.

use flowrun_engine::step::StepError;
use serde_json::json;

use super::{Content, Facts, File, Target, text};

pub(super) const DOCKERFILE: Target = Target {
    name: "dockerfile",
    about: "An image of the program with the bundle and its weights.",
    render: dockerfile,
};

pub(super) const COMPOSE: Target = Target {
    name: "docker-compose",
    about: "The image, and a composition that runs it.",
    render: compose,
};

fn dockerfile(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let weights = facts.cached_weights()?;
    let more = [("weights", json!(!weights.is_empty()))];
    let file = facts.fill(include_str!("../../../templates/deploy/Dockerfile"), &more)?;
    let mut files = vec![
        text("Dockerfile", file),
        File {
            path: "bundle".into(),
            content: Content::CopyOf(facts.bundle.folder.clone()),
        },
    ];
    files.extend(weights);
    Ok(files)
}

fn compose(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let more = [
        ("app", json!(facts.dns_name()?)),
        ("image", json!(facts.image()?)),
    ];
    let file = facts.fill(
        include_str!("../../../templates/deploy/compose.yaml"),
        &more,
    )?;
    let mut files = dockerfile(facts)?;
    files.push(text("compose.yaml", file));
    Ok(files)
}
