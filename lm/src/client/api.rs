//! [`Api`]: what an OpenAI-compatible server offers besides chats. One call at a time, blocking.
//!
//! Knows no meaning of the bodies. Invariant: as for the chat client, no error shows the key, and
//! a call that may have had an effect is never sent twice.

use std::path::Path;
use std::time::Duration;

use reqwest::blocking::multipart::{Form, Part};
use reqwest::blocking::{Client, RequestBuilder};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::endpoint::Endpoint;
use super::retry::{self, Pace};
use super::{CONNECT_WITHIN, Cancelled, LOOK_EVERY, OpenAiSpec, sendable, wire};

/// Calls after the first one, where the first did nothing for certain.
const RETRIES: u32 = 6;
/// How long a call may take that sends no file.
const CALL: Duration = Duration::from_secs(60);
/// Longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// How long a file may take on its way.
const UPLOAD: Duration = Duration::from_secs(3600);

/// A server's API.
pub struct Api {
    base_url: String,
    key: Option<String>,
    key_name: Option<String>,
    client: Client,
    cancelled: Cancelled,
    pace: Pace,
}

/// Why a call gave nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The server said no.
    #[error("{url}: status {status}: {message}")]
    Status {
        /// What was called.
        url: String,
        /// HTTP status.
        status: u16,
        /// What the server said.
        message: String,
    },
    /// There was no answer, or none that can be read.
    #[error("{url}: {why}")]
    Unavailable {
        /// What was called.
        url: String,
        /// Why.
        why: String,
    },
    /// It can never be sent.
    #[error("{0}")]
    Invalid(String),
    /// The run was asked to stop.
    #[error("stopped before it finished")]
    Cancelled,
}

impl ApiError {
    /// The status that the server answered with.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the same call may do better later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            Self::Unavailable { .. } => true,
            Self::Invalid(_) | Self::Cancelled => false,
        }
    }
}

/// What came of one attempt.
enum Failed {
    /// The server saw nothing of it, or said to come again: it may be sent once more.
    Unseen(ApiError, Option<Duration>),
    /// It may have had its effect.
    Seen(ApiError),
}

impl Api {
    /// The API at the `base_url` of a model entry; nothing is sent yet.
    ///
    /// # Errors
    /// [`ApiError::Invalid`] when `base_url` is no URL of a server or the key cannot be sent.
    pub fn new(
        spec: &OpenAiSpec,
        key: Option<String>,
        cancelled: Cancelled,
    ) -> Result<Self, ApiError> {
        let endpoint = Endpoint::new(&spec.base_url, &[]).map_err(ApiError::Invalid)?;
        let key = sendable(key, spec.api_key_env.as_deref()).map_err(ApiError::Invalid)?;
        let mut builder = Client::builder()
            .timeout(CALL)
            .connect_timeout(CONNECT_WITHIN);
        if endpoint.loopback {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|e| ApiError::Unavailable {
            url: endpoint.shown,
            why: format!("no HTTP client: {e}"),
        })?;
        Ok(Self {
            base_url: spec.base_url.clone(),
            key,
            key_name: spec.api_key_env.clone(),
            client,
            cancelled,
            pace: Pace::default(),
        })
    }

    /// Reads something: `path` is given in segments.
    ///
    /// # Errors
    /// [`ApiError`]; what may pass was tried again.
    pub fn get(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, ApiError> {
        self.call(path, true, |client, url| {
            client.request(Method::GET, url).query(query)
        })
    }

    /// Has the server do something.
    ///
    /// # Errors
    /// [`ApiError`]. Tried again only where the server did nothing for certain.
    pub fn post(&self, path: &[&str], body: &Value) -> Result<Value, ApiError> {
        self.call(path, false, |client, url| client.post(url).json(body))
    }

    /// Uploads a file with the other fields of its form.
    ///
    /// # Errors
    /// As [`Api::post`]; invalid when the file cannot be read.
    pub fn upload(
        &self,
        path: &[&str],
        file: &Path,
        fields: &[(&str, &str)],
    ) -> Result<Value, ApiError> {
        let unreadable = |e: std::io::Error| ApiError::Invalid(format!("{}: {e}", file.display()));
        let bytes = std::fs::read(file).map_err(unreadable)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        self.call(path, false, |client, url| {
            let part = Part::bytes(bytes.clone()).file_name(name.clone().into_owned());
            let form = fields.iter().fold(Form::new(), |form, (name, value)| {
                form.text((*name).to_owned(), (*value).to_owned())
            });
            client
                .post(url)
                .timeout(UPLOAD)
                .multipart(form.part("file", part))
        })
    }

    /// Reads a file, as text.
    ///
    /// # Errors
    /// As [`Api::get`]; unavailable when it is no text.
    pub fn text(&self, path: &[&str]) -> Result<String, ApiError> {
        let bytes = self.bytes(path, true, |client, url| {
            client.request(Method::GET, url).timeout(UPLOAD)
        })?;
        String::from_utf8(bytes).map_err(|_| ApiError::Unavailable {
            url: path.join("/"),
            why: "the file is no text".to_owned(),
        })
    }

    fn call(
        &self,
        path: &[&str],
        harmless: bool,
        request: impl Fn(&Client, reqwest::Url) -> RequestBuilder,
    ) -> Result<Value, ApiError> {
        let bytes = self.bytes(path, harmless, request)?;
        // Some servers answer in words.
        let text = || Value::String(wire::shown(&bytes));
        Ok(serde_json::from_slice(&bytes).unwrap_or_else(|_| text()))
    }

    fn bytes(
        &self,
        path: &[&str],
        harmless: bool,
        request: impl Fn(&Client, reqwest::Url) -> RequestBuilder,
    ) -> Result<Vec<u8>, ApiError> {
        let endpoint = Endpoint::new(&self.base_url, path).map_err(ApiError::Invalid)?;
        let mut attempts = 0;
        loop {
            let mut call = request(&self.client, endpoint.url.clone());
            if let Some(key) = &self.key {
                call = call.bearer_auth(key);
            }
            let failed = match self.send(call, &endpoint.shown) {
                Ok(bytes) => return Ok(bytes),
                Err(failed) => failed,
            };
            attempts += 1;
            let (error, after) = match failed {
                Failed::Unseen(error, after) => (error, after),
                Failed::Seen(error) if harmless && error.may_pass() => (error, None),
                Failed::Seen(error) => return Err(error),
            };
            if attempts > RETRIES {
                return Err(error);
            }
            let wait = after.map(|wait| wait.min(LONGEST_WAIT));
            self.pause(wait.unwrap_or(self.pace.backoff(attempts)))?;
        }
    }

    fn send(&self, call: RequestBuilder, url: &str) -> Result<Vec<u8>, Failed> {
        let unavailable = |why: String| ApiError::Unavailable {
            url: url.to_owned(),
            why,
        };
        let answer = call.send().map_err(|e| {
            let error = unavailable(retry::cause(&e));
            match e.is_connect() {
                true => Failed::Unseen(error, None),
                false => Failed::Seen(error),
            }
        })?;
        let (status, after) = (answer.status(), retry::after(answer.headers()));
        let bytes = answer.bytes();
        let bytes = bytes.map_err(|e| Failed::Seen(unavailable(retry::cause(&e))))?;
        if status.is_success() {
            return Ok(bytes.into());
        }
        let error = ApiError::Status {
            url: url.to_owned(),
            status: status.as_u16(),
            message: self.explained(status, &wire::error_text(&bytes)),
        };
        Err(match status {
            // A 503 may be a proxy's word on an answer that it lost.
            StatusCode::TOO_MANY_REQUESTS => Failed::Unseen(error, after),
            _ => Failed::Seen(error),
        })
    }

    /// What the server said, without the key, which some repeat.
    fn explained(&self, status: StatusCode, message: &str) -> String {
        let message = match &self.key {
            Some(key) => message.replace(key.as_str(), "[key]"),
            None => message.to_owned(),
        };
        match (status.as_u16(), &self.key_name) {
            (401 | 403, Some(name)) => format!("{message}; check the key in `{name}`"),
            (401 | 403, None) => format!("{message}; the server wants a key: set `api_key_env`"),
            _ => message,
        }
    }

    /// Waits; ends at once when the run was asked to stop.
    ///
    /// # Errors
    /// [`ApiError::Cancelled`].
    pub fn pause(&self, mut left: Duration) -> Result<(), ApiError> {
        loop {
            if (self.cancelled)() {
                return Err(ApiError::Cancelled);
            }
            if left.is_zero() {
                return Ok(());
            }
            let step = left.min(LOOK_EVERY);
            std::thread::sleep(step);
            left -= step;
        }
    }
}
