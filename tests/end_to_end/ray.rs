//! The target `ray-serve` on a real Ray of this machine. `FLOWRUN_RAY_PYTHON` names a Python with
//! `ray[default,serve]`; else `python3` is tried.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::project::Run;
use crate::server::{client, free_port};
use crate::tiny::{self, write_model};

/// A Python that has Ray.
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
    pub(crate) fn start(python: &std::path::Path) -> Self {
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
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.scratch.path()
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
    fn settled(&self) -> Vec<(String, Value, Value)> {
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

#[test]
fn a_bundle_is_served_on_ray_and_one_that_fails_leaves_the_old_one() {
    let Some(python) = python() else {
        println!("skipped: no Python with `ray[default,serve]`; name one in FLOWRUN_RAY_PYTHON");
        return;
    };
    let ray = Ray::start(&python);
    let port = free_port();
    let project = tiny::project();
    let program = env!("CARGO_BIN_EXE_flowrun");
    let deploy = format!(
        "      ray: {{ dashboard: '{}' }}\n      settings: {{ port: {port}, cpu: '1', replicas: 1, max_replicas: 1, program: '{program}' }}\n",
        ray.dashboard
    );
    let target = "      target: ${{ params.target }}\n";
    project.edit("pipeline.yaml", target, &format!("{target}{deploy}"));
    let run = || -> Run { project.run(&["pipeline.yaml", "--json", "--set", "target=ray-serve"]) };
    let url = |run: &Run| -> String {
        let events = run.events();
        let done = events
            .iter()
            .find(|e| e["event"] == "step_finished" && e["step"] == "deploy")
            .unwrap();
        done["metrics"]["url"].as_str().unwrap().to_owned()
    };

    let first = run().ok();
    let url = url(&first);
    assert_eq!(url, format!("http://127.0.0.1:{port}"));
    let rows = project.read("bundle/smoke.jsonl");
    let rows: Vec<Value> = rows
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let asked_all = || {
        rows.iter().all(|row| {
            let body = json!({"text": row["text"]});
            let answer = client().post(format!("{url}/predict")).json(&body).send();
            let answer: Value = answer.unwrap().json().unwrap();
            answer["label"] == row["label"]
        })
    };
    assert!(asked_all());
    let page = client().get(format!("{url}/")).send().unwrap();
    assert!(page.text().unwrap().contains("</html>"));
    let one = ray.settled();
    assert!(one.len() == 1 && one[0].2 == "/", "{one:?}");

    // A version that cannot start there: the old one answers on, and the reason is told.
    write_model(&project.path("tiny"), 2);
    project.edit("pipeline.yaml", program, "/nowhere/flowrun");
    let refused = run();
    assert_eq!(refused.code, Some(5), "{}", refused.stdout);
    assert!(
        refused.stdout.contains("nothing was deployed") && refused.stdout.contains("/nowhere"),
        "{}",
        refused.stdout
    );
    assert_eq!(ray.settled(), one);
    assert!(asked_all());

    // One that can takes its place.
    project.edit("pipeline.yaml", "/nowhere/flowrun", program);
    run().ok();
    let other = ray.settled();
    assert!(other.len() == 1 && other[0].2 == "/", "{other:?}");
    assert_ne!(other[0].0, one[0].0);
    let status = || project.run(&["deploy", "status", "--json"]).ok().events();
    let of = |status: &Value| {
        let current = &status["current"];
        let name = |release: &Value| release["application"].as_str().unwrap().to_owned();
        (name(&current["release"]), name(&current["previous"]))
    };
    let second = status();
    assert_eq!(second.len(), 1);
    assert_eq!(second[0]["target"], "ray-serve");
    assert_eq!(second[0]["up"], true, "{second:?}");
    assert_eq!(second[0]["state"]["status"], "RUNNING");
    assert_eq!(second[0]["state"]["url"], url.as_str());
    assert!(second[0]["state"]["since"].as_str().unwrap().ends_with('Z'));
    assert_eq!(of(&second[0]), (other[0].0.clone(), one[0].0.clone()));
    let shown = project.run(&["deploy", "status", "tiny"]).ok().stdout;
    assert!(
        shown.contains(&format!("up at {url}")) && shown.contains("before it"),
        "{shown}"
    );

    // And back, with the files that are kept here.
    project.run(&["deploy", "rollback", "tiny"]).ok();
    let back = ray.settled();
    assert_eq!((back.len(), &back[0].0), (1, &one[0].0));
    assert_eq!(back[0].2, "/");
    assert!(asked_all());
    let first = status();
    assert_eq!(first[0]["up"], true, "{first:?}");
    assert_eq!(of(&first[0]), (one[0].0.clone(), other[0].0.clone()));

    // Files that were changed since are none to go back to.
    let kept = first[0]["current"]["previous"]["folder"].as_str().unwrap();
    let smoke = format!("{kept}/bundle/smoke.jsonl");
    let wrong = std::fs::read_to_string(&smoke).unwrap() + "\n";
    std::fs::write(&smoke, wrong).unwrap();
    let refused = project.run(&["deploy", "rollback", "tiny"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert_eq!(ray.settled(), back);
    assert!(asked_all());
}

/// Reads a file as Ray does before it deploys it.
const VALIDATE: &str = "
import sys, yaml
from ray.serve.schema import ServeDeploySchema
ServeDeploySchema(**yaml.safe_load(open(sys.argv[1])))
";

#[test]
fn the_files_for_ray_are_what_it_takes() {
    let Some(python) = python() else {
        println!("skipped: no Python with `ray[default,serve]`; name one in FLOWRUN_RAY_PYTHON");
        return;
    };
    let project = tiny::project();
    project.run(&["pipeline.yaml"]).ok();
    let render = ["deploy", "render", "bundle", "--target", "ray-serve"];
    let set = ["--set", "base_model=org/base"];
    let more = ["--set", "adapters_url=s3://bucket/adapters", "-o", "files"];
    project.run(&[&render[..], &set, &more].concat()).ok();
    let taken = |file: &str| {
        let checked = Command::new(&python)
            .args(["-c", VALIDATE])
            .arg(project.path(file))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        (checked.status.success(), said)
    };
    for file in ["files/serve.yaml", "files/serve_llm.yaml"] {
        let (good, said) = taken(file);
        assert!(good, "{file}: {said}");
    }
    let llm = project.read("files/serve_llm.yaml");
    assert!(
        llm.contains("dynamic_lora_loading_path: \"s3://bucket/adapters\""),
        "{llm}"
    );
    let wrong = llm.replace(
        "import_path: ray.serve.llm:build_openai_app",
        "import_path: nowhere",
    );
    assert_ne!(wrong, llm);
    project.write("files/wrong.yaml", &wrong);
    assert!(!taken("files/wrong.yaml").0, "a wrong one is refused");
}

#[test]
fn what_was_deployed_on_a_cluster_that_is_gone_is_down() {
    let project = tiny::project();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    std::fs::create_dir_all(project.path("deployed/tiny/ray")).unwrap();
    let folder = project.path("deployed/tiny/ray/tiny-0123456789ab");
    let release = json!({
        "application": "tiny-0123456789ab", "bundle": "0123", "folder": folder, "since": 1,
    });
    let record = json!({"ray": {"dashboard": nobody}, "release": release});
    project.write("deployed/tiny/ray/current.json", &record.to_string());
    let status = project.run(&["deploy", "status", "tiny", "--json"]).ok();
    let status = status.events().remove(0);
    assert_eq!(status["up"], false);
    assert_eq!(status["state"]["since"], "1970-01-01T00:00:01Z");
    let why = status["state"]["why"].as_str().unwrap();
    assert!(why.contains(&nobody), "{why}");
    let nothing = project.run(&["deploy", "rollback", "tiny"]);
    assert_eq!(nothing.code, Some(3), "{}", nothing.stderr);
    let elsewhere = project.run(&["deploy", "status", "tiny", "--target", "local"]);
    assert_eq!(elsewhere.code, Some(2), "{}", elsewhere.stderr);
}

#[test]
fn a_cluster_that_is_not_there_is_named() {
    let project = tiny::project();
    let target = "      target: ${{ params.target }}\n";
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let ray = format!("{target}      ray: {{ dashboard: '{nobody}' }}\n");
    project.edit("pipeline.yaml", target, &ray);
    let refused = project.run(&["pipeline.yaml", "--set", "target=ray-serve"]);
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    let said = format!("{}{}", refused.stdout, refused.stderr);
    assert!(
        said.contains(&nobody) && said.contains("ray start"),
        "{said}"
    );
}
