//! What the hub means when it refuses, and what the user can do: it says so in the headers
//! `X-Error-Code` and `X-Error-Message` of its answer.

use std::fmt;

use flowrun_engine::step::{StepError, StepErrorKind};
use ureq::http::Response;

use super::client::NoAnswer;
use super::settings::Settings;

/// Characters of the hub's own words that are passed on.
const SAID: usize = 200;
/// Its words for a token that is none; they come without a code.
const BAD_TOKEN: [&str; 3] = [
    "invalid credentials",
    "invalid username",
    "invalid user token",
];

/// What was asked for.
pub(super) struct Asked<'a> {
    /// `owner/name`, with the kind before it as in the URL of its page.
    pub(super) url: String,
    pub(super) revision: &'a str,
    /// None for the repository itself.
    pub(super) file: Option<&'a str>,
    pub(super) settings: &'a Settings,
}

impl fmt::Display for Asked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.file {
            Some(file) => write!(f, "`{}/{file}` at `{}`", self.url, self.revision),
            None => write!(f, "`{}` at `{}`", self.url, self.revision),
        }
    }
}

/// The hub could not be asked.
pub(super) fn no_answer(asked: &Asked<'_>, error: NoAnswer) -> StepError {
    let error = match error {
        NoAnswer::Stopped(error) => return error,
        NoAnswer::Failed(error) => *error,
    };
    let endpoint = &asked.settings.endpoint;
    let text = format!("{asked} cannot be had: `{endpoint}`: {error}");
    let kind = match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::TooManyRedirects => {
            StepErrorKind::Invalid
        }
        _ => StepErrorKind::Transient,
    };
    StepError::new(kind, text)
        .help("HF_ENDPOINT names another server; with `--offline` only the hub's cache is used")
}

/// The hub says that the repository has no such file.
pub(super) fn is_of_absent_file<B>(answer: &Response<B>) -> bool {
    let code = answer.headers().get("x-error-code");
    code.is_some_and(|code| code.as_bytes() == b"EntryNotFound")
}

/// There is no such file, though not in the hub's words: so answer servers that only hand files out.
pub(super) fn is_bare_absence<B>(answer: &Response<B>) -> bool {
    answer.status().as_u16() == 404 && !answer.headers().contains_key("x-error-code")
}

/// The hub's answer was no.
pub(super) fn explained<B>(asked: &Asked<'_>, answer: &Response<B>) -> StepError {
    let header = |name: &str| {
        let value = answer.headers().get(name)?.to_str().ok()?;
        Some(value.trim()).filter(|value| !value.is_empty())
    };
    let status = answer.status().as_u16();
    let said: String = header("x-error-message")
        .map(|said| format!(" ({})", said.chars().take(SAID).collect::<String>()))
        .unwrap_or_default();
    if status == 408 || status == 425 || status == 429 || status >= 500 {
        let text = format!("{asked} cannot be had now: the hub says {status}{said}");
        return StepError::new(StepErrorKind::Transient, text).help(match status {
            429 => "too many requests: wait, or set HF_TOKEN, which has a larger allowance",
            _ => "try again later",
        });
    }
    let endpoint = &asked.settings.endpoint;
    let page = format!("{endpoint}/{}", asked.url);
    let tokens = format!("{endpoint}/settings/tokens");
    let code = header("x-error-code").unwrap_or_default();
    let lower = said.to_ascii_lowercase();
    let is_bad_token = status == 401 && BAD_TOKEN.iter().any(|words| lower.contains(words));
    let (what, help) = match (code, &asked.settings.token) {
        (_, Some(token)) if is_bad_token => (
            format!("the hub does not accept the token in {}", token.source),
            format!(
                "it may have expired: make another at {tokens}, or unset it for what is public"
            ),
        ),
        ("GatedRepo", None) => (
            format!("`{}` is gated, and no token was sent", asked.url),
            format!(
                "accept its terms at {page}, make a token at {tokens}, and set HF_TOKEN \
                 (or run `hf auth login`)"
            ),
        ),
        ("GatedRepo", Some(token)) => (
            format!(
                "`{}` is gated, and the token in {} has no access to it",
                asked.url, token.source
            ),
            format!(
                "accept its terms at {page} with the account of the token, and wait where its \
                 owners must agree; a fine-grained token ({tokens}) needs read access to gated \
                 repositories"
            ),
        ),
        ("RevisionNotFound", _) => (
            format!("`{}` has no revision `{}`", asked.url, asked.revision),
            format!("its branches and tags are at {page}/tree/main"),
        ),
        ("EntryNotFound", _) => (
            format!(
                "`{}` has no file `{}` at `{}`",
                asked.url,
                asked.file.unwrap_or_default(),
                asked.revision
            ),
            format!("its files are at {page}/tree/{}", asked.revision),
        ),
        ("DisabledRepo", _) => (
            format!("`{}` was disabled", asked.url),
            format!("{page} may say why"),
        ),
        (code, token) if code == "RepoNotFound" || status == 401 => (
            format!("there is no `{}`, or it is private", asked.url),
            match token {
                None => "check the name; for a private one set HF_TOKEN (or run `hf auth login`)"
                    .to_owned(),
                Some(token) => format!(
                    "check the name, and that the token in {} may read it",
                    token.source
                ),
            },
        ),
        (_, Some(token)) if status == 403 => (
            format!("the token in {} may not read {asked}", token.source),
            format!("look at its permissions at {tokens}"),
        ),
        _ => (
            format!("{asked} cannot be had"),
            "check the names of repository, revision and file, and HF_ENDPOINT".to_owned(),
        ),
    };
    StepError::invalid(format!("{what}: the hub says {status}{said}")).help(help)
}
