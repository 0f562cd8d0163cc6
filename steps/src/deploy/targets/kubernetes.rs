//! Kubernetes: Deployment, Service, autoscaler and disruption budget.

use flowrun_engine::step::StepError;
use serde_json::json;

use super::{Facts, File, Target, text};

pub(super) const TARGET: Target = Target {
    name: "kubernetes",
    about: "Manifests: Deployment, Service, HorizontalPodAutoscaler, PodDisruptionBudget.",
    render,
};

fn render(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let more = [
        ("app", json!(facts.dns_name()?)),
        ("image", json!(facts.image()?)),
    ];
    let manifests = facts.fill(
        include_str!("../../../templates/deploy/kubernetes.yaml"),
        &more,
    )?;
    Ok(vec![text("kubernetes.yaml", manifests)])
}
