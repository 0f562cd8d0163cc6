//! The target `ray-serve` on a real Ray of this machine. `FLOWRUN_RAY_PYTHON` names a Python with
//! `ray[default,serve]`; else `python3` is tried.

use serde_json::{Value, json};

use crate::project::Run;
use crate::ray_cluster::{Ray, python};
use crate::ray_files::{rendered, takes};
use crate::server::{client, free_port};
use crate::tiny::{self, write_model};

#[test]
fn a_bundle_is_served_on_ray_and_one_that_fails_leaves_the_old_one() {
    let Some(ray) = Ray::at_hand() else { return };
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
        let done = run.ended("deploy");
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
    let Some(python) = python() else { return };
    let project = rendered();
    let taken = |file: &str| takes(&python, VALIDATE, &project.path(file));
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
