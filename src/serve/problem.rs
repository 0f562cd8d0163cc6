//! [`Problem`]: an error answer, in OpenAI's shape:
//! `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::body::to_bytes;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flowrun_lm::lm::LmError;
use flowrun_steps::serving::ModelsError;
use serde_json::{Value, json};

/// Bytes of an error's text at most.
const TEXT: usize = 64 << 10;

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

/// An answer whose error is in OpenAI's shape, whoever refused: what reads queries, paths and forms
/// for the handlers says it in plain text.
pub(super) async fn shaped(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let kind = response.headers().get(header::CONTENT_TYPE);
    let is_text = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if !is_error || !is_text {
        return response;
    }
    let text = to_bytes(response.into_body(), TEXT).await;
    let text = text.unwrap_or_default();
    Problem::new(status, String::from_utf8_lossy(&text)).into_response()
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
            LmError::Unavailable(why)
            | LmError::ServerError(why)
            | LmError::Barred(why)
            | LmError::NoModel(why) => Self::new(StatusCode::BAD_GATEWAY, why),
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
            ModelsError::NoRoom(why) => Self::new(StatusCode::BAD_GATEWAY, why),
            ModelsError::Down(why) => Self::new(StatusCode::SERVICE_UNAVAILABLE, why),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_plain_text_gets_the_shape_of_the_others() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let shape = |response: Response| {
            runtime.block_on(async {
                let shaped = shaped(response).await;
                let status = shaped.status();
                let body = to_bytes(shaped.into_body(), TEXT).await.unwrap();
                (status, String::from_utf8(body.to_vec()).unwrap())
            })
        };
        let (status, body) = shape((StatusCode::BAD_REQUEST, "no number").into_response());
        assert_eq!(status, StatusCode::BAD_REQUEST);
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["error"]["message"], "no number");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        let problem = Problem::no_model("m");
        let before = problem.body();
        let (status, body) = shape(problem.into_response());
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), before);
        let (status, body) = shape("Success".into_response());
        assert_eq!((status, body.as_str()), (StatusCode::OK, "Success"));
    }
}
