//! Data sets and models of the Hugging Face hub: branches and commits, gates and tokens, what is
//! interrupted, and what works without a network.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::hub_server::{Hub, MEMBER, STRANGER, Seen};
use crate::processes::{signal, until};
use crate::project::{Project, Run};
use crate::tiny;

const PIPELINE: &str = "\
name: hub
params: { revision: main }
steps:
  load:
    uses: load
    with:
      name: rows
      train: { hf: { repo: org/rows, file: data/train.jsonl, revision: \"${{ params.revision }}\" } }
      test: { hf: { repo: org/rows, file: test.csv, revision: \"${{ params.revision }}\" } }
  show:
    run: cp \"$rows\" \"$train\"; cp \"$about\" \"$told\"
    in: { rows: load.train, about: load.about }
    out: { train: train.jsonl, told: about.json }
    publish: { train: train.jsonl, told: about.json }
";

const REPO: &str = "datasets/org/rows";

fn commit(digit: char) -> String {
    digit.to_string().repeat(40)
}

fn train(text: &str) -> Vec<u8> {
    format!("{{\"text\": \"{text}\", \"label\": \"a\"}}\n").into_bytes()
}

/// More than the hub keeps itself.
fn test() -> Vec<u8> {
    let rows: String = (0..300).map(|i| format!("text {i},a\n")).collect();
    format!("text,label\n{rows}").into_bytes()
}

/// A hub with a first commit, and a project that loads from it.
fn start() -> (Hub, Project) {
    let hub = Hub::start();
    let files = [("data/train.jsonl", train("one")), ("test.csv", test())];
    hub.publish(REPO, &commit('1'), &files);
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    (hub, project)
}

fn command(project: &Project, hub: &Hub, more: &[&str]) -> Command {
    let mut command = project.command(&[&["pipeline.yaml", "--json"], more].concat());
    command.env("HF_ENDPOINT", &hub.url);
    command
}

fn run(project: &Project, hub: &Hub, more: &[&str]) -> Run {
    Run::of(command(project, hub, more).output().unwrap())
}

/// The run failed and said this.
fn refused(run: &Run, texts: &[&str]) {
    let said = format!("{}{}", run.stdout, run.stderr);
    assert_eq!(run.code, Some(4), "{said}");
    for text in texts {
        assert!(said.contains(text), "`{text}` is not in: {said}");
    }
}

fn paths(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(|seen| seen.path.as_str()).collect()
}

/// The repository's folder in the user's cache.
fn cached(project: &Project) -> PathBuf {
    project.path("user-cache/huggingface/hub/datasets--org--rows")
}

#[test]
fn a_branch_stands_for_a_commit_and_its_move_is_noticed() {
    let (hub, project) = start();
    let made = run(&project, &hub, &[]).ok();
    assert_eq!(made.steps("ran"), ["load", "show"]);
    assert!(project.read("train.jsonl").contains("one"));
    let about: Value = serde_json::from_str(&project.read("about.json")).unwrap();
    let source = format!("org/rows@{}/data/train.jsonl", commit('1'));
    assert_eq!(about["source"], source.as_str());
    hub.seen();

    // The hub is asked for the branch alone, and once.
    let same = run(&project, &hub, &[]).ok();
    assert_eq!(same.steps("ran"), Vec::<String>::new());
    let revision = "/api/datasets/org/rows/revision/main";
    assert_eq!(paths(&hub.seen()), [revision]);

    // A moved branch is loaded anew; what it has in common with the old is not fetched again.
    let files = [("data/train.jsonl", train("two")), ("test.csv", test())];
    hub.publish(REPO, &commit('2'), &files);
    let moved = run(&project, &hub, &[]).ok();
    assert_eq!(moved.steps("ran"), ["load", "show"]);
    assert!(project.read("train.jsonl").contains("two"));
    let seen = hub.seen();
    assert!(seen.iter().all(|seen| !seen.path.starts_with("/content")));

    // A commit is never asked for.
    let pinned = format!("revision={}", commit('1'));
    let pinned = run(&project, &hub, &["--set", &pinned]).ok();
    assert_eq!(pinned.steps("failed"), Vec::<String>::new());
    assert!(project.read("train.jsonl").contains("one"));
    assert!(hub.seen().is_empty());
}

#[test]
fn without_a_network_the_cache_is_what_there_is() {
    let (hub, project) = start();
    let offline = |more: &[&str]| {
        let mut command = command(&project, &hub, more);
        Run::of(command.env("HF_HUB_OFFLINE", "1").output().unwrap())
    };
    let texts = [
        "does not know the commit",
        "HF_HUB_OFFLINE",
        "hf download --repo-type dataset",
    ];
    refused(&offline(&[]), &texts);
    refused(&run(&project, &hub, &["--offline"]), &["--offline"]);
    let pinned = format!("revision={}", commit('1'));
    let texts = ["data/train.jsonl` at", "is not in the hub's cache"];
    refused(&offline(&["--set", &pinned]), &texts);
    assert!(hub.seen().is_empty());

    run(&project, &hub, &[]).ok();
    hub.seen();
    let again = offline(&["--force"]).ok();
    assert_eq!(again.steps("ran"), ["load", "show"]);
    // Only a file of it is gone: that one is named.
    let snapshot = cached(&project).join("snapshots").join(commit('1'));
    std::fs::remove_file(snapshot.join("test.csv")).unwrap();
    let missing = format!("org/rows/test.csv` at `main` (commit {})", commit('1'));
    refused(&offline(&["--force"]), &[&missing]);
    assert!(hub.seen().is_empty());
    // It is linked again, without its content being fetched.
    run(&project, &hub, &[]).ok();
    assert!(snapshot.join("test.csv").is_file());
    assert!(
        hub.seen()
            .iter()
            .all(|seen| !seen.path.starts_with("/content"))
    );

    // A hub that is away is no reason to stop.
    let mut away = project.command(&["pipeline.yaml", "--json", "--force"]);
    let away = away.env("HF_ENDPOINT", "http://127.0.0.1:9").output();
    let away = Run::of(away.unwrap()).ok();
    assert_eq!(away.steps("ran"), ["load", "show"]);
    assert!(
        away.stderr.contains("going on with commit"),
        "{}",
        away.stderr
    );
}

#[test]
fn a_gate_and_a_wrong_token_are_explained() {
    let (hub, project) = start();
    hub.gate(REPO);
    let with = |token: &str| {
        let mut command = command(&project, &hub, &[]);
        Run::of(command.env("HF_TOKEN", token).output().unwrap())
    };
    let page = format!("{}/{REPO}", hub.url);
    let texts = ["is gated, and no token was sent", "HF_TOKEN", &page];
    refused(&run(&project, &hub, &[]), &texts);
    let stranger = with(STRANGER);
    refused(&stranger, &["the token in HF_TOKEN has no access", &page]);
    let wrong = with("hf_expired");
    refused(
        &wrong,
        &["does not accept the token in HF_TOKEN", "/settings/tokens"],
    );
    for run in [&stranger, &wrong] {
        let said = format!("{}{}", run.stdout, run.stderr);
        assert!(!said.contains(STRANGER) && !said.contains("hf_expired"));
    }

    // Where the hub's own clients keep it. It goes to the hub alone.
    project.write("user-cache/huggingface/token", &format!("{MEMBER}\n"));
    hub.seen();
    run(&project, &hub, &[]).ok();
    let seen = hub.seen();
    let (contents, asked): (Vec<_>, Vec<_>) = seen
        .iter()
        .partition(|seen| seen.path.starts_with("/content"));
    assert!(!contents.is_empty() && contents.iter().all(|seen| seen.token.is_none()));
    assert!(
        asked
            .iter()
            .all(|seen| seen.token.as_deref() == Some(MEMBER))
    );
}

#[test]
fn what_is_not_there_is_named() {
    let (hub, project) = start();
    refused(
        &run(&project, &hub, &["--set", "revision=v9"]),
        &["has no revision `v9`"],
    );
    project.edit("pipeline.yaml", "test.csv", "tset.csv");
    refused(
        &run(&project, &hub, &[]),
        &["has no file `tset.csv` at `main`"],
    );
    project.edit("pipeline.yaml", "org/rows", "org/rosw");
    refused(
        &run(&project, &hub, &[]),
        &["there is no `datasets/org/rosw`, or it is private"],
    );
    project.edit("pipeline.yaml", "tset.csv", "../../../secret");
    project.edit("pipeline.yaml", "org/rosw", "org/rows");
    refused(&run(&project, &hub, &[]), &["is no file of a repository"]);
}

#[test]
fn an_interrupted_download_goes_on_where_it_was() {
    let (hub, project) = start();
    let bytes = test();
    let content = format!("/content/{}", hub.sha256(&bytes));
    let ranges = || -> Vec<Option<String>> {
        let seen = hub.seen().into_iter();
        let contents = seen.filter(|seen| seen.path == content);
        contents.map(|seen| seen.range).collect()
    };
    // The connection breaks once.
    hub.break_at(700);
    run(&project, &hub, &[]).ok();
    assert_eq!(ranges(), [None, Some("bytes=700-".to_owned())]);
    let snapshot = cached(&project).join("snapshots").join(commit('1'));
    assert_eq!(std::fs::read(snapshot.join("test.csv")).unwrap(), bytes);

    // What killed downloads left: a part, all of it, something else.
    let blobs = cached(&project).join("blobs");
    let blob = blobs.join(hub.sha256(&bytes));
    let part = blob.with_extension("part");
    let left = |content: &[u8]| {
        std::fs::remove_file(&blob).unwrap();
        std::fs::write(&part, content).unwrap();
        run(&project, &hub, &["--force"])
    };
    left(&bytes[..500]).ok();
    assert_eq!(ranges(), [Some("bytes=500-".to_owned())]);
    left(&bytes).ok();
    assert!(ranges().is_empty());
    let damaged = left(&[b'x'; 500]);
    refused(&damaged, &["came damaged"]);
    run(&project, &hub, &["--force"]).ok();
    assert_eq!(std::fs::read(&blob).unwrap(), bytes);
    assert!(!part.exists());
}

#[test]
fn a_download_ends_with_the_first_signal_and_the_next_run_goes_on_with_it() {
    let (hub, project) = start();
    let bytes = test();
    let blob = cached(&project).join("blobs").join(hub.sha256(&bytes));
    let part = blob.with_extension("part");
    let came = || std::fs::metadata(&part).map_or(0, |part| part.len());
    hub.stall_at(700);
    let mut command = command(&project, &hub, &[]);
    command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    until("the download did not begin", || came() == 700);
    signal("-INT", child.id());
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(came(), 700, "{}", ended.stderr);

    hub.seen();
    run(&project, &hub, &[]).ok();
    let seen = hub.seen();
    let contents = seen.iter().filter(|seen| seen.path.starts_with("/content"));
    let ranges: Vec<_> = contents.map(|seen| seen.range.as_deref()).collect();
    assert_eq!(ranges, [Some("bytes=700-")]);
    assert_eq!(std::fs::read(&blob).unwrap(), bytes);
}

#[test]
fn a_download_ends_with_the_timeout_of_its_step() {
    let (hub, project) = start();
    let uses = "    uses: load\n";
    project.edit("pipeline.yaml", uses, &format!("{uses}    timeout: 2s\n"));
    hub.stall_at(700);
    let late = run(&project, &hub, &[]);
    refused(&late, &["took longer than its `timeout` of 2s"]);
}

/// The files of a model, as the hub has them.
fn model_files(folder: &Path) -> [(&'static str, Vec<u8>); 4] {
    let names = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ];
    names.map(|name| (name, std::fs::read(folder.join(name)).unwrap()))
}

#[test]
fn a_model_of_the_hub_is_followed_by_its_branch_and_pinned_in_the_bundle() {
    let hub = Hub::start();
    let project = tiny::project();
    let publish = |commit: &str, seed: u64| {
        let folder = project.path("published");
        tiny::write_model(&folder, seed);
        hub.publish("org/tiny", commit, &model_files(&folder));
    };
    std::fs::remove_dir_all(project.path("tiny")).unwrap();
    project.edit("pipeline.yaml", "{ file: tiny }", "{ hf: org/tiny }");
    publish(&commit('a'), 1);
    let made = run(&project, &hub, &[]).ok();
    assert!(made.steps("ran").contains(&"score".to_owned()));
    assert!(project.read("bundle/bundle.json").contains(&commit('a')));
    let same = run(&project, &hub, &[]).ok();
    assert_eq!(same.steps("ran"), Vec::<String>::new());

    publish(&commit('b'), 2);
    let moved = run(&project, &hub, &[]).ok();
    assert_eq!(moved.steps("ran"), ["score", "deploy"]);
    assert!(project.read("bundle/bundle.json").contains(&commit('b')));
}

#[test]
fn a_program_that_trains_is_told_the_commit_of_the_key() {
    let hub = Hub::start();
    let project = tiny::project();
    let config = std::fs::read(project.path("tiny/config.json")).unwrap();
    project.edit("pipeline.yaml", "{ file: tiny }", "{ hf: org/tiny }");
    // All that matters here is what it is told.
    let script = format!("cp \"$3\" {}; exit 3", project.path("told.yaml").display());
    project.write("trainer.sh", &script);
    let step = format!(
        "  train:\n    uses: finetune\n    in: {{ messages: chats.messages }}\n    with: {{ model: student, backend: {{ command: {{ trainer: trl, program: [sh, {}] }} }} }}\n",
        project.path("trainer.sh").display()
    );
    let text = project.read("pipeline.yaml") + &step;
    project.write("pipeline.yaml", &text);
    for digit in ['a', 'b'] {
        hub.publish(
            "org/tiny",
            &commit(digit),
            &[("config.json", config.clone())],
        );
        let ended = run(&project, &hub, &["--until", "train"]);
        assert_eq!(ended.code, Some(4), "{}", ended.stdout);
        let told = project.read("told.yaml");
        for line in [
            "model_name_or_path: org/tiny".to_owned(),
            format!("model_revision: {}", commit(digit)),
        ] {
            assert!(told.contains(&line), "{line}: {told}");
        }
    }
}

#[test]
fn a_template_in_a_file_of_its_own_is_fetched_and_used() {
    let hub = Hub::start();
    let project = tiny::project();
    let folder = project.path("published");
    tiny::write_model(&folder, 1);
    std::fs::remove_dir_all(project.path("tiny")).unwrap();
    project.edit("pipeline.yaml", "{ file: tiny }", "{ hf: org/template }");
    let publish = |commit: &str, template: Option<&str>| {
        let template = template.map(|text| ("chat_template.jinja", text.as_bytes().to_vec()));
        let files: Vec<_> = model_files(&folder).into_iter().chain(template).collect();
        hub.publish("org/template", commit, &files);
    };
    let asked = |seen: &[Seen]| {
        let paths = paths(seen).into_iter();
        paths
            .filter(|p| p.ends_with("/chat_template.jinja"))
            .count()
    };
    // One that has none is not asked for it again.
    publish(&commit('a'), None);
    run(&project, &hub, &[]).ok();
    assert_ne!(asked(&hub.seen()), 0);
    run(&project, &hub, &["--force"]).ok();
    assert_eq!(asked(&hub.seen()), 0);
    // What is there is what is rendered: this one does not even parse.
    publish(&commit('b'), Some("{% unheard_of %}"));
    refused(&run(&project, &hub, &[]), &["chat template", "unheard_of"]);
}
