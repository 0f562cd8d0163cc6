//! [`Api`]: the REST API (2.0) of an MLflow tracking server. Knows no pipeline.
//!
//! Invariant: no error shows the token or the password.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use reqwest::blocking::{Body, Client, RequestBuilder};
use reqwest::{StatusCode, Url};
use serde_json::{Value, json};

use super::STALL;
use crate::address::{causes, is_loopback, shown};
use crate::tracking::Heartbeat;

/// Longest time until there is a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest time of a call.
const CALL: Duration = Duration::from_secs(10);
/// Longest time of a file's upload; it is given up sooner when nothing moves.
const UPLOAD: Duration = Duration::from_secs(3600);
/// Further tries of a call that the server did not take.
const RETRIES: u32 = 2;
/// First wait between two tries; doubles each time.
const FIRST_WAIT: Duration = Duration::from_millis(300);
/// Characters of an answer that are shown.
const SHOWN: usize = 300;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ApiError {
    /// There is no server, or it does not answer.
    Unreachable(String),
    /// A file that it was sent did not move for [`STALL`].
    Stalled(String),
    /// It answered no.
    Refused {
        /// MLflow's word for it; empty when the answer is not MLflow's.
        code: String,
        /// For people.
        why: String,
    },
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable(why) | Self::Stalled(why) | Self::Refused { why, .. } => {
                f.write_str(why)
            }
        }
    }
}

/// Who asks.
#[derive(Clone)]
enum Login {
    Nobody,
    Token(String),
    Password(String, String),
}

/// A run that was begun.
#[derive(Debug, Clone)]
pub(super) struct RunInfo {
    /// Its id.
    pub(super) id: String,
    /// Where its artifacts are.
    pub(super) artifact_uri: String,
}

/// The API of one server.
#[derive(Clone)]
pub(super) struct Api {
    http: Client,
    base: Url,
    login: Login,
    beat: Heartbeat,
}

impl Api {
    /// # Errors
    /// When the address is none of a tracking server.
    pub(super) fn new(
        uri: &str,
        env: &BTreeMap<String, String>,
        beat: Heartbeat,
    ) -> Result<Self, String> {
        let base = Url::parse(uri).ok();
        let is_web = |url: &Url| matches!(url.scheme(), "http" | "https");
        let base = base.filter(is_web).ok_or_else(|| {
            "`MLFLOW_TRACKING_URI` is no address of a tracking server; start one with `mlflow \
             server`, and give it as `http://…`"
                .to_owned()
        })?;
        let client = Client::builder()
            .connect_timeout(CONNECT)
            .timeout(CALL)
            .user_agent(concat!("flowrun/", env!("CARGO_PKG_VERSION")));
        let client = match is_loopback(&base) {
            true => client.no_proxy(),
            false => client,
        };
        let get = |name: &str| env.get(name).filter(|value| !value.is_empty()).cloned();
        let login = match (
            get("MLFLOW_TRACKING_TOKEN"),
            get("MLFLOW_TRACKING_USERNAME"),
        ) {
            (_, Some(user)) => {
                Login::Password(user, get("MLFLOW_TRACKING_PASSWORD").unwrap_or_default())
            }
            (Some(token), None) => Login::Token(token),
            (None, None) => Login::Nobody,
        };
        Ok(Self {
            http: client
                .build()
                .map_err(|e| format!("no client can be made: {}", causes(e)))?,
            base,
            login,
            beat,
        })
    }

    /// The id of the experiment of this name, which is made when there is none.
    pub(super) fn experiment(&self, name: &str) -> Result<String, ApiError> {
        let found = || {
            let mut url = self.url(&["mlflow", "experiments", "get-by-name"]);
            url.query_pairs_mut().append_pair("experiment_name", name);
            let answer = self.call(|| self.http.get(url.clone()))?;
            text(&answer, "/experiment/experiment_id")
        };
        match found() {
            Err(ApiError::Refused { code, .. }) if code == "RESOURCE_DOES_NOT_EXIST" => {}
            other => return other,
        }
        match self.post("experiments/create", &json!({ "name": name })) {
            Ok(answer) => text(&answer, "/experiment_id"),
            // Another run was faster.
            Err(ApiError::Refused { code, .. }) if code == "RESOURCE_ALREADY_EXISTS" => found(),
            Err(error) => Err(error),
        }
    }

    /// Begins a run.
    pub(super) fn begin(&self, body: &Value) -> Result<RunInfo, ApiError> {
        let answer = self.post("runs/create", body)?;
        Ok(RunInfo {
            id: text(&answer, "/run/info/run_id")?,
            artifact_uri: text(&answer, "/run/info/artifact_uri")?,
        })
    }

    /// Posts to `/api/2.0/mlflow/{path}`.
    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, ApiError> {
        let path: Vec<&str> = std::iter::once("mlflow").chain(path.split('/')).collect();
        let url = self.url(&path);
        self.call(|| self.http.post(url.clone()).json(body))
    }

    /// Puts a file among a run's artifacts, through the server. It may take as long as it moves:
    /// a server that keeps files elsewhere answers when they are there. That it breaks off is a
    /// refusal of this file: a server may hang up on one that is too large for it.
    pub(super) fn put(&self, run: &RunInfo, path: &str, file: &Path) -> Result<(), ApiError> {
        let refused = |why: String| ApiError::Refused {
            code: String::new(),
            why,
        };
        let here = |e: std::io::Error| refused(format!("{}: {e}", file.display()));
        let folder = artifact_folder(&run.artifact_uri)?;
        let mut whole = vec!["mlflow-artifacts", "artifacts"];
        whole.extend(folder.split('/').filter(|part| !part.is_empty()));
        whole.extend(path.split('/').filter(|part| !part.is_empty()));
        let url = self.url(&whole);
        let length = std::fs::metadata(file).map_err(here)?.len();
        let reader = File::open(file).map_err(here)?;
        let api = self.clone();
        let put = self.beat.during(STALL, move |moves| {
            let body = Beating {
                reader,
                beat: moves.clone(),
            };
            let request = api.http.put(url).timeout(UPLOAD);
            api.once(request.body(Body::sized(body, length)))
        });
        let Some(put) = put else {
            let minutes = STALL.as_secs() / 60;
            let why = format!("nothing of `{path}` moved for {minutes} minutes");
            return Err(ApiError::Stalled(why));
        };
        put.map(drop).map_err(|attempt| match attempt {
            Attempt {
                error: ApiError::Unreachable(why),
                taken: true,
            } => refused(why),
            Attempt { error, .. } => error,
        })
    }

    /// `/api/2.0/…`
    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["api", "2.0"]).extend(path);
        }
        url
    }

    /// A call with further tries. Only what the server did not take is tried again: the API adds
    /// up what it is told twice.
    fn call(&self, request: impl Fn() -> RequestBuilder) -> Result<Value, ApiError> {
        let mut tries = 0;
        loop {
            match self.once(request()) {
                Err(Attempt {
                    error,
                    taken: false,
                }) if tries < RETRIES => {
                    tracing::debug!(%error, tries, "MLflow: trying again");
                    std::thread::sleep(FIRST_WAIT * 2u32.pow(tries));
                    tries += 1;
                }
                other => return other.map_err(|attempt| attempt.error),
            }
        }
    }

    fn once(&self, request: RequestBuilder) -> Result<Value, Attempt> {
        let request = match &self.login {
            Login::Nobody => request,
            Login::Token(token) => request.bearer_auth(token),
            Login::Password(user, password) => request.basic_auth(user, Some(password)),
        };
        let server = shown(&self.base);
        let answer = request.send().map_err(|error| Attempt {
            taken: !error.is_connect(),
            error: ApiError::Unreachable(format!("{server}: {}", causes(error))),
        })?;
        let status = answer.status();
        let body = answer.text().unwrap_or_default();
        self.beat.beat();
        if status.is_success() {
            return Ok(serde_json::from_str(&body).unwrap_or_default());
        }
        let told: Value = serde_json::from_str(&body).unwrap_or_default();
        let code = told["error_code"].as_str().unwrap_or_default();
        let why = told["message"].as_str().unwrap_or(&body);
        let why: String = self.masked(why).chars().take(SHOWN).collect();
        Err(Attempt {
            taken: !was_turned_away(status),
            error: ApiError::Refused {
                code: code.to_owned(),
                why: format!("{server} answered {status}: {}", why.trim()),
            },
        })
    }

    /// Some servers repeat what they do not know.
    fn masked(&self, text: &str) -> String {
        match &self.login {
            Login::Token(secret) | Login::Password(_, secret) if !secret.is_empty() => {
                text.replace(secret.as_str(), "***")
            }
            Login::Nobody | Login::Token(_) | Login::Password(..) => text.to_owned(),
        }
    }
}

/// A try that failed.
struct Attempt {
    error: ApiError,
    /// The server may have done what it was asked to.
    taken: bool,
}

/// Nothing was done with the call. A proxy says 502 and 504 also when the server did it, and only
/// its answer was lost.
fn was_turned_away(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    )
}

/// A text in an answer.
fn text(answer: &Value, pointer: &str) -> Result<String, ApiError> {
    let found = answer.pointer(pointer).and_then(Value::as_str);
    found.map(str::to_owned).ok_or_else(|| ApiError::Refused {
        code: String::new(),
        why: format!("the answer has no `{pointer}`: it is not one of an MLflow server"),
    })
}

/// The folder of artifacts that a server keeps for its clients.
fn artifact_folder(uri: &str) -> Result<String, ApiError> {
    let url = Url::parse(uri).ok();
    let url = url.filter(|url| url.scheme() == "mlflow-artifacts");
    let url = url.ok_or_else(|| {
        let scheme = uri.split_once(':').map_or("a folder", |(scheme, _)| scheme);
        ApiError::Refused {
            code: String::new(),
            why: format!(
                "artifacts are kept in `{scheme}`, which flowrun does not write to; start the \
                 server with `--artifacts-destination`, so that it takes them itself"
            ),
        }
    })?;
    Ok(url.path().to_owned())
}

/// A file that shows that it is being read.
struct Beating {
    reader: File,
    beat: Heartbeat,
}

impl Read for Beating {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.beat.beat();
        self.reader.read(buffer)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_server_that_takes_artifacts_is_given_some() {
        assert_eq!(
            artifact_folder("mlflow-artifacts:/1/r/artifacts").unwrap(),
            "/1/r/artifacts"
        );
        assert_eq!(
            artifact_folder("mlflow-artifacts://h:1/1/r").unwrap(),
            "/1/r"
        );
        for other in ["s3://bucket/1/r", "/mlruns/1/r", "file:///mlruns/1"] {
            assert!(artifact_folder(other).is_err(), "{other}");
        }
    }

    #[test]
    fn a_path_stays_in_front_of_the_api() {
        let env = BTreeMap::new();
        for (uri, expected) in [
            ("http://h:5000", "http://h:5000/api/2.0/mlflow/runs/create"),
            ("https://h/x/", "https://h/x/api/2.0/mlflow/runs/create"),
        ] {
            let api = Api::new(uri, &env, Heartbeat::default()).unwrap();
            let url = api.url(&["mlflow", "runs", "create"]);
            assert_eq!(url.as_str(), expected);
        }
        for wrong in ["", "file:./mlruns", "sqlite:///mlflow.db", "databricks"] {
            assert!(
                Api::new(wrong, &env, Heartbeat::default()).is_err(),
                "{wrong}"
            );
        }
    }
}
