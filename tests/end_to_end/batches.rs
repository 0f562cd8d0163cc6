//! `batch: true`: an oracle behind a Batch API.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::batch_server::BatchServer;
use crate::label_job::{all_there, project, run, upstream};

const ROWS: usize = 40;

#[test]
fn rows_go_up_in_one_batch_and_what_it_left_out_in_another() {
    let (_folder, server) = upstream();
    let late = std::sync::atomic::AtomicBool::new(true);
    let oracle = BatchServer::start(&server.url, move |query| {
        match query {
        "query 3" => Some(json!({
            "response": {"status_code": 400, "body": {"error": {"code": "content_filter", "message": "no"}}},
            "error": null,
        })),
        "query 5" => late.swap(false, std::sync::atomic::Ordering::SeqCst).then(|| {
            let error = json!({"code": "batch_expired", "message": "This request could not be executed."});
            json!({"response": null, "error": error})
        }),
        _ => None,
    }
    });
    let project = project(ROWS, &oracle.url, "tiny", ", batch: true");
    let ended = run(&project);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(4), "{said}");
    assert!(said.contains("1 of 40 rows got no answer"), "{said}");
    run(&project).ok();
    all_there(&project, ROWS);
    assert_eq!(oracle.batches(), [ROWS, 1]);
    let answers = oracle.answers();
    assert_eq!(answers.len(), ROWS - 1);
    assert!(answers.values().all(|count| *count == 1), "{answers:?}");
    assert!(project.read("dropped.jsonl").contains("content filter"));
}

#[test]
fn a_request_that_a_batch_left_out_ends_the_rounds_of_a_vote() {
    let (_folder, server) = upstream();
    let late = std::sync::atomic::AtomicBool::new(true);
    let oracle = BatchServer::start(&server.url, move |query| {
        let strike = query == "query 5" && late.swap(false, std::sync::atomic::Ordering::SeqCst);
        let error = json!({"code": "batch_expired", "message": "it expired"});
        strike.then(|| json!({"response": null, "error": error}))
    });
    let project = project(ROWS, &oracle.url, "tiny", ", batch: true");
    project.edit("p.yaml", "model: oracle }", "model: oracle, samples: 3 }");
    let ended = run(&project);
    assert_eq!(ended.code, Some(4), "{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(oracle.batches(), [ROWS]);
    run(&project).ok();
    all_there(&project, ROWS);
    assert_eq!(oracle.batches(), [ROWS, 1, ROWS, ROWS]);
    let answers = oracle.answers();
    assert!(answers.values().all(|count| *count == 3), "{answers:?}");
}

#[test]
fn a_batch_that_was_ordered_is_waited_for_after_a_lost_reply_and_after_a_kill() {
    let (_folder, server) = upstream();
    let oracle = BatchServer::start(&server.url, |_| None);
    oracle.set_open(false);
    oracle.lose_a_reply();
    let project = project(ROWS, &oracle.url, "tiny", ", batch: true");
    let ended = run(&project);
    assert_eq!(ended.code, Some(4), "{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(oracle.batches(), [ROWS]);

    let mut child = project
        .command(&["p.yaml"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while oracle.looks() == 0 {
        assert!(Instant::now() < deadline, "nobody waits for the batch");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    oracle.set_open(true);
    run(&project).ok();
    all_there(&project, ROWS);
    assert_eq!(oracle.batches(), [ROWS], "one batch for all three runs");
    assert!(oracle.answers().values().all(|count| *count == 1));
}

#[test]
fn a_budget_holds_for_batches_too() {
    let (_folder, server) = upstream();
    let oracle = BatchServer::start(&server.url, |_| None);
    let project = project(
        ROWS,
        &oracle.url,
        "tiny",
        ", batch: true, budget: { tokens: 2000 }",
    );
    project.edit(
        "p.yaml",
        "model: oracle }",
        "model: oracle, sampling: { max_tokens: 40 } }",
    );
    let ended = run(&project);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(4), "{said}");
    assert!(
        said.contains("the run's `budget` for `tiny` is spent"),
        "{said}"
    );
    let asked: usize = oracle.batches().iter().sum();
    assert!(asked > 5 && asked < ROWS, "{:?}", oracle.batches());
}

#[test]
fn a_server_without_batches_says_so() {
    let (_folder, server) = upstream();
    let url = format!("{}/v1", server.url);
    let project = project(ROWS, &url, "tiny", ", batch: true");
    let ended = run(&project);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(4), "{said}");
    assert!(
        said.contains("where the server has no batch API, leave out `batch`"),
        "{said}"
    );
}
