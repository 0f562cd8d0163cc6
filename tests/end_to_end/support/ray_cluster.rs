//! A real Ray of this machine. `FLOWRUN_RAY_PYTHON` names a Python with `ray[default,serve]`; else
//! `python3` is tried.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::external::set;
use crate::processes::{running, signal, until};
use crate::required::skip;
use crate::server::{client, free_port};

/// A Python that has Ray; says on stderr that the test is skipped when there is none.
pub(crate) fn python() -> Option<PathBuf> {
    let named = set("FLOWRUN_RAY_PYTHON");
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let find = "import importlib.util as u, sys; sys.exit(u.find_spec('ray') is None or u.find_spec('ray.serve') is None)";
    let found = Command::new(&python)
        .args(["-c", find])
        .stderr(Stdio::null())
        .status();
    let found = found.is_ok_and(|status| status.success());
    assert!(
        found || named.is_none(),
        "FLOWRUN_RAY_PYTHON has no `ray[default,serve]`"
    );
    if !found {
        let why = "no Python has `ray[default,serve]`; name one in FLOWRUN_RAY_PYTHON";
        skip("ray", why);
    }
    found.then_some(python)
}

/// A Ray of one node, which ends with the test.
pub(crate) struct Ray {
    child: Child,
    python: PathBuf,
    /// Variables of its processes beside this process's own.
    env: Vec<(String, String)>,
    /// Address of the cluster, for other nodes.
    address: String,
    nodes: Vec<Child>,
    /// The dashboard's.
    port: u16,
    pub(crate) dashboard: String,
    scratch: tempfile::TempDir,
}

impl Ray {
    /// One, where there is a Python for it.
    pub(crate) fn at_hand() -> Option<Self> {
        Some(Self::start(&python()?))
    }

    fn start(python: &Path) -> Self {
        Self::start_with(python, &[])
    }

    /// One of that Python, whose processes have these variables more.
    pub(crate) fn start_with(python: &Path, env: &[(&str, String)]) -> Self {
        // Ray chooses ports of its own (its agents') seconds before it takes them: another process
        // may have one by then.
        let mut tries = (0..3).map(|_| Self::tried(python, env));
        tries.find_map(|ray| ray).expect("ray ended three times")
    }

    /// One, unless it ends before it is up.
    fn tried(python: &Path, env: &[(&str, String)]) -> Option<Self> {
        // Its sockets' paths must be short.
        let scratch = tempfile::Builder::new()
            .prefix("fr")
            .tempdir_in("/tmp")
            .unwrap();
        let (port, gcs) = (free_port(), free_port());
        let own = |(name, value): &(&str, String)| ((*name).to_owned(), value.clone());
        let env: Vec<(String, String)> = env.iter().map(own).collect();
        let mut ray = Self {
            child: start_head(python, scratch.path(), [port, gcs], &env),
            python: python.to_owned(),
            env,
            address: format!("127.0.0.1:{gcs}"),
            nodes: Vec::new(),
            port,
            dashboard: format!("http://127.0.0.1:{port}"),
            scratch,
        };
        ray.comes_up().then_some(ray)
    }

    /// Waits until its dashboard answers; false when it ended before.
    fn comes_up(&mut self) -> bool {
        let version = format!("{}/api/version", self.dashboard);
        let deadline = Instant::now() + Duration::from_secs(180);
        while client().get(&version).send().is_err() {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < deadline, "ray did not come up");
            std::thread::sleep(Duration::from_millis(200));
        }
        true
    }

    /// Kills the process of the cluster's own state; `ray start --block` ends all others of its
    /// node then.
    pub(crate) fn lose_head(&mut self) {
        let folder = self.scratch.path().display().to_string();
        signal("-KILL", running(&[&folder, "gcs_server"]).unwrap());
        until("the head lives on", || {
            self.child.try_wait().unwrap().is_some()
        });
    }

    /// Starts another head with a dashboard at the same address. It knows nothing of the lost one.
    pub(crate) fn start_head_again(&mut self) {
        let port = self.port;
        until("the dashboard's port is taken", || {
            std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
        });
        let gcs = free_port();
        let ports = [port, gcs];
        self.child = start_head(&self.python, self.scratch.path(), ports, &self.env);
        self.address = format!("127.0.0.1:{gcs}");
        assert!(self.comes_up(), "ray ended");
    }

    /// The section of a pipeline that names it.
    pub(crate) fn runners(&self) -> String {
        let address = &self.dashboard;
        format!("runners:\n  ray: {{ address: '{address}', jobs: 4 }}\n")
    }

    /// Ids and states of the jobs that it knows.
    pub(crate) fn jobs(&self) -> Vec<(String, String)> {
        let url = format!("{}/api/jobs/", self.dashboard);
        let jobs: Vec<Value> = client().get(url).send().unwrap().json().unwrap();
        let text = |job: &Value, name: &str| job[name].as_str().unwrap_or_default().to_owned();
        jobs.iter()
            .map(|job| (text(job, "submission_id"), text(job, "status")))
            .collect()
    }

    /// Adds a node that has a plough; its processes' command lines hold `label`.
    pub(crate) fn add_node(&mut self, label: &str) {
        let resources = format!("{{\"plough\": 1, \"{label}\": 1}}");
        let child = Command::new(&self.python)
            .args(["-m", "ray.scripts.scripts", "start", "--block"])
            .arg(format!("--address={}", self.address))
            .args(["--node-ip-address=127.0.0.1", "--num-cpus=1"])
            .arg("--object-store-memory=100000000")
            .arg(format!("--dashboard-agent-listen-port={}", free_port()))
            .arg(format!("--resources={resources}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.nodes.push(child);
    }

    /// Where its processes' files are.
    pub(crate) fn folder(&self) -> &Path {
        self.scratch.path()
    }

    /// Has it serve these applications and no others, and waits until they run.
    pub(crate) fn serve(&self, config: &Value, within: Duration) {
        let url = format!("{}/api/serve/applications/", self.dashboard);
        // It starts Serve itself first.
        let patience = Duration::from_secs(180);
        let taken = client().put(&url).timeout(patience).json(config).send();
        let taken = taken.unwrap();
        assert!(taken.status().is_success(), "{}", taken.text().unwrap());
        let deadline = Instant::now() + within;
        loop {
            let served = client().get(&url).timeout(patience).send().unwrap();
            let served: Value = served.json().unwrap();
            let all = served["applications"].as_object().unwrap();
            let mut states = all.values().map(|app| app["status"].as_str().unwrap());
            if !all.is_empty() && states.all(|state| state == "RUNNING") {
                return;
            }
            let failed = all.values().find(|app| app["status"] == "DEPLOY_FAILED");
            assert!(failed.is_none(), "{failed:?}");
            assert!(Instant::now() < deadline, "{served}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Names, states and routes of its applications.
    fn applications(&self) -> Vec<(String, Value, Value)> {
        let url = format!("{}/api/serve/applications/", self.dashboard);
        let served: Value = client().get(url).send().unwrap().json().unwrap();
        let all = served["applications"].as_object().unwrap();
        all.iter()
            .map(|(name, app)| {
                let (status, route) = (app["status"].clone(), app["route_prefix"].clone());
                (name.clone(), status, route)
            })
            .collect()
    }

    /// Waits until what goes is gone.
    pub(crate) fn settled(&self) -> Vec<(String, Value, Value)> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let all = self.applications();
            if all.iter().all(|(_, status, _)| status == "RUNNING") {
                return all;
            }
            assert!(Instant::now() < deadline, "{all:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// `ports` are the dashboard's and the cluster's.
fn start_head(
    python: &Path,
    scratch: &Path,
    [port, gcs]: [u16; 2],
    env: &[(String, String)],
) -> Child {
    let flag = |name: &str| format!("--{name}={}", free_port());
    Command::new(python)
        .args(["-m", "ray.scripts.scripts", "start", "--head", "--block"])
        .args(["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"])
        .arg(format!("--dashboard-port={port}"))
        .arg(format!("--port={gcs}"))
        .args([
            flag("ray-client-server-port"),
            flag("dashboard-agent-listen-port"),
        ])
        .args(["--num-cpus=4", "--object-store-memory=100000000"])
        .arg("--disable-usage-stats")
        .arg(format!("--temp-dir={}", scratch.display()))
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

impl Drop for Ray {
    fn drop(&mut self) {
        // Each ends its own processes.
        for child in self.nodes.iter_mut().chain([&mut self.child]) {
            let pid = child.id().to_string();
            let _ = Command::new("kill").arg(pid).status();
            let deadline = Instant::now() + Duration::from_secs(30);
            while child.try_wait().is_ok_and(|ended| ended.is_none()) {
                if Instant::now() > deadline {
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
