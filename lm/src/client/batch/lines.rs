//! Lines of a batch: what they answer, and what that has cost.

use reqwest::StatusCode;
use serde_json::Value;

use super::{Answer, Batched};
use crate::client::retry::{self, Failure};
use crate::client::{fitting, wire};
use crate::lm::{LmError, Request, Spending};

/// What a request has cost.
#[derive(Clone, Copy)]
pub(super) enum Charge {
    Nothing,
    /// So many tokens, or up to its worst case.
    Used(Option<Spending>),
}

impl Batched {
    /// What a line answers, and what that has cost.
    pub(super) fn read(&self, line: &Value, request: &Request) -> (Answer, Charge) {
        let shown = "the batch";
        if let Some(message) = line.pointer("/error/message").and_then(Value::as_str) {
            let error = LmError::Unavailable(format!("{shown}: {message}"));
            return (Err(error), Charge::Nothing);
        }
        let body = &line["response"]["body"];
        let text = body.to_string();
        let status = status_of(line);
        let (read, charge) = if status.is_success() {
            let told = body["model"].as_str();
            let told = told.map(|told| wire::shown(told.as_bytes()));
            self.identity.check(told.as_deref());
            let read = wire::completion(text.as_bytes())
                .map_err(|why| Failure::Unreadable { why })
                .and_then(|answer| fitting(&self.spec, shown, request, answer));
            let most = wire::credible(&self.spec, request);
            (read, Charge::Used(wire::believed(wire::used(body), most)))
        } else {
            let why = wire::error_text(text.as_bytes());
            let code = wire::error_code(text.as_bytes());
            let code = code.as_deref();
            let failure = retry::of_status(status, &why, code, None, shown, &self.spec);
            let charge = match failure.may_cost() {
                true => Charge::Used(None),
                false => Charge::Nothing,
            };
            (Err(failure), charge)
        };
        let answer = match read {
            Err(Failure::Withheld) => Ok(wire::withheld()),
            read => read.map_err(|failure| failure.into_error(shown, "batch")),
        };
        (answer, charge)
    }
}

/// The HTTP status of a line's answer.
fn status_of(line: &Value) -> StatusCode {
    let status = line["response"]["status_code"].as_u64().unwrap_or(200);
    u16::try_from(status)
        .ok()
        .and_then(|n| StatusCode::from_u16(n).ok())
        .unwrap_or(StatusCode::OK)
}

/// Whether a line has an answer that was paid for.
pub(super) fn is_answer(line: &Value) -> bool {
    line["error"].is_null() && !line["response"]["body"].is_null() && status_of(line).is_success()
}
