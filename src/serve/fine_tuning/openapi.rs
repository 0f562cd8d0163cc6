//! The paths of fine-tuning in the server's OpenAPI document.

use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::jobs::JobOrder;
use crate::serve::openapi::{add, paged};

/// Adds them.
pub(in crate::serve) fn describe(paths: &mut Map<String, Value>, types: &mut SchemaGenerator) {
    const JOBS: &str = "/v1/fine_tuning/jobs";
    let order = types.subschema_for::<JobOrder>().to_value();
    let order = json!({"application/json": {"schema": order}});
    add(paths, JOBS, "get", "The jobs", None);
    add(paths, JOBS, "post", "Trains an adapter", Some(order));
    for (path, method, about) in [
        ("{id}", "get", "One job"),
        ("{id}/cancel", "post", "Ends a job"),
        ("{id}/events", "get", "What happened to a job"),
        ("{id}/checkpoints", "get", "The models that came of a job"),
    ] {
        add(paths, &format!("{JOBS}/{path}"), method, about, None);
    }
    for list in ["", "/{id}/events", "/{id}/checkpoints"] {
        paged(paths, &format!("{JOBS}{list}"));
    }
}
