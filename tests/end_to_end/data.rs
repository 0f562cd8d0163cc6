//! The data steps, on the stand-in and, where it is at hand, on banking77.

use serde_json::Value;

use crate::project::Project;
use crate::real_data::distdir;
use crate::required::skip;

const PIPELINE: &str = "\
name: data
params: { labels: 25 }
steps:
  load:
    uses: load
    with:
      name: banking77
      train: { url: http://127.0.0.1:9/train.csv, sha256: b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b }
      test: { url: http://127.0.0.1:9/test.csv, sha256: d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d }
      label: category
      stand_in: true
  filter-top-25:
    uses: filter-top-n
    in: { train: load.train, test: load.test }
    with:
      n: ${{ params.labels }}
  split:
    uses: split
    in: { rows: filter-top-25.train }
    with: { labelled: 100 }
  export:
    run: cp \"$unlabelled\" \"$rows\"; cp \"$given\" \"$labels\"; cp \"$about\" \"$info\"
    in: { unlabelled: split.unlabelled, given: filter-top-25.labels, about: load.about }
    out: { rows: rows.jsonl, labels: labels.json, info: about.json }
    publish: { rows: rows.jsonl, labels: labels.json, info: about.json }
";

fn metric(events: &[Value], step: &str, name: &str) -> Value {
    let ended = |e: &&Value| e["event"] == "step_finished" && e["step"] == step;
    events.iter().find(ended).unwrap()["metrics"][name].clone()
}

#[test]
fn without_the_data_the_stand_in_is_used_and_said() {
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    let run = project.run(&["pipeline.yaml", "--json", "--offline"]).ok();
    assert_eq!(metric(&run.events(), "load", "dataset"), "stand-in");
    let warned = |e: &Value| e["event"] == "warning" && e["text"].to_string().contains("stand-in");
    assert!(run.events().iter().any(warned));
    let about: Value = serde_json::from_str(&project.read("about.json")).unwrap();
    assert_eq!(about["stand_in"], true);
    assert!(
        project
            .read("rows.jsonl")
            .lines()
            .all(|l| l.contains("\"stand-in:train:"))
    );
}

#[test]
fn a_plan_downloads_nothing() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let project = Project::new();
    let at = PIPELINE.replace("127.0.0.1:9", &address.to_string());
    project.write("pipeline.yaml", &at);
    let plan = project.run(&["plan", "pipeline.yaml"]).ok().stdout;
    assert!(plan.contains("maybe  load"), "{plan}");
    assert!(plan.contains("train.csv` is not on this machine"), "{plan}");
    assert!(plan.contains("after `load`"), "{plan}");
    let why = project.run(&["why", "split", "pipeline.yaml"]).ok().stdout;
    assert!(why.contains("maybe  load: "), "{why}");
    // With no stand-in to fall back on, what is declared is what a run reads.
    project.edit("pipeline.yaml", "      stand_in: true\n", "");
    let plan = project
        .run(&["plan", "pipeline.yaml", "--json"])
        .ok()
        .stdout;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let load = &plan["steps"][0]["items"][0];
    assert_eq!(load["status"]["status"], "stale", "{plan:#}");
    assert_eq!(load["key"].as_str().unwrap().len(), 64);
    let asked = listener.accept();
    assert!(asked.is_err(), "the server was asked");
    assert!(!project.path("user-cache").exists());
}

#[test]
fn offline_nobody_is_asked() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let project = Project::new();
    let at = PIPELINE.replace("127.0.0.1:9", &address.to_string());
    project.write("pipeline.yaml", &at);
    project.run(&["pipeline.yaml", "--offline"]).ok();
    assert!(listener.accept().is_err(), "the server was asked");
}

#[test]
fn the_real_data_gives_the_notebooks_sets_and_is_not_taken_for_the_stand_in() {
    let Some(dist) = distdir() else {
        skip(
            "banking77",
            "banking77 is not at hand (set FLOWRUN_DISTDIR)",
        );
        return;
    };
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    project.run(&["pipeline.yaml", "--offline"]).ok();
    let dist = dist.display().to_string();
    let run = project
        .run(&["pipeline.yaml", "--json", "--offline", "--distdir", &dist])
        .ok();
    let events = run.events();
    assert_eq!(
        run.steps("ran").len(),
        4,
        "the stand-in's results were not reused"
    );
    assert_eq!(metric(&events, "load", "train_rows"), 10_003);
    assert_eq!(metric(&events, "load", "test_rows"), 3_080);
    assert_eq!(metric(&events, "filter-top-25", "train_rows"), 4_171);
    assert_eq!(metric(&events, "filter-top-25", "test_rows"), 1_000);
    assert_eq!(metric(&events, "split", "unlabelled"), 4_071);
    let labels: Vec<String> = serde_json::from_str(&project.read("labels.json")).unwrap();
    assert_eq!(
        (labels[0].as_str(), labels[24].as_str()),
        ("card_payment_fee_charged", "pending_top_up")
    );
    let first: Value =
        serde_json::from_str(project.read("rows.jsonl").lines().next().unwrap()).unwrap();
    let text = first["text"].as_str().unwrap();
    assert!(text.starts_with("I still have not received an answer as to why I was charged $1.00"));
    assert!(first.get("label").is_none(), "the label is deleted");
}
