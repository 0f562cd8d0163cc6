//! A step on a machine that has other files than the one where its key was made: it reads what
//! its key names, or fails.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::SystemTime;

use flowrun_engine::runner::protocol::PROTOCOL_VERSION;
use flowrun_engine::step::Step;
use flowrun_steps::load::Load;
use flowrun_steps::stand_in;
use serde_json::{Value, json};

use crate::hub_server::Hub;
use crate::project::Project;

/// The request for `load`, as a run elsewhere sends it that observed `data`.
fn request(project: &Project, params: &Value, data: &Value, offline: bool) -> Value {
    let out = project.path("out");
    if out.is_dir() {
        std::fs::remove_dir_all(&out).unwrap();
    }
    std::fs::create_dir_all(&out).unwrap();
    json!({
        "protocol": PROTOCOL_VERSION, "kind": "load", "version": Load.version(), "step": "load",
        "params": params, "observed": { "data": data }, "inputs": {},
        "out_dir": out, "work_dir": project.path("work"),
        "resume_path": project.path("resume"), "run_path": project.path("run"),
        "completions": null, "actions": project.path("actions"), "memory": 0,
        "offline": offline, "distdir": null, "user_cache": project.path("user-cache/flowrun"),
        "root": project.path("."), "started_at": SystemTime::UNIX_EPOCH, "finished": [],
        "at_once": 1, "traced": false,
    })
}

/// What the step's process says to it.
fn exec(project: &Project, request: &Value, env: &[(&str, &str)]) -> Vec<Value> {
    let mut command = project.command(&["step", "exec"]);
    command.envs(env.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "{request}").unwrap();
    let mut said = String::new();
    let mut output = child.stdout.take().unwrap();
    output.read_to_string(&mut said).unwrap();
    // Its end would have asked the work to stop.
    drop(input);
    assert!(child.wait().unwrap().success(), "{said}");
    said.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The last of what was said.
fn response<'a>(said: &'a [Value], kind: &str) -> &'a Value {
    let last = &said.last().unwrap()[kind];
    assert!(!last.is_null(), "{said:?}");
    last
}

#[test]
fn the_stand_in_is_taken_where_the_key_says_so_and_nowhere_else() {
    let project = Project::new();
    let params = json!({
        "name": "rows", "stand_in": true,
        "train": { "url": "http://127.0.0.1:9/a.csv", "sha256": "0".repeat(64) },
    });
    // The run had the file, and this machine has it not.
    let real = json!({ "train": "0".repeat(64) });
    let said = exec(&project, &request(&project, &params, &real, true), &[]);
    let failed = response(&said, "failed");
    assert_eq!(failed["kind"], "transient", "{failed}");
    let why = failed["message"].as_str().unwrap();
    assert!(why.contains("`--offline` forbids"), "{why}");
    assert_eq!(said.len(), 1, "{said:?}");

    let key = json!({ "stand_in": stand_in::digest() });
    let said = exec(&project, &request(&project, &params, &key, true), &[]);
    let done = response(&said, "done");
    assert_eq!(done["metrics"]["dataset"], "stand-in");
    assert!(said.iter().any(|message| !message["warning"].is_null()));
    assert!(project.read("out/train").contains("\"stand-in:train:0\""));

    let other = json!({ "stand_in": "0".repeat(64) });
    let said = exec(&project, &request(&project, &params, &other, true), &[]);
    assert_eq!(response(&said, "failed")["kind"], "failed");
}

#[test]
fn the_commit_is_that_of_the_key_whatever_the_machines_cache_and_the_hub_say() {
    const REPO: &str = "datasets/org/rows";
    let hub = Hub::start();
    let commit = |digit: char| digit.to_string().repeat(40);
    let publish = |digit: char| {
        let rows = format!("text,label\ntext of {digit},a\n").into_bytes();
        hub.publish(REPO, &commit(digit), &[("train.csv", rows)]);
    };
    let project = Project::new();
    let params = json!({
        "name": "rows", "train": { "hf": { "repo": "org/rows", "file": "train.csv" } },
    });
    let load = |digit: char, offline: bool| {
        let data = json!({ "train": format!("org/rows@{}/train.csv", commit(digit)) });
        let request = request(&project, &params, &data, offline);
        exec(&project, &request, &[("HF_ENDPOINT", hub.url.as_str())])
    };
    // What this machine has is of the first commit, the key is of the second, and the branch is
    // at the third.
    ['1', '2', '3'].into_iter().for_each(publish);
    let refs = "user-cache/huggingface/hub/datasets--org--rows/refs/main";
    project.write(refs, &commit('1'));
    let said = load('2', false);
    response(&said, "done");
    let rows = project.read("out/train") + &project.read("out/test");
    assert!(
        rows.contains("text of 2") && !rows.contains("text of 1"),
        "{rows}"
    );
    let about: Value = serde_json::from_str(&project.read("out/about")).unwrap();
    let source = format!("org/rows@{}/train.csv", commit('2'));
    assert_eq!(about["source"], source.as_str());
    let seen = hub.seen();
    assert!(
        seen.iter().all(|seen| !seen.path.contains("/revision/")),
        "{seen:?}"
    );

    // Without a network it is there or not.
    response(&load('2', true), "done");
    let said = load('3', true);
    let failed = response(&said, "failed");
    assert_eq!(failed["kind"], "transient", "{failed}");
    let why = failed["message"].as_str().unwrap();
    assert!(
        why.contains(&commit('3')) && why.contains("is not in the hub's cache"),
        "{why}"
    );
    assert!(hub.seen().is_empty());
}
