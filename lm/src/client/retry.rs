//! What is tried again, and when: connection errors, 408, 409, 425, 429 and 5xx, with a wait that
//! doubles (jitter in its upper half), or the one that the server asks for. An answer that
//! cannot be read is tried again too, but not often: it is more often a wrong URL. What would
//! meet every other request as well (an expired key, no such model, no credit) bars them all.

use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::HeaderMap;

use super::OpenAiSpec;
use crate::lm::LmError;

const TOO_LONG: &str = "; the prompt and `max_tokens` are more than the model's context: use fewer \
                        demos, a smaller `max_tokens`, or a model with a longer context";

/// How one attempt failed.
pub(super) enum Failure {
    /// For good.
    Final(LmError),
    /// For good, and so will every other.
    Barred { why: String },
    /// The server has no such model, and so for every other.
    NoModel { why: String },
    /// The provider does not let the prompt through.
    Withheld,
    /// It may pass; the server may have said when.
    Again {
        why: String,
        after: Option<Duration>,
        /// It may be the word of a proxy that lost the answer, or did not wait for it.
        computed: bool,
        /// The server has an error of its own (5xx), perhaps at this request alone.
        erred: bool,
    },
    /// The connection broke, or no answer came in time: the server may have computed one.
    Lost { why: String },
    /// There was no connection.
    Unreachable { why: String },
    /// The answer cannot be read.
    Unreadable { why: String },
    /// The answer is larger than any that is read; another try would give the same.
    TooLarge { why: String },
}

/// Tries after the first one for an answer that cannot be read.
const REREADS: u32 = 2;

impl Failure {
    /// Tries after the first one, out of as many as are allowed for errors that pass.
    pub(super) fn retries(&self, allowed: u32) -> u32 {
        match self {
            Self::Final(_)
            | Self::Barred { .. }
            | Self::NoModel { .. }
            | Self::Withheld
            | Self::TooLarge { .. } => 0,
            Self::Again { .. } | Self::Lost { .. } | Self::Unreachable { .. } => allowed,
            Self::Unreadable { .. } => allowed.min(REREADS),
        }
    }

    /// The wait that the server asked for.
    pub(super) fn after(&self) -> Option<Duration> {
        match self {
            Self::Again { after, .. } => *after,
            _ => None,
        }
    }

    /// Whether the server may have computed, and charged for, an answer that did not arrive.
    pub(super) fn may_cost(&self) -> bool {
        match self {
            Self::Lost { .. } | Self::Unreadable { .. } | Self::TooLarge { .. } => true,
            Self::Again { computed, .. } => *computed,
            Self::Final(_)
            | Self::Barred { .. }
            | Self::NoModel { .. }
            | Self::Withheld
            | Self::Unreachable { .. } => false,
        }
    }

    /// Whether the server had an error of its own: 5xx.
    pub(super) fn is_server_error(&self) -> bool {
        matches!(self, Self::Again { erred: true, .. })
    }

    /// Whether a server that does this to many requests in a row answers nobody. What it refuses,
    /// it has answered.
    pub(super) fn is_no_answer(&self) -> bool {
        match self {
            Self::Again { .. }
            | Self::Lost { .. }
            | Self::Unreadable { .. }
            | Self::TooLarge { .. } => true,
            Self::Final(_)
            | Self::Barred { .. }
            | Self::NoModel { .. }
            | Self::Withheld
            | Self::Unreachable { .. } => false,
        }
    }

    /// The error once no try is left; `tries` says how many there were.
    pub(super) fn into_error(self, url: &str, tries: &str) -> LmError {
        match self {
            Self::Final(error) => error,
            Self::Barred { why } => LmError::Barred(why),
            Self::NoModel { why } => LmError::NoModel(why),
            Self::Withheld => LmError::Rejected(format!("{url}: the prompt was withheld")),
            Self::Again {
                why, erred: true, ..
            } => LmError::ServerError(format!("{url}: {why} ({tries})")),
            Self::Again { why, .. } | Self::Lost { why } => {
                LmError::Unavailable(format!("{url}: {why} ({tries})"))
            }
            Self::TooLarge { why } => LmError::Rejected(format!("{url}: {why}")),
            Self::Unreachable { why } => LmError::Unavailable(format!(
                "{url} cannot be reached: {why} ({tries}); is the server running?"
            )),
            Self::Unreadable { why } => {
                LmError::Unavailable(format!("{url}: {why} ({tries}); is `base_url` right?"))
            }
        }
    }
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
    /// The wait after so many attempts, where the server may have asked for one. One that asks for
    /// too little would have all tries used up in no time: only the first wait is as short as that.
    pub(super) fn wait(&self, attempts: u32, after: Option<Duration>) -> Duration {
        match after {
            None => self.backoff(attempts),
            Some(after) if attempts <= 1 => after,
            Some(after) => after.max(self.backoff(attempts - 1)),
        }
    }

    pub(super) fn backoff(&self, attempt: u32) -> Duration {
        let full = self
            .first
            .saturating_mul(1 << (attempt - 1).min(16))
            .min(self.longest);
        full.mul_f64(0.5 + 0.5 * rand::random::<f64>())
    }
}

/// The innermost reason of an error: the outer ones name the URL, whose query may hold a key.
pub(super) fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// An error of the connection. The request's URL is left out: its query may hold a key.
pub(super) fn of_error(error: &reqwest::Error) -> Failure {
    let why = cause(error);
    if error.is_builder() {
        Failure::Final(LmError::Rejected(why))
    } else if error.is_connect() {
        Failure::Unreachable { why }
    } else if error.is_timeout() {
        Failure::Lost {
            why: "no answer in time (`timeout_s`)".to_owned(),
        }
    } else {
        Failure::Lost { why }
    }
}

/// The code of a model that the server has not.
const NO_MODEL: &str = "model_not_found";
/// Codes of errors that no other request escapes, whatever their status.
const BARRING: [&str; 8] = [
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "account_deactivated",
    "invalid_api_key",
    NO_MODEL,
    "unsupported_parameter",
    "unsupported_value",
];
/// Statuses that proxies give when the server behind them may have computed an answer.
const BY_PROXIES: [u16; 5] = [408, 502, 503, 504, 524];
/// Codes of a prompt that does not fit into the context (OpenAI and `flowrun serve`; llama.cpp).
const TOO_LONG_CODES: [&str; 2] = ["context_length_exceeded", "exceed_context_size_error"];
/// The same in the words of servers that give it no code, in lower case.
const TOO_LONG_TEXTS: [&str; 5] = [
    // vLLM, DeepSeek.
    "maximum context length",
    // vLLM, for prompts that are too long without an answer.
    "longer than the maximum model length",
    "max_tokens must be at least 1, got -",
    // llama.cpp before it had a code.
    "exceeds the available context size",
    // SGLang.
    "longer than the model's context length",
];
/// Codes of a prompt that was withheld (Azure, OpenAI).
const WITHHELD: [&str; 2] = ["content_filter", "content_policy_violation"];

/// An answer that is no success, with the message and the code of its body.
pub(super) fn of_status(
    status: StatusCode,
    why: &str,
    code: Option<&str>,
    after: Option<Duration>,
    url: &str,
    spec: &OpenAiSpec,
) -> Failure {
    let status = status.as_u16();
    if status == 400 && code.is_some_and(|code| WITHHELD.contains(&code)) {
        return Failure::Withheld;
    }
    if is_too_long(why, code) {
        let why = format!("{url}: status {status}: {why}{TOO_LONG}");
        return Failure::Final(LmError::TooLong(why));
    }
    let barring = code.is_some_and(|code| BARRING.contains(&code));
    if !barring && (status >= 500 || [408, 409, 425, 429].contains(&status)) {
        let why = format!("status {status}: {why}");
        let computed = BY_PROXIES.contains(&status);
        return Failure::Again {
            why,
            after,
            computed,
            erred: status >= 500,
        };
    }
    let help = match (status, &spec.api_key_env) {
        (401 | 403, Some(name)) => format!("; check the key in `{name}`"),
        (401 | 403, None) => "; the server wants a key: set `api_key_env`".to_owned(),
        (402 | 429, _) => "; the account has no credit left".to_owned(),
        (404, _) => format!("; check `base_url` and the model id `{}`", spec.model),
        (413, _) => TOO_LONG.to_owned(),
        (400, _) if why.to_lowercase().contains("context") => TOO_LONG.to_owned(),
        (400, _) if barring => {
            "; `body` of the model's entry leaves fields out or adds some".into()
        }
        _ => String::new(),
    };
    let why = format!("{url}: status {status}: {why}{help}");
    match status {
        404 => Failure::NoModel { why },
        _ if code == Some(NO_MODEL) => Failure::NoModel { why },
        401 | 402 => Failure::Barred { why },
        _ if barring => Failure::Barred { why },
        _ => Failure::Final(LmError::Rejected(why)),
    }
}

/// Whether a prompt was refused for its length.
fn is_too_long(why: &str, code: Option<&str>) -> bool {
    let why = why.to_lowercase();
    code.is_some_and(|code| TOO_LONG_CODES.contains(&code))
        || TOO_LONG_TEXTS.iter().any(|text| why.contains(text))
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
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use reqwest::header::{HeaderName, HeaderValue};

    fn after_of(name: &'static str, value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        let value = HeaderValue::from_str(value).unwrap();
        headers.insert(HeaderName::from_static(name), value);
        after(&headers)
    }

    #[test]
    fn waits_are_read_in_every_form() {
        assert_eq!(after_of("retry-after", "2"), Some(Duration::from_secs(2)));
        assert_eq!(after_of("retry-after", "0"), Some(Duration::ZERO));
        let ms = after_of("retry-after-ms", "1500");
        assert_eq!(ms, Some(Duration::from_millis(1500)));
        let past = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(after_of("retry-after", past), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(9999));
        let wait = after_of("retry-after", &later).unwrap().as_secs();
        assert!((9000..=9999).contains(&wait), "{wait}");
        for nonsense in ["", "soon", "-1", "NaN"] {
            assert_eq!(after_of("retry-after", nonsense), None, "{nonsense}");
        }
        assert_eq!(after(&HeaderMap::new()), None);
    }

    #[test]
    fn what_a_proxy_says_of_a_server_may_have_cost() {
        let spec = serde_json::json!({"base_url": "http://h/v1", "model": "m"});
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        for (status, costs) in [
            (400, false),
            (401, false),
            (408, true),
            (429, false),
            (500, false),
            (502, true),
            (503, true),
            (504, true),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let failure = of_status(status, "", None, None, "http://h", &spec);
            assert_eq!(failure.may_cost(), costs, "{status}");
        }
        let large = Failure::TooLarge { why: String::new() };
        assert!(large.may_cost() && large.retries(6) == 0);
    }

    #[test]
    fn an_error_of_the_server_is_told_from_no_answer() {
        let spec = serde_json::json!({"base_url": "http://h/v1", "model": "m"});
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        let failure = |status: u16| {
            let status = StatusCode::from_u16(status).unwrap();
            of_status(status, "no", None, None, "http://h", &spec)
        };
        for (status, erred, no_answer) in [
            (400, false, false),
            (422, false, false),
            (408, false, true),
            (429, false, true),
            (500, true, true),
            (503, true, true),
        ] {
            assert_eq!(failure(status).is_server_error(), erred, "{status}");
            assert_eq!(failure(status).is_no_answer(), no_answer, "{status}");
            let error = failure(status).into_error("http://h", "1 attempts");
            let is = matches!(error, LmError::ServerError(_));
            assert_eq!(is, erred, "{status}: {error}");
        }
    }

    #[test]
    fn a_prompt_that_is_too_long_is_known_by_code_or_words() {
        let spec = serde_json::json!({"base_url": "http://h/v1", "model": "m"});
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        let failure = |status: u16, why: &str, code: Option<&str>| {
            let status = StatusCode::from_u16(status).unwrap();
            of_status(status, why, code, None, "http://h", &spec)
                .into_error("http://h", "1 attempt")
        };
        for (status, why, code) in [
            (400, "", Some("context_length_exceeded")),
            (
                400,
                "the request exceeds it",
                Some("exceed_context_size_error"),
            ),
            (
                500,
                "the request exceeds the available context size. try it",
                Some("server_error"),
            ),
            (
                400,
                "This model's maximum context length is 512 tokens. However, you requested 600",
                Some("BadRequestError"),
            ),
            (
                400,
                "The decoder prompt (length 2136) is longer than the maximum model length of 2048.",
                None,
            ),
            (400, "max_tokens must be at least 1, got -186.", None),
        ] {
            let error = failure(status, why, code);
            assert!(matches!(error, LmError::TooLong(_)), "{why}: {error}");
            let text = error.to_string();
            assert!(
                text.starts_with("context_length_exceeded: http://h: "),
                "{text}"
            );
        }
        for why in [
            "no such field",
            "the context is not known",
            "max_tokens must be at least 1",
        ] {
            let error = failure(400, why, Some("BadRequestError"));
            assert!(matches!(error, LmError::Rejected(_)), "{why}: {error}");
        }
    }

    #[test]
    fn a_server_that_asks_for_too_little_does_not_use_up_all_tries() {
        let pace = Pace::default();
        let (none, long) = (Duration::ZERO, Duration::from_secs(100));
        assert_eq!(pace.wait(1, Some(none)), none);
        assert!(pace.wait(2, Some(none)) >= Duration::from_millis(250));
        assert!(pace.wait(6, Some(none)) >= Duration::from_secs(4));
        assert_eq!(pace.wait(1, Some(long)), long);
        assert_eq!(pace.wait(6, Some(long)), long);
        assert!(pace.wait(1, None) >= Duration::from_millis(250));
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let pace = Pace::default();
        for (attempt, full) in [(1, 0.5), (2, 1.0), (6, 16.0), (7, 30.0), (u32::MAX, 30.0)] {
            let wait = pace.backoff(attempt).as_secs_f64();
            assert!((full / 2.0..=full).contains(&wait), "{attempt}: {wait}");
        }
    }
}
