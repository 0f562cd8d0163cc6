//! Deploying a tiny model: gates, the canary, the switch, the way back, and files for other places.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::external::named;
use crate::mount::Mount;
use crate::project::{Project, Run};
use crate::server::{Server, client, free_port};
use crate::tiny::{self, write_model};

const PIPELINE: &str = "pipeline.yaml";

/// A project that deploys on this machine; what it started is stopped when it goes.
struct Local(Project);

impl Local {
    fn new() -> Self {
        Self(tiny::project())
    }

    fn run(&self, args: &[&str]) -> Run {
        let all = [&[PIPELINE, "--json", "--set", "target=local"], args].concat();
        self.0.run(&all)
    }

    /// Adds to the params of `deploy`.
    fn set(&self, yaml: &str) {
        let target = "      target: ${{ params.target }}\n";
        self.0
            .edit(PIPELINE, target, &format!("{target}      {yaml}\n"));
    }

    fn current(&self) -> Value {
        serde_json::from_str(&self.0.read("deployed/tiny/current.json")).unwrap()
    }

    fn status(&self) -> Value {
        let run = self.0.run(&["deploy", "status", "--json"]).ok();
        run.events().remove(0)
    }

    /// Ends what is served, and waits until it is known to be down.
    fn end(&self) {
        let pid = self.current()["pid"].to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.status()["up"] == true {
            assert!(Instant::now() < deadline);
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let current = std::fs::read_to_string(self.0.path("deployed/tiny/current.json"));
        let current: Value = serde_json::from_str(&current.unwrap_or_default()).unwrap_or_default();
        let url = current["url"].as_str().unwrap_or_default();
        let health = client().get(format!("{url}/health")).send();
        // By its own word, so that no other process of this id is hit.
        if health.is_ok_and(|h| h.json::<Value>().is_ok_and(|h| h["pid"] == current["pid"])) {
            let pid = current["pid"].to_string();
            let _ = Command::new("kill").arg(pid).status();
        }
    }
}

fn is_up(current: &Value) -> bool {
    let health = client()
        .get(format!("{}/health", current["url"].as_str().unwrap()))
        .send();
    health.is_ok_and(|h| h.json::<Value>().is_ok_and(|h| h["pid"] == current["pid"]))
}

#[test]
fn versions_are_switched_on_one_port_and_switched_back() {
    let local = Local::new();
    let port = free_port();
    local.set(&format!("port: {port}"));
    local.run(&[]).ok();
    let first = local.current();
    assert!(is_up(&first));
    assert!(
        first["url"]
            .as_str()
            .unwrap()
            .ends_with(&format!(":{port}"))
    );
    let nothing = local.0.run(&["deploy", "rollback", "tiny"]);
    assert_eq!(nothing.code, Some(3), "{}", nothing.stderr);

    write_model(&local.0.path("tiny"), 2);
    local.run(&[]).ok();
    let second = local.current();
    assert!(is_up(&second) && second["pid"] != first["pid"]);
    assert_eq!(second["url"], first["url"]);
    assert_eq!(second["previous"]["bundle"], first["bundle"]);
    let status = local.status();
    assert_eq!(
        (&status["name"], &status["up"]),
        (&"tiny".into(), &true.into())
    );

    // The same bundle again, after its server died: the way back stays.
    local.end();
    local.run(&[]).ok();
    let again = local.current();
    assert!(is_up(&again) && again["pid"] != second["pid"]);
    assert_eq!(again["bundle"], second["bundle"]);
    assert_eq!(again["previous"], second["previous"]);

    local.0.run(&["deploy", "rollback", "tiny"]).ok();
    let back = local.current();
    assert_eq!(back["bundle"], first["bundle"]);
    assert_eq!(back["previous"]["bundle"], second["bundle"]);
    assert!(is_up(&back));
    let url = back["url"].as_str().unwrap();
    let folder = back["folder"].as_str().unwrap();
    let check = ["deploy", "check", url, "--bundle", folder, "--json"];
    let checked = local.0.run(&check).ok().events();
    assert_eq!(checked[0]["url"], url);
    assert_eq!(checked[0]["smoke"]["agreed"], checked[0]["smoke"]["rows"]);

    // What was deployed cannot be used any more: what is served stays.
    let other = second["folder"].as_str().unwrap();
    std::fs::write(format!("{other}/bundle.json"), "{").unwrap();
    let refused = local.0.run(&["deploy", "rollback", "tiny"]);
    assert_ne!(refused.code, Some(0));
    assert_eq!(local.current(), back);
    assert!(is_up(&back));

    local.end();
    let down = local.0.run(&["deploy", "check", url]);
    assert_eq!(down.code, Some(5), "{}", down.stderr);
}

#[test]
fn what_is_expected_must_hold_or_the_old_version_stays() {
    let local = Local::new();
    local.run(&[]).ok();
    let first = local.current();
    write_model(&local.0.path("tiny"), 2);
    for (gate, reason) in [
        ("expect: { min_accuracy: 1.0 }", "the accuracy is"),
        ("expect: { max_p95_ms: 0 }", "95 % of"),
    ] {
        local.set(gate);
        let refused = local.run(&[]);
        assert_eq!(refused.code, Some(5), "{}", refused.stdout);
        assert!(refused.stdout.contains(reason), "{}", refused.stdout);
        assert!(refused.stdout.contains("nothing was deployed"));
        assert_eq!(local.current(), first);
        assert!(is_up(&first));
        local.0.edit(PIPELINE, gate, "smoke: { rows: 3 }");
        local.0.edit(PIPELINE, "      smoke: { rows: 3 }\n", "");
    }
    // Two random models differ, but on six rows not significantly.
    local.set("canary: {}");
    let run = local.run(&[]).ok();
    let done = run.ended("deploy").to_string();
    assert!(done.contains("McNemar's exact p"), "{done}");
    assert!(is_up(&local.current()) && !is_up(&first));

    // A port that is taken: the old one stays, and the reason is told.
    let second = local.current();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    local.set(&format!("port: {port}"));
    let refused = local.run(&[]);
    assert_eq!(refused.code, Some(5), "{}", refused.stdout);
    assert!(
        refused.stdout.contains("cannot listen on"),
        "{}",
        refused.stdout
    );
    assert_eq!(local.current(), second);
    assert!(is_up(&second));
}

/// A project whose test set has the labels that its model gives: it is right on all of them, and
/// another model is not.
fn all_right() -> Local {
    let local = Local::new();
    local.0.run(&[PIPELINE]).ok();
    let mut command = local.0.command(&["serve", "bundle"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let texts: Vec<String> = (0..60)
        .map(|i| {
            format!(
                "query {} about {}",
                i * 7919,
                ["cards", "PINs", "rates"][i % 3]
            )
        })
        .collect();
    let answers = server.json("/predict/batch", &serde_json::json!({"texts": texts}));
    let rows = texts.iter().zip(answers["predictions"].as_array().unwrap());
    let rows = rows.map(|(text, answer)| format!("{text},{}\n", answer["label"].as_str().unwrap()));
    let csv = format!("text,label\n{}", rows.collect::<String>());
    local.0.write("data/queries.csv", &csv);
    local
}

#[test]
fn a_worse_bundle_is_refused_with_the_rows_it_loses() {
    let local = all_right();
    local.set("canary: { rows: 60 }");
    local.run(&[]).ok();
    let first = local.current();
    write_model(&local.0.path("tiny"), 2);
    let refused = local.run(&[]);
    assert_eq!(refused.code, Some(5), "{}", refused.stdout);
    assert!(
        refused.stdout.contains("the new bundle is worse"),
        "{}",
        refused.stdout
    );
    // Row by row: what it is, what each says.
    assert!(
        refused.stdout.contains("Lost: `queries:test:"),
        "{}",
        refused.stdout
    );
    let events = refused.events();
    let started = events.iter().find(|e| e["event"] == "run_started").unwrap();
    let log = format!(
        ".flowrun/runs/{}/logs/deploy.log",
        started["run"].as_str().unwrap()
    );
    let log = local.0.read(&log);
    let differences: Vec<Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(&line[line.find('{')?..]).ok())
        .filter(|row: &Value| row["deployed"].is_string())
        .collect();
    assert!(differences.len() > 10, "{log}");
    for row in &differences {
        assert!(row["text"].as_str().unwrap().starts_with("query "));
        assert_eq!(row["deployed"], row["gold"]);
        assert_ne!(row["new"], row["gold"]);
    }
    assert_eq!(local.current(), first);
    assert!(is_up(&first));

    local.0.edit(
        PIPELINE,
        "canary: { rows: 60 }",
        "expect: { max_drop: 0.02 }",
    );
    let refused = local.run(&[]);
    assert_eq!(refused.code, Some(5), "{}", refused.stdout);
    assert!(
        refused
            .stdout
            .contains("that of the deployed bundle 1.0000: the drop of"),
        "{}",
        refused.stdout
    );
    assert_eq!(local.current(), first);
    assert!(is_up(&first));
    local.0.edit(PIPELINE, "max_drop: 0.02", "max_drop: 1");
    local.run(&[]).ok();
    assert_ne!(local.current()["bundle"], first["bundle"]);
}

#[test]
fn a_failed_smoke_test_leaves_the_old_version_serving() {
    // Another model than the one that was scored.
    let local = all_right();
    local.run(&[]).ok();
    let first = local.current();
    write_model(&local.0.path("other"), 2);
    let models = "models:\n  other:\n    provider: embedded\n    weights: { file: other }\n";
    local.0.edit(PIPELINE, "models:\n", models);
    local.0.edit(
        PIPELINE,
        "name: tiny\n      model: student\n",
        "name: tiny\n      model: other\n",
    );
    let refused = local.run(&[]);
    assert_eq!(refused.code, Some(5), "{}", refused.stdout);
    assert!(
        refused
            .stdout
            .contains("the smoke test failed, nothing was deployed"),
        "{}",
        refused.stdout
    );
    assert_eq!(local.current(), first);
    assert!(is_up(&first));
    let url = first["url"].as_str().unwrap();
    let folder = first["folder"].as_str().unwrap();
    let check = ["deploy", "check", url, "--bundle", folder, "--json"];
    let checked = local.0.run(&check).ok().events();
    assert_eq!(checked[0]["smoke"]["agreed"], checked[0]["smoke"]["rows"]);
}

#[test]
fn a_bundle_is_checked_later_by_what_it_was_admitted_with() {
    // Another model than the one that was scored, and all the same admitted.
    let local = all_right();
    write_model(&local.0.path("other"), 2);
    let models = "models:\n  other:\n    provider: embedded\n    weights: { file: other }\n";
    local.0.edit(PIPELINE, "models:\n", models);
    let deploys = |model: &str| format!("name: tiny\n      model: {model}\n");
    local
        .0
        .edit(PIPELINE, &deploys("student"), &deploys("other"));
    local.set("smoke: { rows: 60, agreement: 0 }");
    local.run(&[]).ok();
    let first = local.current();
    let url = first["url"].as_str().unwrap();
    let folder = first["folder"].as_str().unwrap();
    let check = ["deploy", "check", url, "--bundle", folder, "--json"];
    let checked = local.0.run(&check).ok().events();
    let smoke = &checked[0]["smoke"];
    assert!(smoke["agreed"].as_u64() < smoke["rows"].as_u64(), "{smoke}");

    local
        .0
        .edit(PIPELINE, &deploys("other"), &deploys("student"));
    local.run(&[]).ok();
    assert_ne!(local.current()["bundle"], first["bundle"]);
    local.0.run(&["deploy", "rollback", "tiny"]).ok();
    let back = local.current();
    assert_eq!(back["bundle"], first["bundle"]);
    assert!(is_up(&back));
}

#[test]
fn a_full_disk_leaves_the_old_version_serving() {
    let local = Local::new();
    let deployed = local.0.path("deployed");
    let Some(mount) = Mount::tmpfs(&deployed, "size=1m") else {
        return;
    };
    // In this order they go: what is served is found by a file in the mount.
    let both = (local, mount);
    let local = &both.0;
    local.run(&[]).ok();
    let first = local.current();
    let filler = deployed.join("filler");
    let full = std::fs::write(&filler, vec![0; 1 << 20]);
    assert!(full.is_err(), "there is room left");
    write_model(&local.0.path("tiny"), 2);
    let refused = local.run(&[]);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    assert!(
        refused.stdout.to_lowercase().contains("no space left"),
        "{}",
        refused.stdout
    );
    assert_eq!(local.current(), first);
    assert!(is_up(&first));
    // Nothing half-made is left, and with room again it goes on.
    std::fs::remove_file(&filler).unwrap();
    local.run(&[]).ok();
    let second = local.current();
    assert!(is_up(&second) && second["bundle"] != first["bundle"]);
    let versions = std::fs::read_dir(deployed.join("tiny")).unwrap();
    let versions = versions.filter(|entry| entry.as_ref().unwrap().path().is_dir());
    assert_eq!(versions.count(), 2);
}

#[test]
fn a_bundle_is_rendered_for_every_target_that_can_run_it() {
    let project = tiny::project();
    project.run(&[PIPELINE]).ok();
    let targets = project.run(&["deploy", "render", "bundle", "--json"]).ok();
    let targets = targets.events();
    let targets: Vec<&str> = targets
        .iter()
        .map(|t| t["target"].as_str().unwrap())
        .collect();
    assert_eq!(targets.len(), 7);
    for target in targets {
        let args = [
            "deploy", "render", "bundle", "--target", target, "-o", target,
        ];
        let set = ["--set", "base_model=org/base", "--set", "replicas=3"];
        let run = project.run(&[&args[..], &set, &["--json"]].concat()).ok();
        assert!(!run.events().is_empty());
        for file in run.events() {
            let path = file["file"].as_str().unwrap();
            assert!(project.path(path).exists(), "{path}");
        }
    }
    assert!(
        project
            .read("kubernetes/kubernetes.yaml")
            .contains("replicas: 3")
    );
    let refused = project.run(&["deploy", "render", "bundle", "--target", "vllm", "-o", "x"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("base_model"), "{}", refused.stderr);
    // As a target of the step: the files are an output beside the bundle.
    project.edit(
        PIPELINE,
        "    publish: { bundle: bundle }",
        "    publish: { bundle: bundle, files: files }",
    );
    project.run(&[PIPELINE, "--set", "target=systemd"]).ok();
    assert!(project.read("files/target.json").contains("\"systemd\""));
    let unit = project.path("files/flowrun-tiny.service");
    let checked = Command::new("systemd-analyze")
        .arg("verify")
        .arg(&unit)
        .output();
    if let Ok(checked) = checked {
        let said = String::from_utf8_lossy(&checked.stderr);
        assert!(
            !said.contains("Unknown key") && !said.contains("Failed to parse"),
            "{said}"
        );
    }
}

#[test]
fn the_manifests_are_valid_by_the_schemas_of_kubernetes() {
    let Some(validate) = named("FLOWRUN_KUBERNETES_VALIDATE", "`kubernetes-validate`") else {
        return;
    };
    let project = tiny::project();
    project.run(&[PIPELINE]).ok();
    let render = ["deploy", "render", "bundle", "--target", "kubernetes"];
    let set = ["-o", "k8s", "--set", "namespace=bank"];
    project.run(&[&render[..], &set].concat()).ok();
    let valid = |file: &str| {
        let checked = Command::new(&validate)
            .args(["-k", "1.31", "--strict"])
            .arg(project.path(file))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        let errors = String::from_utf8_lossy(&checked.stderr).into_owned();
        (checked.status.success(), said + &errors)
    };
    let (good, said) = valid("k8s/kubernetes.yaml");
    assert!(good, "{said}");
    let wrong = project.read("k8s/kubernetes.yaml");
    let wrong = wrong.replace("containerPort:", "containerPorts:");
    project.write("k8s/wrong.yaml", &wrong);
    assert!(!valid("k8s/wrong.yaml").0, "a wrong one is refused");
}

#[test]
fn an_image_serves_a_model_of_the_hub_that_it_need_not_fetch() {
    let project = tiny::project();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let hub = project.path("user-cache/huggingface/hub/models--org--tiny");
    write_model(&hub.join("snapshots").join(commit), 1);
    std::fs::remove_dir_all(project.path("tiny")).unwrap();
    let of_hub = format!("{{ hf: org/tiny, revision: {commit} }}");
    project.edit(PIPELINE, "{ file: tiny }", &of_hub);
    let run = |args: &[&str]| {
        let mut command = project.command(args);
        command.arg("--offline");
        Run::of(command.output().unwrap()).ok()
    };
    run(&[PIPELINE]);
    let render = ["deploy", "render", "bundle", "--target", "dockerfile"];
    run(&[&render[..], &["-o", "image"]].concat());
    std::fs::remove_dir_all(hub).unwrap();
    let mut command = project.command(&["serve", "image/bundle", "--offline"]);
    command
        .env("XDG_CACHE_HOME", project.path("image/cache"))
        .env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let answer = server.json(
        "/predict",
        &serde_json::json!({"text": "Where is my card?"}),
    );
    assert!(answer["confidence"].is_number(), "{answer}");
    assert_eq!(server.stop(), Some(0));
}
