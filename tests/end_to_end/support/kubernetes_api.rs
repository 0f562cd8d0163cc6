//! An API server of Kubernetes on loopback, as far as `kubectl --raw` asks it for Jobs, and the
//! cluster behind it: a Job's command is a process of this machine. What a node would say that
//! this one cannot be brought to say (no place, no image, an eviction) is put into its mouth.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::http::Request;
use crate::processes::signal;
use crate::receiver::Receiver;

const NAMESPACE: &str = "ml";

/// The server and its cluster; what still works ends with it.
pub(crate) struct Api {
    cluster: Arc<Mutex<Cluster>>,
    scratch: tempfile::TempDir,
}

#[derive(Default)]
struct Cluster {
    jobs: BTreeMap<String, Job>,
    /// Every Job that was ordered.
    orders: Vec<Value>,
    /// Statuses of the next pods; those after them are processes.
    fates: VecDeque<Value>,
    /// Names of the deleted.
    deleted: Vec<String>,
    events: Vec<Value>,
    away: bool,
    /// Processes of Jobs that are gone.
    orphans: Vec<Child>,
}

struct Job {
    manifest: Value,
    pod: Pod,
    deleting: bool,
}

enum Pod {
    Process(Child),
    /// It ended with this code.
    Over(i32),
    Said(Value),
}

impl Api {
    pub(crate) fn start() -> Self {
        let cluster: Arc<Mutex<Cluster>> = Arc::default();
        let own = Arc::clone(&cluster);
        let server = Receiver::start(move |_, sent| {
            let (code, answer) = own.lock().unwrap().answer(sent);
            (code, answer.to_string())
        });
        let api = Self {
            cluster,
            scratch: tempfile::tempdir().unwrap(),
        };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": server.url}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {}}],
        });
        std::fs::write(api.kubeconfig(), config.to_string()).unwrap();
        api
    }

    pub(crate) fn kubeconfig(&self) -> String {
        let path = self.scratch.path().join("kubeconfig");
        path.display().to_string()
    }

    /// `runners:`, with these settings more.
    pub(crate) fn runners(&self, kubectl: &str, more: &str) -> String {
        // Where the projects of the tests lie, as the program sees it.
        let shared = std::fs::canonicalize(std::env::temp_dir()).unwrap();
        let shared = shared.display();
        format!(
            "runners:\n  kubernetes:\n    namespace: {NAMESPACE}\n    image: registry.example/flowrun:1\n    kubectl: '{kubectl}'\n    user: 10001\n    jobs: 4\n    volumes: {{ '{shared}': {{ persistentVolumeClaim: {{ claimName: shared }} }} }}\n{more}"
        )
    }

    /// The pod of the next Job, or of the one after those that have a fate, says this.
    pub(crate) fn fate(&self, status: Value) {
        self.cluster.lock().unwrap().fates.push_back(status);
    }

    /// What `events` has.
    pub(crate) fn event(&self, reason: &str, message: &str) {
        let event = json!({"reason": reason, "message": message, "type": "Warning"});
        self.cluster.lock().unwrap().events.push(event);
    }

    /// Whether it answers that it cannot.
    pub(crate) fn be_away(&self, away: bool) {
        self.cluster.lock().unwrap().away = away;
    }

    pub(crate) fn orders(&self) -> Vec<Value> {
        self.cluster.lock().unwrap().orders.clone()
    }

    /// Names of the Jobs that are there.
    pub(crate) fn jobs(&self) -> Vec<String> {
        let mut cluster = self.cluster.lock().unwrap();
        cluster.pass();
        cluster.jobs.keys().cloned().collect()
    }

    /// Jobs that were deleted.
    pub(crate) fn deleted(&self) -> Vec<String> {
        self.cluster.lock().unwrap().deleted.clone()
    }

    /// Deletes the pods, in whose places others begin the same, as Kubernetes 1.20 does.
    pub(crate) fn replace_pods(&self) {
        let mut cluster = self.cluster.lock().unwrap();
        let Cluster { jobs, orphans, .. } = &mut *cluster;
        for job in jobs.values_mut() {
            let spec = &job.manifest["spec"]["template"]["spec"];
            let next = Pod::Process(started(&spec["containers"][0]));
            let process = std::mem::replace(&mut job.pod, next).process();
            if let Some(process) = &process {
                signal("-TERM", process.id());
            }
            orphans.extend(process);
        }
    }

    /// Deletes all Jobs, as somebody else would.
    pub(crate) fn delete_all(&self) {
        let mut cluster = self.cluster.lock().unwrap();
        let names: Vec<String> = cluster.jobs.keys().cloned().collect();
        for name in names {
            cluster.delete(&name, "Background");
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let cluster = self.cluster.lock();
        let mut cluster = cluster.unwrap_or_else(PoisonError::into_inner);
        let jobs = std::mem::take(&mut cluster.jobs).into_values();
        let mut left: Vec<Child> = jobs.filter_map(|job| job.pod.process()).collect();
        left.append(&mut cluster.orphans);
        for mut process in left {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Cluster {
    fn answer(&mut self, sent: &Request) -> (u16, Value) {
        if self.away {
            let text = "the server is currently unable to handle the request";
            return status(503, "ServiceUnavailable", text);
        }
        self.pass();
        let query = sent.query();
        let of = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
        let jobs = format!("/apis/batch/v1/namespaces/{NAMESPACE}/jobs");
        let core = format!("/api/v1/namespaces/{NAMESPACE}");
        match (sent.method.as_str(), sent.place()) {
            ("GET", "/version") => (
                200,
                json!({"major": "1", "minor": "32", "gitVersion": "v1.32.0"}),
            ),
            ("POST", path) if path == jobs => self.create(&sent.body, of("fieldValidation")),
            ("GET", path) if path == jobs => {
                let items = self.jobs.values().map(Job::shown);
                (200, list("JobList", items, of("labelSelector")))
            }
            ("GET", path) if path == format!("{core}/pods") => {
                let items = self.jobs.values().map(Job::pod);
                (200, list("PodList", items, of("labelSelector")))
            }
            ("GET", path) if path == format!("{core}/events") => {
                let asked = of("fieldSelector");
                assert!(asked.starts_with("involvedObject.name=flowrun-"), "{asked}");
                let items = self.events.iter().cloned();
                (200, list("EventList", items, ""))
            }
            ("DELETE", path) => match path.strip_prefix(&format!("{jobs}/")) {
                Some(name) => self.delete(name, of("propagationPolicy")),
                None => status(
                    404,
                    "NotFound",
                    "the server could not find the requested resource",
                ),
            },
            _ => status(
                404,
                "NotFound",
                "the server could not find the requested resource",
            ),
        }
    }

    fn create(&mut self, body: &[u8], validation: &str) -> (u16, Value) {
        let Ok(mut manifest) = serde_json::from_slice::<Value>(body) else {
            return status(400, "BadRequest", "the body is no JSON");
        };
        if validation != "Strict" || manifest["kind"] != "Job" {
            return status(
                400,
                "BadRequest",
                "no Job, or one that is not to be checked",
            );
        }
        let name = manifest["metadata"]["name"].as_str().unwrap().to_owned();
        if self.jobs.contains_key(&name) {
            let text = format!("jobs.batch \"{name}\" already exists");
            return status(409, "AlreadyExists", &text);
        }
        self.orders.push(manifest.clone());
        manifest["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        let spec = &manifest["spec"]["template"]["spec"];
        let pod = match self.fates.pop_front() {
            Some(fate) => Pod::Said(fate),
            None => Pod::Process(started(&spec["containers"][0])),
        };
        let job = Job {
            manifest,
            pod,
            deleting: false,
        };
        let shown = job.shown();
        self.jobs.insert(name, job);
        (201, shown)
    }

    /// Asks the process to stop. In the background the Job is gone at once, else with it.
    fn delete(&mut self, name: &str, policy: &str) -> (u16, Value) {
        let Some(mut job) = self.jobs.remove(name) else {
            return status(404, "NotFound", &format!("jobs.batch \"{name}\" not found"));
        };
        self.deleted.push(name.to_owned());
        let shown = job.shown();
        if let Pod::Process(process) = &mut job.pod
            && process.try_wait().unwrap().is_none()
        {
            signal("-TERM", process.id());
            if policy == "Foreground" {
                job.deleting = true;
                self.jobs.insert(name.to_owned(), job);
                return (200, shown);
            }
        }
        self.orphans.extend(job.pod.process());
        (200, shown)
    }

    /// Time passes: processes end, and Jobs that are deleted go with them.
    fn pass(&mut self) {
        for job in self.jobs.values_mut() {
            if let Pod::Process(process) = &mut job.pod
                && let Some(ended) = process.try_wait().unwrap()
            {
                let code = ended.code().or_else(|| Some(128 + ended.signal()?));
                job.pod = Pod::Over(code.unwrap());
            }
        }
        self.jobs
            .retain(|_, job| !job.deleting || matches!(job.pod, Pod::Process(_)));
        self.orphans
            .retain_mut(|process| process.try_wait().unwrap().is_none());
    }
}

impl Pod {
    fn process(self) -> Option<Child> {
        match self {
            Self::Process(process) => Some(process),
            Self::Over(_) | Self::Said(_) => None,
        }
    }

    fn status(&self) -> Value {
        match self {
            Self::Process(_) => json!({"phase": "Running"}),
            Self::Over(code) => ended(*code, if *code == 0 { "Completed" } else { "Error" }),
            Self::Said(status) => status.clone(),
        }
    }
}

impl Job {
    /// As a reader gets it.
    fn shown(&self) -> Value {
        let mut job = self.manifest.clone();
        if self.deleting {
            job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z".into();
        }
        let condition = match self.pod.status()["phase"].as_str() {
            Some("Succeeded") => Some(json!({"type": "Complete", "status": "True"})),
            Some("Failed") => Some(json!({
                "type": "Failed", "status": "True", "reason": "BackoffLimitExceeded",
            })),
            _ => None,
        };
        job["status"] = json!({"conditions": Vec::from_iter(condition)});
        job
    }

    fn pod(&self) -> Value {
        let template = &self.manifest["spec"]["template"];
        let name = self.manifest["metadata"]["name"].as_str().unwrap();
        json!({
            "metadata": {
                "name": format!("{name}-x7k2p"), "labels": template["metadata"]["labels"],
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "status": self.pod.status(),
        })
    }
}

/// The status of a pod whose container ended.
pub(crate) fn ended(code: i32, reason: &str) -> Value {
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    json!({"phase": phase, "containerStatuses": [{"name": "flowrun", "state": {
        "terminated": {"exitCode": code, "reason": reason},
    }}]})
}

/// The process of a container, with nothing of this one's environment but the search path.
fn started(container: &Value) -> Child {
    let words = container["command"].as_array().unwrap();
    let words: Vec<&str> = words.iter().map(|word| word.as_str().unwrap()).collect();
    let env = container["env"].as_array().unwrap();
    let env = env.iter().map(|one| {
        (
            one["name"].as_str().unwrap(),
            one["value"].as_str().unwrap(),
        )
    });
    let mut command = if Path::new(words[0]).exists() {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command
    } else {
        let mut command = Command::new("sh");
        command.args(["-c", "exit 127"]);
        command
    };
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs(env)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Those of a list that a selector means.
fn list(kind: &str, items: impl Iterator<Item = Value>, selector: &str) -> Value {
    let fits = |item: &Value| match selector.split_once('=') {
        Some((name, value)) => item["metadata"]["labels"][name] == value,
        None => true,
    };
    let items: Vec<Value> = items.filter(fits).collect();
    json!({"kind": kind, "apiVersion": "v1", "metadata": {}, "items": items})
}

fn status(code: u16, reason: &str, message: &str) -> (u16, Value) {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    (code, status)
}
