//! [`Server`]: a `flowrun serve` process of this machine: started, asked, stopped.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::blocking::Client;
use serde::Deserialize;
use serde_json::Value;

use super::API_KEY;

/// How long a server may take to load its model.
const STARTUP: Duration = Duration::from_secs(300);
/// How long it may take to finish what it is doing once it was asked to stop.
const DRAIN: Duration = Duration::from_secs(15);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(120);
/// How long a server that is up may take to say so.
const HEALTH: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);

/// How long a server lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// No longer than this process, however that ends.
    OfThisStep,
    /// Until it is stopped.
    OnItsOwn,
}

/// A server that is up.
pub(super) struct Server {
    child: Child,
    life: Life,
    log: PathBuf,
    /// Where it answers.
    pub(super) endpoint: Endpoint,
}

/// Where a server answers, whoever started it.
pub(super) struct Endpoint {
    key: Option<String>,
    client: Client,
    /// Its address, `http://127.0.0.1:8000`.
    pub(super) url: String,
}

impl Endpoint {
    /// The server at `url`; its key is taken from the environment.
    ///
    /// # Errors
    /// Failed when no client can be made.
    pub(super) fn new(url: &str, world: &World) -> Result<Self, StepError> {
        Ok(Self {
            key: world.env.get(API_KEY).cloned(),
            client: client(ANSWER).map_err(StepError::failed)?,
            url: url.trim_end_matches('/').to_owned(),
        })
    }
}

/// What a server prints once it answers.
#[derive(Deserialize)]
struct Serving {
    url: String,
}

impl Endpoint {
    /// The label that it gives a row, as [`crate::scores::question`] writes it.
    ///
    /// # Errors
    /// The reason, when it does not answer.
    pub(super) fn predict(&self, question: &Value) -> Result<String, String> {
        let mut request = self
            .client
            .post(format!("{}/predict", self.url))
            .json(question);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let answer = request.send().map_err(|e| e.without_url().to_string())?;
        let status = answer.status();
        let body = answer.text().map_err(|e| e.without_url().to_string())?;
        if !status.is_success() {
            return Err(format!("{status} {body}"));
        }
        let body: Value = serde_json::from_str(&body).map_err(|e| format!("{e}: {body}"))?;
        let label = body["label"].as_str();
        label.map_or_else(
            || Err(format!("no `label` in {body}")),
            |l| Ok(l.to_owned()),
        )
    }
}

impl Server {
    /// Starts a server for the bundle in `folder` and waits until it answers. Its output goes to
    /// files in `logs`.
    ///
    /// # Errors
    /// Gate when it ends or does not answer in time; cancelled.
    pub(super) fn start(
        folder: &Path,
        port: u16,
        logs: &Path,
        life: Life,
        world: &World,
        cancel: &Cancel,
    ) -> Result<Self, StepError> {
        let log = logs.join("serve.log");
        let said = logs.join("serve.out");
        let file = |path: &Path| File::create(path).map_err(|e| StepError::io(path, &e));
        let mut command = Command::new(&world.exe);
        command
            .arg("serve")
            .arg(folder)
            .args(["--json", "--port", &port.to_string()])
            // The old one goes on there until the new one is up.
            .args((life == Life::OnItsOwn && port != 0).then_some("--share-port"))
            .current_dir(&world.root)
            .env_clear()
            .envs(&world.env)
            .stdout(file(&said)?)
            .stderr(file(&log)?);
        if world.offline {
            command.arg("--offline");
        }
        if let Some(distdir) = &world.distdir {
            let distdir = std::path::absolute(distdir).map_err(|e| StepError::io(distdir, &e))?;
            command.arg("--distdir").arg(distdir);
        }
        match life {
            // It ends when its stdin does, so a killed run leaves no server behind.
            Life::OfThisStep => command.arg("--until-stdin-closes").stdin(Stdio::piped()),
            // Ctrl-C in the terminal of the run is not meant for it.
            Life::OnItsOwn => command.process_group(0).stdin(Stdio::null()),
        };
        let endpoint = Endpoint::new("", world)?;
        let child = flowrun_engine::runner::start(&mut command).map_err(|e| {
            StepError::failed(format!("`{}` cannot be started: {e}", world.exe.display()))
        })?;
        let mut server = Self {
            child,
            life,
            log,
            endpoint,
        };
        match server.wait_until_up(&said, cancel) {
            Ok(url) => {
                server.endpoint.url = url;
                Ok(server)
            }
            Err(error) => {
                server.end();
                Err(error)
            }
        }
    }

    fn wait_until_up(&mut self, said: &Path, cancel: &Cancel) -> Result<String, StepError> {
        let failed = |why: String| StepError::new(StepErrorKind::Gate, why);
        let deadline = Instant::now() + STARTUP;
        loop {
            let text = std::fs::read_to_string(said).map_err(|e| StepError::io(said, &e))?;
            if let Some((line, _)) = text.split_once('\n') {
                let serving: Serving = serde_json::from_str(line)
                    .map_err(|e| failed(format!("the server said `{line}`: {e}")))?;
                return Ok(serving.url);
            }
            let ended = self.child.try_wait();
            if let Some(status) = ended.map_err(|e| failed(format!("the server: {e}")))? {
                let words = self.last_words();
                return Err(failed(format!("the server ended ({status}): {words}")));
            }
            if cancel.is_cancelled() {
                return Err(StepError::cancelled());
            }
            if Instant::now() > deadline {
                let words = self.last_words();
                let text = format!("the server was not up after {} s", STARTUP.as_secs());
                return Err(failed(format!("{text}: {words}")));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last line that it logged.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rfind(|line| !line.trim().is_empty());
        last.unwrap_or_default().trim().to_owned()
    }

    /// Asks it to finish, and waits until it did.
    pub(super) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Once it was waited for, its id may be another process's.
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let deadline = Instant::now() + DRAIN;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.life == Life::OfThisStep {
            self.end();
        }
    }
}

/// What a server says of its health.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Health {
    /// Digest of the bundle that it serves; none for a base model alone.
    pub(super) bundle: Option<String>,
    /// Its process id.
    pub(super) pid: u32,
}

/// Asks the server at `url`, if there is one.
pub(super) fn health(url: &str) -> Option<Health> {
    let answer = client(HEALTH).ok()?.get(format!("{url}/health")).send();
    answer.ok()?.error_for_status().ok()?.json().ok()
}

fn client(timeout: Duration) -> Result<Client, String> {
    Client::builder()
        .no_proxy()
        .timeout(timeout)
        .build()
        .map_err(|e| e.to_string())
}
