//! MLflow: what a tracking server is told of a run. One test asks a real server:
//! `FLOWRUN_MLFLOW_PYTHON` names a Python with `mlflow`.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::external::named;
use crate::http::Request;
use crate::project::{Project, Run};
use crate::receiver::Receiver;
use crate::required::skip;
use crate::server::{client, free_port};
use crate::tiny;

const TOKEN: &str = "t0ken-of-the-tracking-server";
/// How long a server may take to come up.
const UP_WITHIN: Duration = Duration::from_secs(180);

const PIPELINE: &str = r#"
name: tracked
params: { lr: 0.5, words: [a, b] }
tracking:
  mlflow:
    experiment: the-experiment
    artifacts: [score.metrics]
    register: { name: the-model, output: model.model }
steps:
  score:
    foreach: { n: [1, 2] }
    run: printf '{"accuracy":0.%d,"best":"x","deep":{"y":1}}' "$N" > "$metrics"
    env: { N: "${{ item.n }}" }
    out: { metrics: metrics.json }
  model:
    run: mkdir -p "$model/sub"; echo '{"r":8}' > "$model/adapter_config.json"; echo w > "$model/sub/w"
    out: { model: model }
"#;

fn project() -> Project {
    let project = Project::new();
    project.write("p.yaml", PIPELINE);
    project
}

fn run(project: &Project, url: &str) -> Run {
    Run::of(command(project, url).output().unwrap())
}

fn command(project: &Project, url: &str) -> Command {
    let mut command = project.command(&["p.yaml", "--json"]);
    command
        .env("MLFLOW_TRACKING_URI", url)
        .env("MLFLOW_TRACKING_TOKEN", TOKEN)
        .env_remove("MLFLOW_EXPERIMENT_NAME")
        .env_remove("MLFLOW_EXPERIMENT_ID")
        .env_remove("MLFLOW_TRACKING_USERNAME");
    command
}

/// Answers as a server that knows no experiment and no model yet.
fn answer(sent: &Request) -> (u16, String) {
    let path = sent.place();
    let (status, body) = match path.rsplit_once("/mlflow/").map(|(_, call)| call) {
        Some("experiments/get-by-name") => (404, json!({"error_code": "RESOURCE_DOES_NOT_EXIST"})),
        Some("experiments/create") => (200, json!({"experiment_id": "7"})),
        Some("runs/create") => (
            200,
            json!({"run": {"info": {
                "run_id": "r1", "artifact_uri": "mlflow-artifacts:/7/r1/artifacts",
            }}}),
        ),
        Some("registered-models/create") => (
            400,
            json!({"error_code": "RESOURCE_ALREADY_EXISTS", "message": "it is there"}),
        ),
        _ => (200, json!({})),
    };
    (status, body.to_string())
}

/// The bodies of the calls of this path.
fn calls(sent: &[Request], path: &str) -> Vec<Value> {
    let path = format!("/api/2.0/mlflow/{path}");
    let same = sent.iter().filter(|one| one.path == path);
    same.map(Request::json).collect()
}

/// All entries of one kind in the batches that were logged.
fn logged(sent: &[Request], kind: &str) -> Vec<Value> {
    let batches = calls(sent, "runs/log-batch");
    let entries = batches.iter().filter_map(|batch| batch[kind].as_array());
    entries.flatten().cloned().collect()
}

fn has(entries: &[Value], key: &str, value: &Value) -> bool {
    let is = |entry: &&Value| entry["key"] == key && entry["value"] == *value;
    entries.iter().any(|entry| is(&entry))
}

#[test]
fn a_run_is_told_with_its_params_metrics_and_files() {
    let server = Receiver::start(|_, sent| answer(sent));
    let project = project();
    for round in 0..3 {
        let before = server.sent().len();
        let ended = run(&project, &server.url).ok();
        assert!(!ended.stderr.contains("MLflow"), "{}", ended.stderr);
        let sent = server.sent().split_off(before);
        for one in &sent {
            assert_eq!(one.headers["authorization"], format!("Bearer {TOKEN}"));
        }
        let begun = calls(&sent, "runs/create");
        assert_eq!(begun.len(), 1, "{sent:?}");
        assert_eq!(begun[0]["experiment_id"], "7");
        let id = ended.events()[0]["run"].clone();
        assert_eq!(begun[0]["run_name"], id);
        let tags = begun[0]["tags"].as_array().unwrap();
        assert!(has(tags, "flowrun.run", &id) && has(tags, "mlflow.source.name", &"p.yaml".into()));
        let params = logged(&sent, "params");
        assert!(has(&params, "lr", &"0.5".into()), "{params:?}");
        assert!(has(&params, "words", &r#"["a","b"]"#.into()), "{params:?}");
        // Also in a run that had nothing to do.
        let metrics = logged(&sent, "metrics");
        assert!(
            has(&metrics, "score/1/accuracy", &json!(0.1)),
            "{metrics:?}"
        );
        assert!(
            has(&metrics, "score/2/accuracy", &json!(0.2)),
            "{metrics:?}"
        );
        let tags = logged(&sent, "tags");
        assert!(has(&tags, "score/1/best", &"x".into()), "{tags:?}");
        let put: Vec<&str> = sent
            .iter()
            .filter(|one| one.method == "PUT")
            .map(|one| {
                one.path
                    .strip_prefix("/api/2.0/mlflow-artifacts/artifacts")
                    .unwrap()
            })
            .collect();
        for path in [
            "/7/r1/artifacts/score/1/metrics",
            "/7/r1/artifacts/score/2/metrics",
            "/7/r1/artifacts/model/model/adapter_config.json",
            "/7/r1/artifacts/model/model/sub/w",
        ] {
            assert!(put.contains(&path), "{path}: {put:?}");
        }
        let version = calls(&sent, "model-versions/create");
        assert_eq!(version[0]["name"], "the-model");
        assert_eq!(
            version[0]["source"],
            "mlflow-artifacts:/7/r1/artifacts/model/model"
        );
        assert_eq!(calls(&sent, "runs/update")[0]["status"], "FINISHED");
        // Tracking is in no key.
        assert_eq!(ended.steps("cached").len(), if round == 0 { 0 } else { 3 });
        assert!(!ended.stdout.contains(TOKEN));
    }
}

#[test]
fn a_failed_run_is_told_as_one_and_registers_nothing() {
    let server = Receiver::start(|_, sent| answer(sent));
    let project = project();
    project.edit("p.yaml", "echo w >", "echo bad luck >&2; exit 3; echo w >");
    let ended = run(&project, &server.url);
    assert_eq!(ended.code, Some(4));
    let sent = server.sent();
    assert_eq!(calls(&sent, "runs/update")[0]["status"], "FAILED");
    assert!(calls(&sent, "model-versions/create").is_empty());
    let tags = logged(&sent, "tags");
    let note = tags.iter().find(|tag| tag["key"] == "mlflow.note.content");
    let note = note.unwrap()["value"].as_str().unwrap();
    assert!(
        note.contains("`model`") && note.contains("bad luck"),
        "{note}"
    );
}

#[test]
fn a_run_whose_events_cannot_be_written_is_told_to_its_end() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else {
        skip("dev-full", "there is no /dev/full");
        return;
    };
    let server = Receiver::start(|_, sent| answer(sent));
    let project = project();
    let hook = "name: tracked\nhooks: { tell: { command: [sh, -c, 'cat > told.json'] } }\n";
    project.edit("p.yaml", "name: tracked\n", hook);
    // The second has nothing to do.
    for _ in 0..2 {
        let before = server.sent().len();
        let mut command = command(&project, &server.url);
        let ended = command.stdout(full.try_clone().unwrap()).output().unwrap();
        let ended = Run::of(ended);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let sent = server.sent().split_off(before);
        assert_eq!(calls(&sent, "runs/update")[0]["status"], "FINISHED");
        let told: Value = serde_json::from_str(&project.read("told.json")).unwrap();
        assert_eq!(told["status"], "ok");
        std::fs::remove_file(project.path("told.json")).unwrap();
    }
}

#[test]
fn a_server_that_is_not_there_or_refuses_is_a_warning() {
    let refuses = Receiver::start(|_, sent| {
        let told = format!("no {}", sent.headers["authorization"]);
        (
            401,
            json!({"error_code": "UNAUTHENTICATED", "message": told}).to_string(),
        )
    });
    let foreign = Receiver::start(|_, _| (200, "<html>".to_owned()));
    let nobody = format!("http://127.0.0.1:{}", free_port());
    for (url, words) in [
        (nobody.as_str(), nobody.as_str()),
        (refuses.url.as_str(), "401"),
        (foreign.url.as_str(), "not one of an MLflow server"),
        ("sqlite:///mlflow.db", "`mlflow server`"),
    ] {
        let ended = run(&project(), url).ok();
        let warning = ended.stderr.lines().find(|line| line.contains("MLflow: "));
        let warning = warning.unwrap_or_default();
        assert!(warning.contains(words), "{words}: {}", ended.stderr);
        assert!(!ended.stderr.contains(TOKEN), "{}", ended.stderr);
    }
    // One call told enough.
    assert_eq!(refuses.sent().len(), 1);
}

#[test]
fn a_file_that_breaks_off_costs_neither_the_others_nor_the_end() {
    let server = Receiver::start(|_, sent| match sent.path.ends_with("/score/1/metrics") {
        true => (0, String::new()),
        false => answer(sent),
    });
    let ended = run(&project(), &server.url).ok();
    assert!(ended.stderr.contains("MLflow: artifacts: "));
    let sent = server.sent();
    let is_there = |path: &str| sent.iter().any(|one| one.path.ends_with(path));
    assert!(is_there("/score/2/metrics") && is_there("/model/model/sub/w"));
    assert_eq!(calls(&sent, "model-versions/create").len(), 1);
    assert_eq!(calls(&sent, "runs/update")[0]["status"], "FINISHED");
}

#[test]
fn a_server_that_breaks_off_is_told_the_end_and_nothing_else() {
    let server = Receiver::start(|_, sent| match sent.path.ends_with("/runs/log-batch") {
        true => (0, String::new()),
        false => answer(sent),
    });
    let ended = run(&project(), &server.url).ok();
    assert_eq!(ended.stderr.matches("MLflow: ").count(), 1);
    let sent = server.sent();
    assert_eq!(calls(&sent, "runs/log-batch").len(), 1);
    assert!(!sent.iter().any(|one| one.method == "PUT"), "{sent:?}");
    assert_eq!(calls(&sent, "runs/update")[0]["status"], "FINISHED");
}

#[test]
fn what_the_server_may_have_done_is_not_sent_again() {
    for (status, tries) in [(429, 2), (503, 2), (502, 1), (504, 1)] {
        let begun = AtomicUsize::new(0);
        let server = Receiver::start(move |_, sent| {
            let begins = sent.path.ends_with("/runs/create");
            match begins && begun.fetch_add(1, Ordering::Relaxed) == 0 {
                true => (status, String::new()),
                false => answer(sent),
            }
        });
        let ended = run(&project(), &server.url).ok();
        assert_eq!(calls(&server.sent(), "runs/create").len(), tries);
        let told = ended.stderr.contains(&format!("answered {status}"));
        assert_eq!(told, tries == 1, "{}", ended.stderr);
    }
}

#[test]
fn an_output_that_is_not_there_is_told_before_anything_runs() {
    for (from, to, words) in [
        (
            "[score.metrics]",
            "[scores.metrics]",
            "there is no step `scores`",
        ),
        (
            "[score.metrics]",
            "[score.metric]",
            "has no output `metric`",
        ),
        (
            "output: model.model",
            "output: score.metrics",
            "`score.metrics` is a list",
        ),
    ] {
        let project = project();
        project.edit("p.yaml", from, to);
        let ended = project.run(&["check", "p.yaml"]);
        assert_eq!(ended.code, Some(3), "{to}");
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(said.contains(words), "{words}: {said}");
    }
}

/// A real server; ended with all that it started.
struct Mlflow {
    child: Child,
    url: String,
    folder: tempfile::TempDir,
}

impl Mlflow {
    fn start(python: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let below = |name: &str| folder.path().join(name).display().to_string();
        let store = format!("sqlite:///{}", below("mlflow.db"));
        let child = Command::new(python)
            .args([
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--workers",
                "1",
            ])
            .args(["--port", &port.to_string()])
            .args(["--backend-store-uri", &store])
            .args(["--artifacts-destination", &below("artifacts")])
            .current_dir(folder.path())
            .env("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            .env_remove("MLFLOW_TRACKING_URI")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            folder,
        };
        let until = Instant::now() + UP_WITHIN;
        let health = format!("{}/health", server.url);
        while !client()
            .get(&health)
            .send()
            .is_ok_and(|a| a.status().is_success())
        {
            let log = || std::fs::read_to_string(server.folder.path().join("log"));
            assert!(Instant::now() < until, "{:?}", log());
            assert!(server.child.try_wait().unwrap().is_none(), "{:?}", log());
            std::thread::sleep(Duration::from_millis(200));
        }
        server
    }

    fn get(&self, call: &str, query: &[(&str, &str)]) -> Value {
        let url = format!("{}/api/2.0/mlflow/{call}", self.url);
        let answer = client().get(url).query(query).send().unwrap();
        answer.json().unwrap()
    }
}

impl Drop for Mlflow {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.child.id().cast_signed());
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

const TRAIN: &str = "  train:
    uses: finetune
    in: { messages: chats.messages }
    with: { model: student, batch_size: 1, lora: { rank: 2 } }
tracking:
  mlflow:
    artifacts: [train.checkpoints]
    register: { name: tiny-student, output: train.base }
";

#[test]
fn a_real_server_shows_the_run() {
    let Some(python) = named("FLOWRUN_MLFLOW_PYTHON", "Python with mlflow") else {
        return;
    };
    let server = Mlflow::start(&python);
    let project = tiny::project();
    let text = project.read("pipeline.yaml");
    let (before, _) = text.split_once("  deploy:").unwrap();
    project.write("p.yaml", &format!("{before}{TRAIN}"));
    for version in 1..=2 {
        let ended = run(&project, &server.url).ok();
        assert!(!ended.stderr.contains("MLflow"), "{}", ended.stderr);
        let id = ended.events()[0]["run"].as_str().unwrap().to_owned();
        let experiment = server.get("experiments/get-by-name", &[("experiment_name", "tiny")]);
        let experiment = experiment["experiment"]["experiment_id"].as_str().unwrap();
        let found = client()
            .post(format!("{}/api/2.0/mlflow/runs/search", server.url))
            .json(&json!({
                "experiment_ids": [experiment], "filter": format!("tags.`flowrun.run` = '{id}'"),
            }))
            .send()
            .unwrap();
        let found: Value = found.json().unwrap();
        let runs = found["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 1, "{found}");
        assert_eq!(runs[0]["info"]["status"], "FINISHED");
        let data = &runs[0]["data"];
        let params = data["params"].as_array().unwrap();
        assert!(has(params, "target", &"bundle".into()), "{params:?}");
        let run_id = runs[0]["info"]["run_id"].as_str().unwrap();
        let curve = [("run_id", run_id), ("metric_key", "train/loss")];
        let curve = server.get("metrics/get-history", &curve);
        let points = curve["metrics"].as_array().unwrap();
        assert!(points.len() > 1, "{curve}");
        let steps: Vec<String> = points
            .iter()
            .map(|point| point["step"].to_string())
            .collect();
        assert_eq!(
            steps.len(),
            steps
                .iter()
                .collect::<std::collections::BTreeSet<_>>()
                .len()
        );
        let listed = server.get("artifacts/list", &[("run_id", run_id), ("path", "train")]);
        let listed = listed["files"].as_array().unwrap();
        let is = |path: &str| listed.iter().any(|file| file["path"] == path);
        assert!(is("train/checkpoints") && is("train/base"), "{listed:?}");
        let models = server.get(
            "model-versions/search",
            &[("filter", "name='tiny-student'")],
        );
        let models = models["model_versions"].as_array().unwrap();
        assert_eq!(models.len(), version, "{models:?}");
    }
}
