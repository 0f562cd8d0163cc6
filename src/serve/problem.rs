//! [`Problem`]: an error answer, in OpenAI's shape:
//! `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flowrun_lm::lm::LmError;
use flowrun_steps::serving::ModelsError;
use serde_json::{Value, json};

/// An error answer.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

/// Why a request was not computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many are waiting.
    Full,
    /// It took too long.
    TimedOut,
    /// The thread that computes is gone.
    Down,
    /// The bundle's program asks no language model.
    NoModel,
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

    /// The server is wrong.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// Something that this server cannot do.
    pub(super) fn unsupported(what: &str) -> Self {
        let text = format!("{what}: not supported by this server");
        Self::bad(text).code("unsupported_parameter")
    }

    /// There is no such model.
    pub(super) fn no_model(id: &str) -> Self {
        let text =
            format!("the model `{id}` does not exist here; GET /v1/models lists those that do");
        Self::new(StatusCode::NOT_FOUND, text)
            .of("model")
            .code("model_not_found")
    }

    /// There is only a model.
    pub(super) fn no_program() -> Self {
        let text =
            "this server has a model and no program; use /v1/chat/completions, or serve a bundle";
        Self::new(StatusCode::NOT_FOUND, text).code("no_program")
    }

    /// The same, with the field that is to blame.
    pub(super) fn of(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The same, with the entry of a list that it is in.
    pub(super) fn within(mut self, entry: &str) -> Self {
        self.message = format!("{entry}: {}", self.message);
        self.param = Some(match self.param {
            Some(field) => format!("{entry}.{field}"),
            None => entry.to_owned(),
        });
        self
    }

    /// The same, with OpenAI's word for it.
    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// Its HTTP status.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// What goes over the wire.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
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
            )
            .code("queue_full"),
            Refused::TimedOut => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "the answer took too long").code("timeout")
            }
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

impl From<LmError> for Problem {
    fn from(error: LmError) -> Self {
        match error {
            LmError::Rejected(why) => Self::bad(why),
            LmError::TooLong(why) => Self::bad(why).code("context_length_exceeded"),
            LmError::Unavailable(why) | LmError::Barred(why) | LmError::NoModel(why) => {
                Self::new(StatusCode::BAD_GATEWAY, why)
            }
            LmError::Cancelled => Refused::Down.into(),
        }
    }
}

impl From<ModelsError> for Problem {
    fn from(error: ModelsError) -> Self {
        match error {
            ModelsError::Unknown(id) => Self::no_model(&id),
            ModelsError::Forbidden(why) => Self::new(StatusCode::FORBIDDEN, why),
            ModelsError::Taken(_) => Self::bad(error.to_string()).of("lora_name"),
            ModelsError::Full(_) => Self::bad(error.to_string())
                .of("lora_name")
                .code("too_many_adapters"),
            ModelsError::Unusable(why) => Self::bad(why).code("invalid_adapter"),
        }
    }
}
