//! [`Kubectl`]: raw requests to an API server through the user's `kubectl`, which brings the
//! kubeconfig, its contexts, proxies and the plug-ins that log in. Knows no jobs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flowrun_engine::runner::JobError;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a request may take, and the whole call, in which a plug-in may log in.
const REQUEST: &str = "--request-timeout=30s";
const ANSWER: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Characters of what it prints that are told.
const SAID: usize = 1000;
/// Words of a `kubectl` that reached nobody.
const AWAY: [&str; 6] = [
    "connection",
    "unable to connect",
    "eof",
    "timeout",
    "timed out",
    "deadline exceeded",
];

/// The user's `kubectl`.
pub(super) struct Kubectl {
    pub(super) program: String,
    pub(super) context: Option<String>,
    pub(super) env: BTreeMap<String, String>,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CallError {
    /// The API server's word for it (`NotFound`), where it gave one.
    pub(super) reason: String,
    text: String,
    help: Option<String>,
    /// It may work the next time.
    passes: bool,
}

impl Kubectl {
    /// POST.
    ///
    /// # Errors
    /// [`CallError`], as all calls.
    pub(super) fn create(&self, path: &str, body: &Value) -> Result<String, CallError> {
        self.call(&["create", "--raw", path, "-f", "-"], &body.to_string())
    }

    /// GET.
    pub(super) fn get(&self, path: &str) -> Result<String, CallError> {
        self.call(&["get", "--raw", path], "")
    }

    /// DELETE.
    pub(super) fn delete(&self, path: &str) -> Result<String, CallError> {
        self.call(&["delete", "--raw", path], "")
    }

    fn call(&self, words: &[&str], input: &str) -> Result<String, CallError> {
        let local = |e: io::Error| CallError::here(format!("`kubectl` cannot be asked: {e}"), None);
        let stdin = holding(input).map_err(local)?;
        // Files, not pipes: a list of pods is longer than a pipe holds.
        let (mut stdout, mut stderr) = (
            tempfile::tempfile().map_err(local)?,
            tempfile::tempfile().map_err(local)?,
        );
        let mut command = Command::new(&self.program);
        command.args(words).arg(REQUEST);
        if let Some(context) = &self.context {
            command.arg(format!("--context={context}"));
        }
        command
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::from(stdin))
            .stdout(stdout.try_clone().map_err(local)?)
            .stderr(stderr.try_clone().map_err(local)?)
            // Ctrl-C is for this program, which then has a job to delete.
            .process_group(0);
        let child = flowrun_engine::runner::start(&mut command);
        let mut child = child.map_err(|e| {
            let help = "install `kubectl`, or name it in the `kubectl` of `runners.kubernetes`";
            let text = format!("`{}` cannot be started: {e}", self.program);
            CallError::here(text, Some(help))
        })?;
        let started = Instant::now();
        let status = loop {
            match child.try_wait().map_err(local)? {
                Some(status) => break status,
                None if started.elapsed() > ANSWER => {
                    // The plug-in that it started too.
                    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
                    let _ = child.wait();
                    let text = format!("`kubectl` did not answer for {} s", ANSWER.as_secs());
                    return Err(CallError {
                        passes: true,
                        ..CallError::here(text, None)
                    });
                }
                None => std::thread::sleep(LOOK_EVERY),
            }
        };
        match status.success() {
            true => content(&mut stdout).map_err(local),
            false => Err(CallError::said(&content(&mut stderr).map_err(local)?)),
        }
    }
}

impl CallError {
    /// Nothing was asked.
    fn here(text: String, help: Option<&str>) -> Self {
        Self {
            reason: String::new(),
            text,
            help: help.map(str::to_owned),
            passes: false,
        }
    }

    /// What answers does not speak as an API server does.
    pub(super) fn nonsense(what: &str) -> Self {
        let text = format!("what answers is no API server of Kubernetes: it sent no {what}");
        Self {
            passes: true,
            ..Self::here(text, None)
        }
    }

    /// From what it printed.
    fn said(stderr: &str) -> Self {
        let lines = stderr.lines().filter(|line| !is_log(line));
        let text = lines.collect::<Vec<_>>().join("\n");
        let text: String = text.trim().chars().take(SAID).collect();
        let reason = reason_of(&text);
        let passes = match reason {
            "" => {
                let text = text.to_lowercase();
                AWAY.iter().any(|words| text.contains(words))
            }
            // One that is full may not be later.
            "Forbidden" => text.contains("exceeded quota"),
            "AlreadyExists"
            | "BadRequest"
            | "Invalid"
            | "MethodNotAllowed"
            | "NotFound"
            | "RequestEntityTooLarge"
            | "Unauthorized"
            | "UnsupportedMediaType" => false,
            _ => true,
        };
        let help = match reason {
            "Forbidden" if !passes => Some(
                "the account needs, in that namespace, the rights create, list and delete on `jobs.batch`, list on `pods`, and list on `events` to say why a pod waits",
            ),
            "Unauthorized" => Some("log in as for any other use of `kubectl`"),
            _ => None,
        };
        Self {
            reason: reason.to_owned(),
            help: help.map(str::to_owned),
            passes,
            text,
        }
    }

    /// The same for a question about a job that was ordered: what is wrong now may pass, unless
    /// it is a right that was never there.
    pub(super) fn of_question(self) -> JobError {
        match self.reason == "Forbidden" {
            true => self.into(),
            false => JobError::Unreachable(self.text),
        }
    }
}

impl From<CallError> for JobError {
    fn from(error: CallError) -> Self {
        match error.passes {
            true => Self::Unreachable(error.text),
            false => Self::Refused {
                text: error.text,
                help: error.help,
            },
        }
    }
}

/// A line of its own log (klog): `W1126 09:06:19.358982 …`.
fn is_log(line: &str) -> bool {
    let mut letters = line.chars();
    matches!(letters.next(), Some('I' | 'W' | 'E'))
        && line.get(1..5).is_some_and(|day| {
            day.bytes().all(|b| b.is_ascii_digit()) && line.as_bytes().get(5) == Some(&b' ')
        })
}

/// `Error from server (NotFound): …`, and the two that it words otherwise.
fn reason_of(text: &str) -> &str {
    let inner = text
        .split_once("Error from server (")
        .and_then(|(_, rest)| rest.split_once(')'));
    match inner {
        Some((reason, _)) => reason,
        None if text.contains("(Unauthorized)") => "Unauthorized",
        None if text.contains(" is invalid:") => "Invalid",
        None => "",
    }
}

fn holding(text: &str) -> io::Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

fn content(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubectl_prints_is_a_refusal_or_an_outage() {
        for (said, reason, passes) in [
            (
                "Error from server (AlreadyExists): jobs.batch \"x\" already exists",
                "AlreadyExists",
                false,
            ),
            (
                "W1126 09:06:19.358982    1095 log.go:245] old\nError from server (NotFound): jobs.batch \"x\" not found",
                "NotFound",
                false,
            ),
            (
                "The request is invalid: Job.batch \"x\" is invalid: spec: Required value",
                "Invalid",
                false,
            ),
            (
                "Error from server (Forbidden): jobs.batch is forbidden: User \"u\" cannot create",
                "Forbidden",
                false,
            ),
            (
                "Error from server (Forbidden): jobs.batch \"x\" is forbidden: exceeded quota: q",
                "Forbidden",
                true,
            ),
            (
                "error: You must be logged in to the server (Unauthorized)",
                "Unauthorized",
                false,
            ),
            (
                "Error from server (ServiceUnavailable): the server is currently unable to handle the request",
                "ServiceUnavailable",
                true,
            ),
            (
                "The connection to the server 127.0.0.1:1 was refused - did you specify the right host or port?",
                "",
                true,
            ),
            (
                "Unable to connect to the server: net/http: TLS handshake timeout",
                "",
                true,
            ),
            ("error: context \"nope\" does not exist", "", false),
        ] {
            let error = CallError::said(said);
            assert_eq!((error.reason.as_str(), error.passes), (reason, passes));
            assert!(!error.text.contains("log.go"), "{error:?}");
            let asked = error.clone().of_question();
            let refused = matches!(asked, JobError::Refused { .. });
            assert_eq!(refused, reason == "Forbidden" && !passes, "{said}");
        }
    }

    #[test]
    fn a_kubectl_that_is_not_there_is_named() {
        let kubectl = Kubectl {
            program: "/nowhere/kubectl".to_owned(),
            context: None,
            env: BTreeMap::new(),
        };
        let error: Option<JobError> = kubectl.get("/version").err().map(Into::into);
        assert!(
            matches!(&error, Some(JobError::Refused { text, .. }) if text.contains("/nowhere/kubectl")),
            "{error:?}"
        );
    }
}
