//! What labelling costs and records, by an oracle that counts its calls.

use serde_json::{Value, json};

use crate::classify::{self, TEST, run, scores, serve, shown};
use crate::oracle::{Oracle, query};
use crate::project::{Project, Run};

const LABEL: &str = "  label:
    uses: bootstrap
    in: { unlabelled: load.test, labels: labels.labels }
    with: { program: classify, model: m }
    publish: { rows: rows.jsonl, dropped: dropped.jsonl }
";

/// The last line of [`LABEL`].
const PUBLISHED: &str = "    publish: { rows: rows.jsonl, dropped: dropped.jsonl }\n";

fn project(queries: usize) -> Project {
    let project = classify::project(&[LABEL]);
    let known = [("a known one", "card_arrival"), ("another", "pin")];
    let known = known.map(|(text, label)| (text.to_owned(), label));
    classify::write_rows(&project, "train.csv", known);
    write_queries(&project, queries);
    project
}

fn write_queries(project: &Project, count: usize) {
    let rows = (0..count).map(|i| (format!("query {i}"), "card_arrival"));
    classify::write_rows(project, "test.csv", rows);
}

fn rows(project: &Project, name: &str) -> Vec<Value> {
    let text = project.read(name);
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_hundred_new_rows_cost_a_hundred_calls() {
    let oracle = Oracle::start(|_| Some("pin".to_owned()));
    let project = project(150);
    run(&project, &oracle).ok();
    assert_eq!(oracle.calls(), 150);
    write_queries(&project, 250);
    run(&project, &oracle).ok();
    assert_eq!(oracle.calls(), 100);
    let ids: Vec<Value> = rows(&project, "rows.jsonl")
        .iter()
        .map(|r| r["id"].clone())
        .collect();
    let expected: Vec<Value> = (0..250).map(|i| format!("d:test:{i}").into()).collect();
    assert_eq!(ids, expected, "in the order of the input");
}

#[test]
fn what_a_step_in_another_process_paid_for_is_not_paid_for_again() {
    let oracle = Oracle::start(|_| Some("pin".to_owned()));
    let project = project(30);
    project.edit(
        "p.yaml",
        "uses: bootstrap\n",
        "uses: bootstrap\n    runner: process\n",
    );
    // Other settings, the same prompts; in this process, which looked for answers before.
    let first = LABEL
        .replace("  label:\n", "  first:\n")
        .replace("load.test", "load.train");
    let again = LABEL
        .replace("  label:\n", "  again:\n    needs: [label]\n")
        .replace("model: m }", "model: m, normalise_labels: true }");
    let more = (first + &again).replace(PUBLISHED, "");
    project.edit(
        "p.yaml",
        "runner: process\n",
        "runner: process\n    needs: [first]\n",
    );
    project.write("p.yaml", &(project.read("p.yaml") + &more));
    run(&project, &oracle).ok();
    assert_eq!(oracle.calls(), 30 + 2);
}

#[test]
fn what_another_machine_paid_for_is_not_paid_for_again() {
    let oracle = Oracle::start(|_| Some("pin".to_owned()));
    let shared = tempfile::tempdir().unwrap();
    let with_remote = |project: &Project| {
        let mut command = classify::command(project, &oracle);
        command.env("FLOWRUN_REMOTE", shared.path());
        Run::of(command.output().unwrap()).ok()
    };
    with_remote(&project(50));
    assert_eq!(oracle.calls(), 50);
    let packs = || -> usize {
        let folders = std::fs::read_dir(shared.path().join("answers")).unwrap();
        let folders = folders.map(|folder| folder.unwrap().path());
        folders.map(|f| std::fs::read_dir(f).unwrap().count()).sum()
    };
    assert_eq!(packs(), 1, "all answers of the run");
    // More rows: another action, of which no result is there, but most answers are.
    let there = project(60);
    with_remote(&there);
    assert_eq!(oracle.calls(), 10);
    assert_eq!(rows(&there, "rows.jsonl").len(), 60);
    assert_eq!(packs(), 2);
    // By now they are here, whatever becomes of the remote; and can be had by hand.
    run(&there, &oracle).ok();
    let by_hand = project(60);
    let folder = shared.path().display().to_string();
    let pulled = by_hand.run(&["cache", "pull", "--remote", &folder]).ok();
    assert!(
        pulled.stdout.contains("60 kept answers"),
        "{}",
        pulled.stdout
    );
    std::fs::remove_dir_all(by_hand.path(".flowrun/actions")).unwrap();
    run(&by_hand, &oracle).ok();
    assert_eq!(oracle.calls(), 0);
}

#[test]
fn every_label_is_kept_as_written_and_every_dropped_row_has_its_reason() {
    let oracle = Oracle::start(|body| {
        let answers = [" Card Arrival", "the PIN, I think", "refund", "pin"];
        let number: usize = query(body).trim_start_matches("query ").parse().unwrap();
        Some(answers[number].to_owned())
    });
    let project = project(4);
    run(&project, &oracle).ok();
    let kept = rows(&project, "rows.jsonl");
    assert_eq!(kept.len(), 2);
    assert_eq!(kept[0]["raw_label"], "Card Arrival");
    assert_eq!(kept[0]["sanitised_label"], "card_arrival");
    assert_eq!(kept[0]["label"], "card_arrival");
    let dropped = rows(&project, "dropped.jsonl");
    let reasons: Vec<&str> = dropped
        .iter()
        .map(|r| r["dropped"].as_str().unwrap())
        .collect();
    let expected =
        ["`the_pin,_i_think`", "`refund`"].map(|l| format!("{l} is not one of the labels"));
    assert_eq!(reasons, expected);
    // The label that a row came with is none of the teacher's.
    let is_unlabelled = |row: &Value| row.get("label").or(row.get("teacher")).is_none();
    assert!(dropped.iter().all(is_unlabelled), "{dropped:?}");

    project.edit(
        "p.yaml",
        "model: m }\n    publish",
        "model: m, normalise_labels: true }\n    publish",
    );
    run(&project, &oracle).ok();
    let kept = rows(&project, "rows.jsonl");
    assert_eq!(kept.len(), 3);
    assert_eq!(
        (&kept[1]["raw_label"], &kept[1]["label"]),
        (&"the PIN, I think".into(), &"pin".into())
    );
    assert_eq!(oracle.calls(), 4, "the same answers, read anew");
}

#[test]
fn draws_are_counted_and_too_little_agreement_drops_a_row() {
    // Sure of the first query; of the second, every other answer differs.
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let oracle = Oracle::start(move |body| {
        assert_eq!(body["temperature"], 0.9);
        let turn = match query(body) {
            "query 0" => 0,
            _ => asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst),
        };
        Some(["pin", "card_arrival"][turn % 2].to_owned())
    });
    let project = project(2);
    let with = "model: m, samples: 4, temperature: 0.9, min_confidence: 0.9 }\n    publish";
    project.edit("p.yaml", "model: m }\n    publish", with);
    run(&project, &oracle).ok();
    assert_eq!(oracle.calls(), 8);
    let kept = rows(&project, "rows.jsonl");
    assert_eq!((kept.len(), &kept[0]["confidence"]), (1, &1.0.into()));
    let dropped = rows(&project, "dropped.jsonl");
    assert_eq!(dropped[0]["dropped"], "confidence 0.50 is below 0.9");
}

const EXPLAIN: &str = "  explain:
    uses: explain
    in: { rows: labels.train }
    with: { program: reason, model: m }
    publish: { rows: rows.jsonl, dropped: dropped.jsonl }
";

#[test]
fn a_label_that_came_from_elsewhere_is_explained_and_what_is_not_is_listed() {
    let oracle = Oracle::start(|body| {
        let asked = query(body);
        assert!(asked.contains("label: "), "{asked}");
        let sure = if asked.contains("text: two") {
            "sure: perhaps"
        } else {
            "sure: yes"
        };
        Some(format!("Because of {}.\n{sure}", asked.replace('\n', ", ")))
    });
    let project = classify::project(&[EXPLAIN]);
    project.edit(
        "p.yaml",
        "programs:\n",
        "programs:
  reason:
    predict:
      adapter: compact
      instructions: Why?
      inputs: [{ name: text }, { name: label }]
      outputs: [{ name: reasoning }, { name: sure, type: bool }]
",
    );
    let known = [("one", "card"), ("two", "pin"), ("three", "card")];
    let known = known.map(|(text, label)| (text.to_owned(), label));
    classify::write_rows(&project, "train.csv", known);
    classify::write_rows(&project, "test.csv", [("four".to_owned(), "card")]);
    run(&project, &oracle).ok();
    assert_eq!(oracle.calls(), 3);
    let explained = rows(&project, "rows.jsonl");
    let of = |row: &Value| {
        (
            row["id"].clone(),
            row["label"].clone(),
            row["reasoning"].clone(),
        )
    };
    let all: Vec<(Value, Value, Value)> = explained.iter().map(of).collect();
    let expected: [(Value, Value, Value); 2] = [(0, "one"), (2, "three")].map(|(at, text)| {
        let reason = format!("Because of text: {text}, label: card.");
        (format!("d:train:{at}").into(), "card".into(), reason.into())
    });
    assert_eq!(all, expected);
    let dropped = rows(&project, "dropped.jsonl");
    assert_eq!(dropped.len(), 1);
    assert_eq!(
        (&dropped[0]["id"], &dropped[0]["label"]),
        (&"d:train:1".into(), &"pin".into())
    );
    let why = dropped[0]["dropped"].as_str().unwrap();
    assert!(why.contains("sure"), "{why}");
}

#[test]
fn rows_that_a_server_fails_at_are_not_explained_up_to_max_failed() {
    let oracle = Oracle::start(|body| {
        let asked = query(body);
        (!asked.contains("text: two")).then(|| "Because.\nsure: yes".to_owned())
    });
    let project = classify::project(&[EXPLAIN]);
    let reason = "programs:
  reason:
    predict:
      adapter: compact
      instructions: Why?
      inputs: [{ name: text }, { name: label }]
      outputs: [{ name: reasoning }, { name: sure, type: bool }]
";
    project.edit("p.yaml", "programs:\n", reason);
    let known = [("one", "card"), ("two", "pin"), ("three", "card")];
    let known = known.map(|(text, label)| (text.to_owned(), label));
    classify::write_rows(&project, "train.csv", known);
    classify::write_rows(&project, "test.csv", [("four".to_owned(), "card")]);
    assert_eq!(run(&project, &oracle).code, Some(4));
    project.edit("p.yaml", "model: m }", "model: m, max_failed: 1 }");
    let ended = run(&project, &oracle).ok();
    assert!(ended.stdout.contains("\"failed\":1"), "{}", ended.stdout);
    assert_eq!(rows(&project, "rows.jsonl").len(), 2);
    let dropped = rows(&project, "dropped.jsonl");
    let why = dropped[0]["dropped"].as_str().unwrap();
    assert!(dropped.len() == 1 && why.contains("status 500"), "{why}");
}

#[test]
fn a_teacher_sees_the_labelled_rows_most_like_each_query_also_when_it_is_served() {
    // Repeats the last example, which is the most similar one.
    let oracle = Oracle::start(|body| {
        let shown = shown(body);
        assert_eq!(shown.len(), 2);
        Some(shown[1].to_owned())
    });
    let deploy = classify::DEPLOY.replace("optimize.program", "label.teacher");
    let test = TEST
        .replace("optimize.program", "label.teacher")
        .replace("labels.test", "labels.train");
    let project = classify::project(&[LABEL, &test, &deploy]);
    project.edit(
        "p.yaml",
        "unlabelled: load.test, labels: labels.labels }\n    with: { program: classify, model: m }",
        "unlabelled: load.test, labelled: labels.train, labels: labels.labels }\n    with: { program: classify, model: m, knn: { k: 2, embedder: embedder } }",
    );
    // The teacher is scored on the very rows that it chooses its demos from.
    project.edit("p.yaml", "role: best }", "role: best, leakage: allow }");
    let owned = |rows: &[(&str, &'static str)]| -> Vec<(String, &'static str)> {
        rows.iter()
            .map(|(text, label)| ((*text).to_owned(), *label))
            .collect()
    };
    let known = owned(&[
        ("Where is my new card?", "card"),
        ("I forgot my PIN", "pin"),
        ("My card has not come yet", "card"),
        ("How do I change my PIN code?", "pin"),
    ]);
    classify::write_rows(&project, "train.csv", known);
    let queries = owned(&[
        ("When will the card arrive?", "card"),
        ("Can I have another PIN?", "pin"),
    ]);
    classify::write_rows(&project, "test.csv", queries);
    run(&project, &oracle).ok();
    let labels: Vec<Value> = (rows(&project, "rows.jsonl").iter())
        .map(|row| row["label"].clone())
        .collect();
    assert_eq!(labels, ["card", "pin"]);
    let leakage = &scores(&project)["programs"][0]["leakage"];
    assert_eq!(
        (&leakage["trained"], &leakage["clean_rows"]),
        (&4.into(), &0.into())
    );
    oracle.calls();
    let server = serve(&project);
    let answer = server.json(
        "/predict",
        &json!({"text": "I do not know my PIN any more"}),
    );
    assert_eq!((&answer["label"], oracle.calls()), (&"pin".into(), 1));
}
