//! [`Problem`]: an error answer, in OpenAI's shape:
//! `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::queue::Refused;

/// An error answer.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    message: String,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    /// The request is wrong.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// The same, with the field that is to blame.
    pub(super) fn of(mut self, param: &'static str) -> Self {
        self.param = Some(param);
        self
    }

    /// The same, with OpenAI's word for it.
    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let body = json!({"error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }});
        let mut response = (self.status, Json(body)).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            let wait = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, wait);
        }
        response
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        // 415 and 413 keep their status; OpenAI's word for any other unreadable body is 400.
        let status = match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            other => other,
        };
        Self::new(status, rejection.body_text())
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too many requests are waiting; try again in a moment",
            ),
            Refused::TimedOut => Self::new(StatusCode::GATEWAY_TIMEOUT, "the answer took too long"),
            Refused::Down => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the server cannot compute any more; restart it",
            ),
            Refused::NoModel => Self::new(
                StatusCode::NOT_FOUND,
                "this bundle's program asks no language model; use POST /predict",
            )
            .code("model_not_found"),
        }
    }
}
