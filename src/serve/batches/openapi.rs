//! The paths of batches in the server's OpenAPI document.

use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::batch::BatchOrder;
use crate::serve::openapi::{add, paged};

/// Adds them.
pub(in crate::serve) fn describe(paths: &mut Map<String, Value>, types: &mut SchemaGenerator) {
    let order = types.subschema_for::<BatchOrder>().to_value();
    let order = json!({"application/json": {"schema": order}});
    let about = "Answers a file of requests";
    add(paths, "/v1/batches", "post", about, Some(order));
    add(paths, "/v1/batches", "get", "The batches", None);
    paged(paths, "/v1/batches");
    add(paths, "/v1/batches/{id}", "get", "One batch", None);
    add(
        paths,
        "/v1/batches/{id}/cancel",
        "post",
        "Ends a batch",
        None,
    );
}
