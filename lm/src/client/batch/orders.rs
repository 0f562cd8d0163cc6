//! Batches at the server: places one, finds one that was placed, waits for its lines.

use serde_json::{Value, json};

use super::folder::Order;
use super::{Batched, FIRST_LOOK, failed, longer};
use crate::client::wire;
use crate::lm::LmError;

/// Batches in a page of the list.
const PAGE: &str = "100";

/// How a batch ended.
pub(super) struct Ended {
    /// In words.
    pub(super) told: String,
    /// Its lines.
    pub(super) lines: String,
    /// The server took none of its requests.
    pub(super) refused: bool,
    /// The server does not know it, or its answers, any more.
    pub(super) gone: bool,
}

impl Batched {
    /// Orders a batch.
    pub(super) fn place(&self, text: &str) -> Result<Order, LmError> {
        let path = self.folder.write_requests(text)?;
        let file = self.api.upload(&["files"], &path, &[("purpose", "batch")]);
        let mut order = Order {
            file: text_of(&file.map_err(failed)?, "id")?,
            batch: None,
        };
        self.folder.write_order(&order)?;
        let body = json!({
            "input_file_id": order.file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        });
        let batch = self.api.post(&["batches"], &body).map_err(failed)?;
        order.batch = Some(text_of(&batch, "id")?);
        self.folder.write_order(&order)?;
        Ok(order)
    }

    /// The order that was written down, if the server made a batch of it.
    pub(super) fn placed(&self) -> Result<Option<Order>, LmError> {
        let Some(order) = self.folder.order()? else {
            return Ok(None);
        };
        if order.batch.is_some() {
            return Ok(Some(order));
        }
        // It may have been made without our hearing of it.
        let mut after = String::new();
        loop {
            let mut query = vec![("limit", PAGE)];
            if !after.is_empty() {
                query.push(("after", &after));
            }
            let page = self.api.get(&["batches"], &query).map_err(failed)?;
            let all = page["data"].as_array().map_or(&[][..], Vec::as_slice);
            let ours = all
                .iter()
                .find(|batch| batch["input_file_id"] == order.file.as_str());
            if let Some(batch) = ours {
                let batch = Some(text_of(batch, "id")?);
                return Ok(Some(Order { batch, ..order }));
            }
            let Some(last) = all.last().filter(|_| page["has_more"] == true) else {
                return Ok(None);
            };
            let last = text_of(last, "id")?;
            // A server that knows no `after` lists the same again.
            if last == after {
                return Ok(None);
            }
            after = last;
        }
    }

    /// Waits for a batch and fetches its lines.
    pub(super) fn collect(&self, order: &Order) -> Result<Ended, LmError> {
        let id = order.batch.as_deref().unwrap_or_default();
        let mut wait = FIRST_LOOK;
        let batch = loop {
            let batch = match self.api.get(&["batches", id], &[]) {
                Ok(batch) => batch,
                Err(error) if error.status() == Some(404) => {
                    let told =
                        format!("the server does not know the batch `{id}` any more, it is gone");
                    return Ok(Ended {
                        told,
                        lines: String::new(),
                        refused: false,
                        gone: true,
                    });
                }
                Err(error) => return Err(failed(error)),
            };
            let status = text_of(&batch, "status")?;
            let counts = &batch["request_counts"];
            let count = |name: &str| counts[name].as_u64().unwrap_or(0);
            let text = format!("batch {id}: {status}");
            (self.told)(count("completed") + count("failed"), count("total"), &text);
            if ["completed", "failed", "expired", "cancelled"].contains(&status.as_str()) {
                break batch;
            }
            self.api.pause(wait).map_err(failed)?;
            wait = longer(wait);
        };
        let mut lines = String::new();
        let mut gone = false;
        for name in ["output_file_id", "error_file_id"] {
            let Some(file) = batch[name].as_str() else {
                continue;
            };
            match self.api.text(&["files", file, "content"]) {
                Ok(text) => lines += &text,
                // Deleted, or kept for so long only: to ask for it again would be in vain for ever.
                Err(error) if error.status() == Some(404) => gone = true,
                Err(error) => return Err(failed(error)),
            }
            lines.push('\n');
        }
        let status = text_of(&batch, "status")?;
        // Its file was not taken; one that failed in its midst has answers.
        let refused = status == "failed" && lines.trim().is_empty() && !gone;
        let why = batch
            .pointer("/errors/data/0/message")
            .and_then(Value::as_str);
        let told = match why.filter(|_| refused) {
            Some(why) => format!("the server refused the batch `{id}`: {why}"),
            None if gone => format!("the answers of the batch `{id}` are gone from the server"),
            None => format!("the batch `{id}` ended as {status}"),
        };
        Ok(Ended {
            told,
            lines,
            refused,
            gone,
        })
    }
}

fn text_of(object: &Value, name: &str) -> Result<String, LmError> {
    object[name].as_str().map(str::to_owned).ok_or_else(|| {
        let shown = wire::shown(object.to_string().as_bytes());
        LmError::Unavailable(format!("the server's batch API gave no `{name}`: {shown}"))
    })
}
