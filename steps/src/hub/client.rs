//! [`Client`]: requests to the hub. Invariant: the user's token goes to the endpoint alone, never
//! to where the hub sends a request on to. Whoever waits for an answer hears the cancel flag.

use std::time::Duration;

use flowrun_engine::step::StepError;
use ureq::http::{Response, StatusCode};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, Error, RequestBuilder};

use super::settings::Settings;
use crate::waiting::unless_stopped;

/// How long a server may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long it may take to begin its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// How long nothing may come of an answer that has begun.
const SILENCE: Duration = Duration::from_secs(60);
/// Redirections of one request.
const REDIRECTIONS: usize = 5;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The work was told to stop, or cannot wait.
    Stopped(StepError),
    Failed(Box<Error>),
}

impl From<Box<Error>> for NoAnswer {
    fn from(error: Box<Error>) -> Self {
        Self::Failed(error)
    }
}

/// Asks the hub.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a Settings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A range of a compressed body is no range of the file.
            .accept_encoding("identity")
            .user_agent(concat!("flowrun/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_WITHIN))
            .timeout_recv_response(Some(ANSWER_WITHIN))
            .timeout_per_read(Some(SILENCE))
            .build();
        Self {
            agent: Agent::new_with_config(config),
            settings,
        }
    }

    /// What is at `url`, from this byte on, wherever it lies.
    pub(super) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, NoAnswer> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTIONS {
            let mut request = self.agent.get(url.as_str());
            if let Some(bearer) = self.bearer(&url) {
                request = request.header("Authorization", bearer);
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let answer = self.answer(request)?;
            match redirected(&answer, &url) {
                Some(next) => url = next,
                None => return Ok(answer),
            }
        }
        Err(Box::new(Error::TooManyRedirects).into())
    }

    /// What the hub itself says of `url`: it describes files that lie elsewhere in the very
    /// answer that sends there.
    pub(super) fn head(&self, url: &str) -> Result<Response<Body>, NoAnswer> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTIONS {
            let mut request = self.agent.head(url.as_str());
            if let Some(bearer) = self.bearer(&url) {
                request = request.header("Authorization", bearer);
            }
            let answer = self.answer(request)?;
            match redirected(&answer, &url) {
                Some(next) if self.is_ours(&next) => url = next,
                _ => return Ok(answer),
            }
        }
        Err(Box::new(Error::TooManyRedirects).into())
    }

    /// The text of an answer's body.
    pub(super) fn text(&self, mut answer: Response<Body>) -> Result<String, NoAnswer> {
        let cancel = &self.settings.cancel;
        let read = unless_stopped(cancel, move || {
            answer.body_mut().read_to_string().map_err(Box::new)
        });
        Ok(read.map_err(NoAnswer::Stopped)??)
    }

    fn answer(&self, request: RequestBuilder<WithoutBody>) -> Result<Response<Body>, NoAnswer> {
        let answer = unless_stopped(&self.settings.cancel, move || {
            request.call().map_err(Box::new)
        });
        Ok(answer.map_err(NoAnswer::Stopped)??)
    }

    fn bearer(&self, url: &str) -> Option<String> {
        let token = self.settings.token.as_ref();
        token.filter(|_| self.is_ours(url)).map(|t| t.bearer())
    }

    fn is_ours(&self, url: &str) -> bool {
        origin(url) == origin(&self.settings.endpoint)
    }
}

/// Where an answer sends on to.
fn redirected<B>(answer: &Response<B>, from: &str) -> Option<String> {
    let sends_on = [
        StatusCode::MOVED_PERMANENTLY,
        StatusCode::FOUND,
        StatusCode::SEE_OTHER,
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    if !sends_on.contains(&answer.status()) {
        return None;
    }
    let to = answer.headers().get("location")?.to_str().ok()?;
    if to.starts_with("https://") || to.starts_with("http://") {
        return Some(to.to_owned());
    }
    let within = to.starts_with('/') && !to.starts_with("//");
    within.then(|| format!("{}{to}", origin(from)))
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']);
    &url[..end.map_or(url.len(), |at| host + at)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent_on(to: &str) -> Option<String> {
        let answer = Response::builder().status(302).header("location", to);
        redirected(&answer.body(()).ok()?, "http://hub:1/a/b?c")
    }

    #[test]
    fn an_answer_sends_on_within_its_server_or_to_another() {
        assert_eq!(sent_on("/x/y").as_deref(), Some("http://hub:1/x/y"));
        assert_eq!(sent_on("https://cdn/x").as_deref(), Some("https://cdn/x"));
        assert_eq!(sent_on("//cdn/x"), None);
        let plain = Response::builder().status(200).header("location", "/x");
        let plain = plain.body(()).ok();
        assert_eq!(
            plain.and_then(|answer| redirected(&answer, "http://a")),
            None
        );
    }

    #[test]
    fn an_origin_holds_what_stands_before_the_path() {
        assert_eq!(origin("http://hub:1/a/b"), "http://hub:1");
        assert_eq!(origin("https://hub"), "https://hub");
        assert_eq!(origin("https://hub?x=/"), "https://hub");
        assert_ne!(origin("https://hub@evil/x"), origin("https://hub/x"));
    }
}
