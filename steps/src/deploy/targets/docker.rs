//! Containers: an image of the program with the bundle, and a composition that runs it.

use flowrun_engine::step::StepError;
use serde_json::json;

use super::{Content, Facts, File, Target, text};

pub(super) const DOCKERFILE: Target = Target {
    name: "dockerfile",
    about: "An image of the program with the bundle.",
    render: dockerfile,
};

pub(super) const COMPOSE: Target = Target {
    name: "docker-compose",
    about: "The image, and a composition that runs it.",
    render: compose,
};

fn dockerfile(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let file = facts.fill(include_str!("../../../templates/deploy/Dockerfile"), &[])?;
    Ok(vec![
        text("Dockerfile", file),
        File {
            path: "bundle".into(),
            content: Content::CopyOf(facts.bundle.folder.clone()),
        },
    ])
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
