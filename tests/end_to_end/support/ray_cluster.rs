//! A real Ray of this machine. `FLOWRUN_RAY_PYTHON` names a Python with `ray[default,serve]`; else
//! `python3` is tried.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::server::{client, free_port};

/// A Python that has Ray; says on stderr that the test is skipped when there is none.
#[allow(clippy::print_stderr)]
pub(crate) fn python() -> Option<PathBuf> {
    let named = std::env::var_os("FLOWRUN_RAY_PYTHON").map(PathBuf::from);
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
        eprintln!("skipped: no Python with `ray[default,serve]`; name one in FLOWRUN_RAY_PYTHON");
    }
    found.then_some(python)
}

/// A Ray of one node, which ends with the test.
pub(crate) struct Ray {
    child: Child,
    python: PathBuf,
    /// Address of the cluster, for other nodes.
    address: String,
    nodes: Vec<Child>,
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
        // Its sockets' paths must be short.
        let scratch = tempfile::Builder::new()
            .prefix("fr")
            .tempdir_in("/tmp")
            .unwrap();
        let (port, gcs) = (free_port(), free_port());
        let flag = |name: &str| format!("--{name}={}", free_port());
        let child = Command::new(python)
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
            .arg(format!("--temp-dir={}", scratch.path().display()))
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut ray = Self {
            child,
            python: python.to_owned(),
            address: format!("127.0.0.1:{gcs}"),
            nodes: Vec::new(),
            dashboard: format!("http://127.0.0.1:{port}"),
            scratch,
        };
        let version = format!("{}/api/version", ray.dashboard);
        let deadline = Instant::now() + Duration::from_secs(180);
        while client().get(&version).send().is_err() {
            let ended = ray.child.try_wait().unwrap();
            assert!(ended.is_none(), "ray ended: {ended:?}");
            assert!(Instant::now() < deadline, "ray did not come up");
            std::thread::sleep(Duration::from_millis(200));
        }
        ray
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
