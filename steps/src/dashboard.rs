//! [`Dashboard`]: the HTTP API of a Ray cluster's head. Knows neither jobs nor applications.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use flowrun_engine::step::{StepError, World};
use reqwest::blocking::{Body, Client};
use reqwest::{Method, StatusCode};

/// What a Ray with a dashboard is installed from.
pub(crate) const PACKAGE: &str = "ray[default,serve]";
/// Where Ray's own clients take its token from.
const TOKEN: &str = "RAY_AUTH_TOKEN";
/// How long the dashboard may take for one answer.
const ANSWER: Duration = Duration::from_secs(60);
/// Characters of an answer that are told.
const SAID: usize = 1000;

/// A Ray cluster's dashboard.
pub(crate) struct Dashboard {
    client: Client,
    address: String,
    token: Option<String>,
}

/// What it answered.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
}

impl Dashboard {
    /// # Errors
    /// Failed when no client can be made.
    pub(crate) fn open(address: &str, world: &World) -> Result<Self, StepError> {
        let client = Client::builder().no_proxy().timeout(ANSWER).build();
        Ok(Self {
            client: client.map_err(|e| StepError::failed(e.to_string()))?,
            address: address.trim_end_matches('/').to_owned(),
            token: world.env.get(TOKEN).cloned(),
        })
    }

    /// Without a slash at its end.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Any answer is one; what it says, its status does.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Body>,
    ) -> Result<Answer, String> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.address))
            .header("content-type", "application/json");
        if let Some(body) = body {
            request = request.body(body);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let unreached =
            |e: reqwest::Error| format!("Ray's dashboard at {}: {}", self.address, root(&e));
        let answer = request.send().map_err(unreached)?;
        let status = answer.status();
        let text = answer.text().map_err(unreached)?;
        Ok(Answer { status, text })
    }

    /// Uploads a package, unless it is there.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub(crate) fn upload(&self, name: &str, file: &Path) -> Result<(), String> {
        let path = format!("/api/packages/gcs/{name}");
        if self.call(Method::GET, &path, None)?.is_ok() {
            return Ok(());
        }
        let file = File::open(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let answer = self.call(Method::PUT, &path, Some(file.into()))?;
        match answer.is_ok() {
            true => Ok(()),
            false => Err(format!("Ray refused {path}: {answer}")),
        }
    }
}

impl Answer {
    pub(crate) fn is_ok(&self) -> bool {
        self.status.is_success()
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said: String = self.text.chars().take(SAID).collect();
        write!(f, "{} {said}", self.status)
    }
}

fn root(error: &reqwest::Error) -> String {
    let mut error: &dyn std::error::Error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
