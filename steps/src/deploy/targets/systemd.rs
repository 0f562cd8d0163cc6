//! systemd: a hardened unit.

use flowrun_engine::step::StepError;
use serde_json::json;

use super::{Content, Facts, File, Target, text};

pub(super) const TARGET: Target = Target {
    name: "systemd",
    about: "A hardened unit that serves the bundle.",
    render,
};

fn render(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let app = facts.dns_name()?;
    let more = [("app", json!(app)), ("fetched", json!(facts.fetched()?))];
    let unit = facts.fill(
        include_str!("../../../templates/deploy/systemd.service"),
        &more,
    )?;
    Ok(vec![
        text(&format!("flowrun-{app}.service"), unit),
        File {
            path: "bundle".into(),
            content: Content::CopyOf(facts.bundle.folder.clone()),
        },
    ])
}
