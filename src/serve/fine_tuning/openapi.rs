//! The paths of fine-tuning in the server's OpenAPI document.

use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::jobs::Order;

/// Adds them; `failed` describes an answer that is an error.
pub(in crate::serve) fn describe(
    paths: &mut Map<String, Value>,
    types: &mut SchemaGenerator,
    failed: &Value,
) {
    let id = json!([{
        "name": "id", "in": "path", "required": true, "schema": {"type": "string"},
    }]);
    let operation = |about: &str, body: Option<Value>| {
        let mut operation = json!({
            "summary": about,
            "responses": {"200": {"description": "ok"}, "default": failed},
        });
        if let Some(body) = body {
            operation["requestBody"] = json!({"required": true, "content": body});
        }
        operation
    };
    let order = types.subschema_for::<Order>().to_value();
    let order = json!({"application/json": {"schema": order}});
    let form = json!({"multipart/form-data": {"schema": {
        "type": "object", "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": [super::files::PURPOSE]},
        },
    }}});
    for (path, method, about, body) in [
        ("/v1/files", "get", "The uploaded files", None),
        ("/v1/files", "post", "Uploads chats to train on", Some(form)),
        ("/v1/files/{id}", "get", "One file", None),
        ("/v1/files/{id}", "delete", "Deletes a file", None),
        ("/v1/files/{id}/content", "get", "The chats of a file", None),
        ("/v1/fine_tuning/jobs", "get", "The jobs", None),
        (
            "/v1/fine_tuning/jobs",
            "post",
            "Trains an adapter",
            Some(order),
        ),
        ("/v1/fine_tuning/jobs/{id}", "get", "One job", None),
        (
            "/v1/fine_tuning/jobs/{id}/cancel",
            "post",
            "Ends a job",
            None,
        ),
        (
            "/v1/fine_tuning/jobs/{id}/events",
            "get",
            "What happened to a job",
            None,
        ),
        (
            "/v1/fine_tuning/jobs/{id}/checkpoints",
            "get",
            "The models that came of a job",
            None,
        ),
    ] {
        let entry = paths.entry(path.to_owned()).or_insert_with(|| json!({}));
        entry[method] = operation(about, body);
        if path.contains("{id}") {
            entry["parameters"] = id.clone();
        }
    }
}
