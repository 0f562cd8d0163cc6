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
    add(paths, "/v1/files/{id}", "get", "One file", None);
    add(paths, "/v1/files/{id}", "delete", "Deletes a file", None);
    let about = "The content of a file";
    add(paths, "/v1/files/{id}/content", "get", about, None);
}
