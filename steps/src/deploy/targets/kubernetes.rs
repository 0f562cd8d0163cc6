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
    if let Some(namespace) = &facts.settings.namespace
        && super::dns_name(namespace)? != *namespace
    {
        let text = format!("`namespace`: `{namespace}` is no DNS label");
        return Err(StepError::invalid(text));
    }
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
