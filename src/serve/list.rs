//! Lists in OpenAI's shape, part by part.

use axum::Json;
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;

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
///
/// # Errors
/// When it is to begin behind something that the list has not (any more): a client that goes from
/// part to part would begin anew without end.
pub(super) fn page(all: Vec<Value>, part: &Part) -> Result<Json<Value>, Problem> {
    let id = |value: &Value| value["id"].as_str().map(str::to_owned);
    let start = match &part.after {
        None => 0,
        Some(after) => {
            let at = all.iter().position(|value| value["id"] == after.as_str());
            let missing = || Problem::bad(format!("`after`: there is no `{after}` here"));
            at.ok_or_else(|| missing().of("after"))? + 1
        }
    };
    let rest = all.len() - start;
    let limit = part.limit.unwrap_or(PAGE);
    let data: Vec<Value> = all.into_iter().skip(start).take(limit).collect();
    Ok(Json(json!({
        "object": "list", "has_more": rest > data.len(),
        "first_id": data.first().and_then(id), "last_id": data.last().and_then(id),
        "data": data,
    })))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_and_nothing_follows_what_is_not_there() {
        let part = |after: Option<&str>, limit: usize| {
            let all = ["a", "b", "c"].map(|id| json!({"id": id})).to_vec();
            let part = Part {
                after: after.map(str::to_owned),
                limit: Some(limit),
            };
            page(all, &part)
        };
        let Json(first) = part(None, 2).unwrap();
        assert_eq!(
            (&first["last_id"], &first["has_more"]),
            (&json!("b"), &json!(true))
        );
        let Json(rest) = part(Some("b"), 2).unwrap();
        assert_eq!(rest["data"], json!([{"id": "c"}]));
        assert_eq!(rest["has_more"], false);
        let Json(last) = part(Some("c"), 2).unwrap();
        assert_eq!(
            (&last["first_id"], &last["has_more"]),
            (&Value::Null, &json!(false))
        );
        let gone = part(Some("d"), 2).unwrap_err().body();
        assert_eq!(gone["error"]["param"], "after");
    }
}
