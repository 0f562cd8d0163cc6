//! [`Api`]: what an OpenAI-compatible server offers besides chats. One call at a time, blocking.
//!
//! Knows no meaning of the bodies. Invariant: as for the chat client, no error shows the key, and
//! a call that may have had an effect is never sent twice. A file on its way is given up when the
//! run was asked to stop; a short call is not, so that what it did is heard of.

use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;
use reqwest::multipart::{Form, Part};
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::Value;

use super::endpoint::Endpoint;
use super::retry::{self, Pace};
use super::runtime::Runtime;
use super::{CONNECT_WITHIN, Cancelled, LOOK_EVERY, OpenAiSpec, sendable, wire};

/// Calls after the first one, where the first did nothing for certain.
const RETRIES: u32 = 6;
/// How long a call may take that sends no file.
const CALL: Duration = Duration::from_secs(60);
/// Longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// How long a file may take on its way.
const UPLOAD: Duration = Duration::from_secs(3600);
/// How long a server may be silent in the midst of an answer, or before it sends a file.
const SILENCE: Duration = Duration::from_secs(60);

/// What a call is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Reads something short.
    Read,
    /// Has an effect.
    Act,
    /// Brings a file up.
    Upload,
    /// Brings a file down.
    Download,
}

impl Kind {
    /// It may be sent again, whatever became of it.
    fn is_harmless(self) -> bool {
        matches!(self, Self::Read | Self::Download)
    }

    /// It may take long, and is given up when the run was asked to stop.
    fn is_transfer(self) -> bool {
        matches!(self, Self::Upload | Self::Download)
    }
}

/// A server's API.
pub struct Api {
    base_url: String,
    key: Option<String>,
    key_name: Option<String>,
    client: Client,
    runtime: Runtime,
    cancelled: Cancelled,
    pace: Pace,
    silence: Duration,
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
        let unavailable = |why: String| ApiError::Unavailable {
            url: endpoint.shown.clone(),
            why,
        };
        let client = builder.build();
        let client = client.map_err(|e| unavailable(format!("no HTTP client: {e}")))?;
        let runtime = Runtime::new("openai-api").map_err(unavailable)?;
        Ok(Self {
            base_url: spec.base_url.clone(),
            key,
            key_name: spec.api_key_env.clone(),
            client,
            runtime,
            cancelled,
            pace: Pace::default(),
            silence: SILENCE,
        })
    }

    /// Reads something: `path` is given in segments.
    ///
    /// # Errors
    /// [`ApiError`]; what may pass was tried again.
    pub fn get(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, ApiError> {
        self.call(path, Kind::Read, |client, url| {
            client.request(Method::GET, url).query(query)
        })
    }

    /// Has the server do something.
    ///
    /// # Errors
    /// [`ApiError`]. Tried again only where the server did nothing for certain.
    pub fn post(&self, path: &[&str], body: &Value) -> Result<Value, ApiError> {
        self.call(path, Kind::Act, |client, url| client.post(url).json(body))
    }

    /// Uploads a file with the other fields of its form.
    ///
    /// # Errors
    /// As [`Api::post`]; invalid when the file cannot be read; cancelled as soon as the run was asked
    /// to stop.
    pub fn upload(
        &self,
        path: &[&str],
        file: &Path,
        fields: &[(&str, &str)],
    ) -> Result<Value, ApiError> {
        let unreadable = |e: std::io::Error| ApiError::Invalid(format!("{}: {e}", file.display()));
        let bytes = std::fs::read(file).map_err(unreadable)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        self.call(path, Kind::Upload, |client, url| {
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
    /// As [`Api::get`]; unavailable when it is no text; cancelled as soon as the run was asked to
    /// stop.
    pub fn text(&self, path: &[&str]) -> Result<String, ApiError> {
        let bytes = self.bytes(path, Kind::Download, |client, url| {
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
        kind: Kind,
        request: impl Fn(&Client, reqwest::Url) -> RequestBuilder,
    ) -> Result<Value, ApiError> {
        let bytes = self.bytes(path, kind, request)?;
        // Some servers answer in words.
        let text = || Value::String(wire::shown(&bytes));
        Ok(serde_json::from_slice(&bytes).unwrap_or_else(|_| text()))
    }

    fn bytes(
        &self,
        path: &[&str],
        kind: Kind,
        request: impl Fn(&Client, reqwest::Url) -> RequestBuilder,
    ) -> Result<Vec<u8>, ApiError> {
        let endpoint = Endpoint::new(&self.base_url, path).map_err(ApiError::Invalid)?;
        let mut attempts = 0;
        loop {
            let mut call = request(&self.client, endpoint.url.clone());
            if let Some(key) = &self.key {
                call = call.bearer_auth(key);
            }
            let failed = match self.send(call, &endpoint.shown, kind) {
                Ok(bytes) => return Ok(bytes),
                Err(failed) => failed,
            };
            attempts += 1;
            let (error, after) = match failed {
                Failed::Unseen(error, after) => (error, after),
                Failed::Seen(error) if kind.is_harmless() && error.may_pass() => (error, None),
                Failed::Seen(error) => return Err(error),
            };
            if attempts > RETRIES {
                return Err(error);
            }
            let wait = after.map(|wait| wait.min(LONGEST_WAIT));
            self.pause(wait.unwrap_or(self.pace.backoff(attempts)))?;
        }
    }

    fn send(&self, call: RequestBuilder, url: &str, kind: Kind) -> Result<Vec<u8>, Failed> {
        let stopped = || Err(Failed::Seen(ApiError::Cancelled));
        if kind.is_transfer() && (self.cancelled)() {
            return stopped();
        }
        let sent = self.runtime.block_on(async {
            let work = self.exchange(call, url, kind);
            if !kind.is_transfer() {
                return work.await;
            }
            tokio::select! {
                biased;
                done = work => done,
                () = self.is_to_stop() => stopped(),
            }
        });
        sent.unwrap_or_else(stopped)
    }

    async fn is_to_stop(&self) {
        while !(self.cancelled)() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn exchange(
        &self,
        call: RequestBuilder,
        url: &str,
        kind: Kind,
    ) -> Result<Vec<u8>, Failed> {
        let unavailable = |why: String| ApiError::Unavailable {
            url: url.to_owned(),
            why,
        };
        let silent = |_| {
            let limit = self.silence.as_secs_f64();
            Failed::Seen(unavailable(format!("nothing came for {limit} s")))
        };
        let sent = match kind {
            Kind::Download => tokio::time::timeout(self.silence, call.send())
                .await
                .map_err(silent)?,
            // What goes up has a time of its own.
            Kind::Read | Kind::Act | Kind::Upload => call.send().await,
        };
        let answer = sent.map_err(|e| {
            let error = unavailable(retry::cause(&e));
            match e.is_connect() {
                true => Failed::Unseen(error, None),
                false => Failed::Seen(error),
            }
        })?;
        let (status, after) = (answer.status(), retry::after(answer.headers()));
        let mut bytes = Vec::new();
        let mut body = answer.bytes_stream();
        while let Some(chunk) = tokio::time::timeout(self.silence, body.next())
            .await
            .map_err(silent)?
        {
            let chunk = chunk.map_err(|e| Failed::Seen(unavailable(retry::cause(&e))))?;
            bytes.extend_from_slice(&chunk);
        }
        if status.is_success() {
            return Ok(bytes);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use serde_json::json;

    use super::*;

    /// A server that answers with half a file, and is silent then; how often it was asked.
    fn silent_server() -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for mut stream in listener.incoming().map_while(Result::ok) {
                let lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let mut lines = lines.map_while(Result::ok);
                if !lines.any(|line| line.is_empty()) {
                    // It was given up before it was sent.
                    continue;
                }
                count.fetch_add(1, Ordering::SeqCst);
                let half = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf of it";
                // The client may have gone.
                let _ = stream.write_all(half.as_bytes());
                open.push(stream);
            }
        });
        (url, asked)
    }

    fn api(url: &str, cancelled: Cancelled) -> Api {
        let spec = serde_json::from_value(json!({"base_url": url, "model": "m"})).unwrap();
        let mut api = Api::new(&spec, None, cancelled).unwrap();
        let moment = Duration::from_millis(1);
        api.pace = Pace {
            first: moment,
            longest: moment,
        };
        api
    }

    #[test]
    fn a_server_that_is_silent_in_a_file_is_asked_again_and_given_up() {
        let (url, asked) = silent_server();
        let mut api = api(&url, Arc::new(|| false));
        api.silence = Duration::from_millis(300);
        let error = api.text(&["files", "f", "content"]).unwrap_err();
        assert!(error.to_string().contains("nothing came for"), "{error}");
        assert!(error.may_pass());
        assert_eq!(asked.load(Ordering::SeqCst), 1 + RETRIES as usize);
    }

    #[test]
    fn a_file_on_its_way_is_given_up_with_the_wish_to_stop() {
        let (url, asked) = silent_server();
        let stop = Arc::new(AtomicBool::new(false));
        let hears = Arc::clone(&stop);
        let api = api(&url, Arc::new(move || hears.load(Ordering::SeqCst)));
        let ended = std::thread::scope(|scope| {
            let work = scope.spawn(|| api.text(&["files", "f", "content"]));
            while asked.load(Ordering::SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::SeqCst);
            work.join().unwrap()
        });
        assert_eq!(ended, Err(ApiError::Cancelled));
        // One that goes up too: nobody answers it.
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let ended = api.upload(&["files"], &file, &[("purpose", "batch")]);
        assert_eq!(ended, Err(ApiError::Cancelled));
        assert_eq!(asked.load(Ordering::SeqCst), 1, "nothing is sent again");
    }
}
