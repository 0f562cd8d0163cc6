//! The paths of files in the server's OpenAPI document.

use serde_json::{Map, Value, json};

use crate::serve::openapi::add;
use crate::serve::{batches, fine_tuning};

/// Adds them.
pub(in crate::serve) fn describe(paths: &mut Map<String, Value>) {
    let form = json!({"multipart/form-data": {"schema": {
        "type": "object", "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": [batches::PURPOSE, fine_tuning::PURPOSE]},
        },
    }}});
    let about = "Uploads requests to answer, or chats to train on";
    add(paths, "/v1/files", "post", about, Some(form));
    add(paths, "/v1/files", "get", "The files", None);
    if let Some(files) = paths.get_mut("/v1/files") {
        let part =
            |name: &str, schema: Value| json!({"name": name, "in": "query", "schema": schema});
        files["get"]["parameters"] = json!([
            part("purpose", json!({"type": "string"})),
            part("order", json!({"type": "string", "enum": ["asc", "desc"]})),
            part("after", json!({"type": "string"})),
            part("limit", json!({"type": "integer", "minimum": 0})),
        ]);
    }
    add(paths, "/v1/files/{id}", "get", "One file", None);
    add(paths, "/v1/files/{id}", "delete", "Deletes a file", None);
    let about = "The content of a file";
    add(paths, "/v1/files/{id}/content", "get", about, None);
}
