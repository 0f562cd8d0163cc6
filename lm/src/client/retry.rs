//! What is tried again, and when: connection errors, 408, 409, 425, 429 and 5xx, with a wait that
//! doubles (full jitter in its upper half), or the one that the server asks for.

use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::HeaderMap;

use super::OpenAiSpec;
use crate::lm::LmError;

/// Longest wait that a server may ask for.
const LONGEST: Duration = Duration::from_secs(300);

/// How one attempt failed.
pub(super) enum Failure {
    /// For good.
    Final(LmError),
    /// It may pass; the server may have said when.
    Again {
        why: String,
        after: Option<Duration>,
    },
    /// There was no connection.
    Unreachable { why: String },
}

/// Waits between attempts.
pub(super) struct Pace {
    pub(super) first: Duration,
    pub(super) longest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            longest: Duration::from_secs(30),
        }
    }
}

impl Pace {
    pub(super) fn backoff(&self, attempt: u32) -> Duration {
        let full = self
            .first
            .saturating_mul(1 << (attempt - 1).min(16))
            .min(self.longest);
        full.mul_f64(0.5 + 0.5 * rand::random::<f64>())
    }
}

/// An error of the connection.
pub(super) fn of_error(error: &reqwest::Error) -> Failure {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let why = cause.to_string();
    if error.is_connect() {
        Failure::Unreachable { why }
    } else if error.is_timeout() {
        Failure::Again {
            why: "no answer in time (`timeout_s`)".to_owned(),
            after: None,
        }
    } else {
        Failure::Again { why, after: None }
    }
}

/// An answer that is no success.
pub(super) fn of_status(
    status: StatusCode,
    why: &str,
    after: Option<Duration>,
    url: &str,
    spec: &OpenAiSpec,
) -> Failure {
    if status.is_server_error() || [408, 409, 425, 429].contains(&status.as_u16()) {
        let why = format!("status {}: {why}", status.as_u16());
        return Failure::Again { why, after };
    }
    let help = match (status.as_u16(), &spec.api_key_env) {
        (401 | 403, Some(name)) => format!("; check the key in `{name}`"),
        (401 | 403, None) => "; the server wants a key: set `api_key_env`".to_owned(),
        (404, _) => format!("; check `base_url` and the model id `{}`", spec.model),
        _ => String::new(),
    };
    Failure::Final(LmError::Rejected(format!(
        "{url}: status {}: {why}{help}",
        status.as_u16()
    )))
}

/// `retry-after-ms`, or `Retry-After` in seconds or as a date.
pub(super) fn after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let seconds = match text("retry-after-ms").and_then(number) {
        Some(ms) => ms / 1000.0,
        None => {
            let text = text("retry-after")?;
            number(text).or_else(|| {
                let date = httpdate::parse_http_date(text).ok()?;
                let left = date.duration_since(SystemTime::now()).unwrap_or_default();
                Some(left.as_secs_f64())
            })?
        }
    };
    Duration::try_from_secs_f64(seconds)
        .ok()
        .map(|wait| wait.min(LONGEST))
}
