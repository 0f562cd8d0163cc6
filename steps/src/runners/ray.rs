//! `ray`: jobs of a Ray cluster, through the Jobs REST API of its dashboard.
//!
//! | Ray says | it means |
//! |---|---|
//! | 500 with "already exists" to an order | the job was ordered before; nothing is ordered twice |
//! | any other 5xx, 408, 429 to an order | it cannot now, as a head that comes up (`No available agent to submit job, please try again later`): it is ordered again under the same id |
//! | 404 | the head was started anew and knows no job from before; or nobody ordered it |
//! | `FAILED` with exit code -9 | its process was killed from outside, by the system if memory ran out |
//! | `FAILED` with exit code -15, 143 or 130 | its process was told to stop from outside, and nobody stopped the job |
//! | 5xx, 408, 429, what is no JSON, to a question | nothing: it is asked again |
//! | `FAILED` with `JOB_SUPERVISOR_ACTOR_…` | the node, or the actor that watches the process, died or was never started |
//! | `PENDING` with a demand that no node has | it would wait until Ray gives up, after 15 minutes |
//!
//! As of Ray 2.60.

mod nodes;
mod outcome;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use flowrun_engine::pipeline::Resources;
use flowrun_engine::runner::{JobError, JobKind, JobOrder, JobState, JobSystem};
use flowrun_engine::step::{StepError, World};
use reqwest::{Method, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::nodes::lack;
use self::outcome::state_of;
use crate::dashboard::{Answer, Dashboard, PACKAGE};
use crate::deploy::package::Package;
use crate::schema_of;

/// Cores of a job that does not say how many it wants. With none, Ray runs it on the head.
const CPUS: f64 = 1.0;
/// What the program is called in the package that brings it to the workers.
const PROGRAM: &str = "flowrun";
/// A job that is deleted sooner after its end is missed by Ray's own watch over it, and comes back
/// as one that failed.
const SETTLED: Duration = Duration::from_secs(2);
const JOBS: &str = "/api/jobs/";

/// The job system.
pub(super) struct Ray;

/// A Ray cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Address of its dashboard, `http://127.0.0.1:8265`. A token is taken from `RAY_AUTH_TOKEN`.
    #[schemars(url, regex(pattern = "^https?://"))]
    address: String,
    /// Bring this program to the workers as a package, so that they need not have it. The
    /// `program` of the settings then means nothing.
    #[serde(default)]
    upload: bool,
    /// Nodes are started when they are asked for: what no node has now is waited for.
    #[serde(default)]
    autoscales: bool,
    /// More fields of the jobs' runtime environment, as Ray takes them: `pip`, `env_vars`, ….
    /// The dashboard shows them: no secrets.
    #[serde(default)]
    runtime_env: Map<String, Value>,
}

struct Cluster {
    dashboard: Dashboard,
    settings: Settings,
    exe: PathBuf,
    /// Name of the package with the program, once it was packed, and where it lies.
    package: Mutex<Option<(Package, tempfile::TempDir)>>,
    /// Since when jobs are known to be over.
    over: Mutex<BTreeMap<String, Instant>>,
}

impl JobKind for Ray {
    fn name(&self) -> &'static str {
        "ray"
    }
    fn about(&self) -> &'static str {
        "Jobs of a Ray cluster, through its Jobs REST API."
    }
    fn settings_schema(&self) -> Value {
        schema_of::<Settings>()
    }
    fn example(&self) -> &'static str {
        "{ address: 'http://127.0.0.1:8265' }"
    }
    fn open(&self, settings: &Value, world: &World) -> Result<Box<dyn JobSystem>, StepError> {
        let settings: Settings = serde_json::from_value(settings.clone())
            .map_err(|e| StepError::invalid(format!("`runners.ray`: {e}")))?;
        Ok(Box::new(Cluster {
            dashboard: Dashboard::open(&settings.address, world)?,
            settings,
            exe: world.exe.clone(),
            package: Mutex::default(),
            over: Mutex::default(),
        }))
    }
}

impl JobSystem for Cluster {
    fn name(&self) -> String {
        format!("Ray at {}", self.dashboard.address())
    }

    fn submit(&self, order: &JobOrder<'_>) -> Result<(), JobError> {
        let body = self.body(order)?.to_string();
        let answer = self.call(Method::POST, JOBS, Some(body))?;
        let known = || answer.text.contains("already exists");
        if answer.is_ok() {
            // What takes every order is no dashboard.
            return parse(&answer).map(|_| ());
        }
        if answer.status == StatusCode::INTERNAL_SERVER_ERROR && known() {
            return Ok(());
        }
        // Ids are never used again: an order that was taken nevertheless is known the next time.
        Err(match passes(answer.status) {
            true => JobError::Busy(format!("{}: {answer}", self.name())),
            false => refused("the job", &answer),
        })
    }

    fn state(&self, order: &JobOrder<'_>) -> Result<JobState, JobError> {
        let answer = self.call(Method::GET, &format!("{JOBS}{}", order.id), None)?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(JobState::Unknown);
        }
        if passes(answer.status) {
            return Err(JobError::Unreachable(format!("{}: {answer}", self.name())));
        }
        if !answer.is_ok() {
            return Err(refused("to tell of a job", &answer));
        }
        // Something in front of it may answer in its place.
        let job = parse(&answer).map_err(|e| JobError::Unreachable(e.to_string()))?;
        let state = state_of(&job);
        match state {
            JobState::Waiting { .. } if !self.settings.autoscales => {
                let lack = self.lack(order.resources);
                Ok(match lack {
                    Some(why) => JobState::Waiting {
                        why,
                        hopeless: true,
                    },
                    None => state,
                })
            }
            _ => Ok(state),
        }
    }

    fn stop(&self, id: &str) -> Result<(), JobError> {
        let answer = self.call(Method::POST, &format!("{JOBS}{id}/stop"), None)?;
        match answer.is_ok() || answer.status == StatusCode::NOT_FOUND {
            true => Ok(()),
            false => Err(refused("to stop a job", &answer)),
        }
    }

    fn forget(&self, id: &str) -> Result<bool, JobError> {
        let path = format!("{JOBS}{id}");
        let over = || self.over.lock().unwrap_or_else(PoisonError::into_inner);
        let since = over().get(id).copied();
        if since.is_none() {
            let answer = self.call(Method::GET, &path, None)?;
            if passes(answer.status) {
                return Err(JobError::Unreachable(format!("{}: {answer}", self.name())));
            }
            if answer.is_ok() && !matches!(state_of(&parse(&answer)?), JobState::Ended(_)) {
                return Ok(false);
            }
        }
        let since = *over().entry(id.to_owned()).or_insert_with(Instant::now);
        if since.elapsed() < SETTLED {
            return Ok(false);
        }
        if passes(self.call(Method::DELETE, &path, None)?.status) {
            return Ok(false);
        }
        over().remove(id);
        Ok(true)
    }
}

impl Cluster {
    fn call(&self, method: Method, path: &str, body: Option<String>) -> Result<Answer, JobError> {
        let answer = self.dashboard.call(method, path, body.map(Into::into));
        let answer = answer.map_err(JobError::Unreachable)?;
        match answer.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(JobError::Refused {
                text: format!("{} refused the token: {answer}", self.name()),
                help: Some("set `RAY_AUTH_TOKEN` to the cluster's token".to_owned()),
            }),
            // In front of a head that is away.
            StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                Err(JobError::Unreachable(format!("{}: {answer}", self.name())))
            }
            _ => Ok(answer),
        }
    }

    fn body(&self, order: &JobOrder<'_>) -> Result<Value, JobError> {
        let mut runtime_env = self.settings.runtime_env.clone();
        let mut program = order.program.to_owned();
        if self.settings.upload {
            let package = self.uploaded()?;
            runtime_env.insert("working_dir".into(), format!("gcs://{package}").into());
            program = format!("./{PROGRAM}");
        }
        let words = std::iter::once(&program).chain(&order.args);
        let words: Vec<String> = words.map(|word| quoted(word)).collect();
        let command = format!("exec {}", words.join(" "));
        let want = order.resources;
        let mut body = json!({
            "entrypoint": match self.settings.upload {
                // Ray's packages keep no modes.
                true => format!("chmod u+x {program} && {command}"),
                false => command,
            },
            "submission_id": order.id,
            "metadata": {"flowrun.step": order.step},
            "entrypoint_num_cpus": if want.cpu > 0.0 { want.cpu } else { CPUS },
            "runtime_env": runtime_env,
        });
        if want.gpu > 0.0 {
            body["entrypoint_num_gpus"] = want.gpu.into();
        }
        if want.memory > 0 {
            body["entrypoint_memory"] = want.memory.into();
        }
        if !want.custom.is_empty() {
            body["entrypoint_resources"] = json!(want.custom);
        }
        Ok(body)
    }

    /// The name of the package with this program, which is there now: Ray drops those that no job
    /// uses.
    fn uploaded(&self) -> Result<String, JobError> {
        let mut slot = self.package.lock().unwrap_or_else(PoisonError::into_inner);
        let packed = match slot.take() {
            Some(packed) => packed,
            None => pack(&self.exe)?,
        };
        let (package, _) = slot.insert(packed);
        let uploaded = self.dashboard.upload(&package.name, &package.path);
        uploaded.map_err(JobError::Unreachable)?;
        Ok(package.name.clone())
    }

    /// What a job asks for and no node has, if that is known.
    fn lack(&self, want: &Resources) -> Option<String> {
        let path = "/api/v0/nodes?detail=1&limit=10000";
        let answer = self.call(Method::GET, path, None).ok()?;
        let nodes: Value = serde_json::from_str(&answer.text).ok()?;
        let nodes = nodes.pointer("/data/result/result")?.as_array()?;
        let alive = nodes.iter().filter(|node| node["state"] == "ALIVE");
        let nodes: Vec<&Value> = alive.map(|node| &node["resources_total"]).collect();
        lack(want, &nodes)
    }
}

fn pack(exe: &Path) -> Result<(Package, tempfile::TempDir), JobError> {
    let failed = |why: String| JobError::refused(format!("the program cannot be packed: {why}"));
    let folder = tempfile::tempdir().map_err(|e| failed(e.to_string()))?;
    let link = folder.path().join(PROGRAM);
    std::os::unix::fs::symlink(exe, &link).map_err(|e| failed(e.to_string()))?;
    let package = Package::pack(folder.path(), &[PROGRAM], &folder.path().join("p.zip"));
    Ok((package.map_err(|e| failed(e.message))?, folder))
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn refused(what: &str, answer: &Answer) -> JobError {
    JobError::refused(format!("Ray refused {what}: {answer}"))
}

/// A refusal that may not be one the next time: the head is busy, or comes up.
fn passes(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
        )
}

fn parse(answer: &Answer) -> Result<Value, JobError> {
    serde_json::from_str(&answer.text).map_err(|e| JobError::Refused {
        text: format!("what answers is no dashboard of Ray: {e}"),
        help: Some(format!("`address` is that of a dashboard of `{PACKAGE}`")),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What a cluster makes of an answer to what `does` asks of it.
    fn asked<T>(
        status: &'static str,
        body: &'static str,
        does: impl Fn(&Cluster, &JobOrder<'_>) -> Result<T, JobError>,
    ) -> Result<T, JobError> {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                peer.read_exact(&mut byte).unwrap();
                asked.extend(byte);
            }
            // An answer beside what was not read yet would cut the connection off.
            let head = String::from_utf8(asked).unwrap().to_lowercase();
            let mut lines = head.lines();
            let sent = lines.find_map(|line| line.strip_prefix("content-length: "));
            let sent = sent.map_or(0, |sent| sent.parse::<usize>().unwrap());
            peer.read_exact(&mut vec![0; sent]).unwrap();
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n");
            write!(peer, "{head}Connection: close\r\n\r\n{body}").unwrap();
        });
        let cluster = Cluster {
            dashboard: Dashboard::open(&address, &World::default()).unwrap(),
            settings: serde_json::from_value(json!({ "address": address })).unwrap(),
            exe: PathBuf::new(),
            package: Mutex::default(),
            over: Mutex::default(),
        };
        let result = does(
            &cluster,
            &JobOrder {
                id: "flowrun-1",
                step: "a",
                run: "r",
                timeout: None,
                program: "flowrun",
                args: Vec::new(),
                folder: Some(Path::new("/f")),
                variables: &[],
                resources: &Resources::default(),
            },
        );
        server.join().unwrap();
        result
    }

    fn state(status: &'static str, body: &'static str) -> Result<JobState, JobError> {
        asked(status, body, |cluster, order| cluster.state(order))
    }

    #[test]
    fn an_order_that_it_cannot_take_now_is_not_refused() {
        let submit = |status, body| asked(status, body, |cluster, order| cluster.submit(order));
        for (status, body) in [
            (
                "500 Internal Server Error",
                "No available agent to submit job, please try again later.",
            ),
            ("500 Internal Server Error", "Traceback"),
            ("429 Too Many Requests", ""),
            ("408 Request Timeout", ""),
        ] {
            let busy = submit(status, body);
            assert!(matches!(busy, Err(JobError::Busy(_))), "{status}: {busy:?}");
        }
        let away = submit("503 Service Unavailable", "");
        assert!(matches!(away, Err(JobError::Unreachable(_))), "{away:?}");
        let refused = submit("400 Bad Request", "no such field");
        assert!(matches!(refused, Err(JobError::Refused { .. })));
        let known = "Job with submission_id flowrun-1 already exists";
        assert_eq!(submit("500 Internal Server Error", known), Ok(()));
        let taken = "{\"submission_id\": \"flowrun-1\"}";
        assert_eq!(submit("200 OK", taken), Ok(()));
    }

    #[test]
    fn an_answer_that_may_be_another_next_time_is_none() {
        for (status, body) in [
            ("500 Internal Server Error", "{}"),
            ("503 Service Unavailable", ""),
            ("408 Request Timeout", ""),
            ("429 Too Many Requests", ""),
            ("200 OK", "<html>sign in</html>"),
        ] {
            let found = state(status, body);
            let away = matches!(found, Err(JobError::Unreachable(_)));
            assert!(away, "{status}: {found:?}");
        }
        let refused = state("403 Forbidden", "");
        assert!(matches!(refused, Err(JobError::Refused { .. })));
        assert_eq!(state("404 Not Found", ""), Ok(JobState::Unknown));
        let running = state("200 OK", "{\"status\": \"RUNNING\"}");
        assert_eq!(running, Ok(JobState::Running));
    }

    #[test]
    fn a_job_says_what_it_needs_and_no_secret() {
        let settings = json!({"address": "http://127.0.0.1:1", "runtime_env": {"pip": ["x"]}});
        let world = World::default();
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let cluster = Cluster {
            dashboard: Dashboard::open(&settings.address, &world).unwrap(),
            settings,
            exe: PathBuf::new(),
            package: Mutex::default(),
            over: Mutex::default(),
        };
        let resources = Resources {
            gpu: 0.5,
            memory: 1000,
            custom: [("TPU".to_owned(), 2.0)].into(),
            ..Resources::default()
        };
        let order = JobOrder {
            id: "flowrun-1",
            step: "a[b]",
            run: "r",
            timeout: None,
            program: "/opt/it's/flowrun",
            args: vec!["step".into(), "exec".into()],
            folder: Some(Path::new("/f")),
            variables: &[],
            resources: &resources,
        };
        let body = cluster.body(&order).unwrap();
        assert_eq!(
            body,
            json!({
                "entrypoint": r"exec '/opt/it'\''s/flowrun' 'step' 'exec'",
                "submission_id": "flowrun-1",
                "metadata": {"flowrun.step": "a[b]"},
                "entrypoint_num_cpus": 1.0,
                "entrypoint_num_gpus": 0.5,
                "entrypoint_memory": 1000,
                "entrypoint_resources": {"TPU": 2.0},
                "runtime_env": {"pip": ["x"]},
            })
        );
    }
}
