//! Lists in OpenAI's shape, part by part.

use axum::Json;
use serde::Deserialize;
use serde_json::{Value, json};

/// Things that one answer lists where nothing is said.
const PAGE: usize = 20;

/// Which part of a list.
#[derive(Debug, Deserialize)]
pub(super) struct Part {
    /// The id that it begins behind.
    pub(super) after: Option<String>,
    pub(super) limit: Option<usize>,
}

/// A part of a list, whose newest things come first unless the caller asks for another order.
pub(super) fn page(all: Vec<Value>, part: &Part) -> Json<Value> {
    let id = |value: &Value| value["id"].as_str().map(str::to_owned);
    let after = part.after.as_ref();
    let start = after.and_then(|after| all.iter().position(|v| id(v).as_ref() == Some(after)));
    let start = start.map_or(0, |at| at + 1);
    let rest = all.len().saturating_sub(start);
    let limit = part.limit.unwrap_or(PAGE);
    let data: Vec<Value> = all.into_iter().skip(start).take(limit).collect();
    Json(json!({
        "object": "list", "has_more": rest > data.len(),
        "first_id": data.first().and_then(id), "last_id": data.last().and_then(id),
        "data": data,
    }))
}
