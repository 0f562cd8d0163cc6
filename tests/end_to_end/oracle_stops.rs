//! When a step stops asking a server before all its rows are asked for, which of them it may do
//! without, and what a person is told of who answers. A real `flowrun serve` answers, behind a proxy
//! that spoils some of its answers.

use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::fault_proxy::{Asked, Fault, Proxy};
use crate::label_job::{all_there, project, rows, run, upstream};
use crate::mount::Mount;
use crate::processes::{signal, until};
use crate::project::{Project, Run};

const ROWS: usize = 40;

fn said(ended: &Run) -> String {
    format!("{}\n{}", ended.stdout, ended.stderr)
}

/// Where the project keeps answers.
fn completions(project: &Project) -> PathBuf {
    project.path(".flowrun/completions")
}

/// A proxy whose faults can be ended.
fn mendable(
    upstream: &str,
    fault: impl Fn(&Asked<'_>) -> Option<Fault> + Send + Sync + 'static,
) -> (Proxy, Arc<AtomicBool>) {
    let faulty = Arc::new(AtomicBool::new(true));
    let on = Arc::clone(&faulty);
    let proxy = Proxy::start(upstream, move |asked| {
        let struck = on.load(Ordering::SeqCst);
        struck.then(|| fault(asked)).flatten()
    });
    (proxy, faulty)
}

/// Each row was asked for once and answered once, over all runs.
fn all_asked_once(proxy: &Proxy, said: &str) {
    let counts = proxy.counts();
    assert_eq!(counts.len(), ROWS, "{said}");
    for (query, count) in counts {
        assert_eq!((count.requests, count.answers), (1, 1), "{query}: {said}");
    }
}

#[test]
fn nothing_more_is_asked_for_once_an_answer_cannot_be_kept() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = project(ROWS, &proxy.url, "tiny", "");
    // No folder can be made here.
    project.write(".flowrun/completions", "");
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(
        ended.stdout.contains("39 of 40 rows got no answer")
            && ended.stdout.contains("an answer could not be kept"),
        "{told}"
    );
    assert_eq!(proxy.requests(), 1, "{told}");
    std::fs::remove_file(completions(&project)).unwrap();
    run(&project).ok();
    all_there(&project, ROWS);
    // The one that was lost is paid for again.
    assert_eq!(proxy.requests(), ROWS + 1);
}

#[test]
fn on_a_disk_that_is_full_only_what_was_in_flight_is_lost() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = project(ROWS, &proxy.url, "tiny", "");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    // Room for some answers.
    let Some(disk) = Mount::tmpfs(&completions(&project), "size=4k") else {
        return;
    };
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(
        ended.stdout.contains("an answer could not be kept"),
        "{told}"
    );
    let asked = proxy.requests();
    assert!(asked < ROWS, "{asked}: {told}");
    disk.remount("size=1m");
    run(&project).ok();
    all_there(&project, ROWS);
    let twice = proxy.requests() - ROWS;
    assert!((1..=4).contains(&twice), "{twice} of {asked}: {told}");
}

#[test]
fn a_server_that_fails_everybody_is_left_after_some_rows() {
    let (_folder, server) = upstream();
    let (proxy, faulty) = mendable(&server.url, |_| Some(Fault::status(500, "server_error")));
    let project = project(ROWS, &proxy.url, "tiny", ", max_retries: 0");
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(
        ended.stdout.contains("8 requests in a row got no answer")
            && ended.stdout.contains("status 500: refused: server_error"),
        "{told}"
    );
    assert_eq!(proxy.requests(), 8, "{told}");
    faulty.store(false, Ordering::SeqCst);
    run(&project).ok();
    all_there(&project, ROWS);
    assert_eq!(proxy.requests(), 8 + ROWS);
}

#[test]
fn a_server_that_takes_connections_and_says_nothing_is_left_after_some_rows() {
    let (_folder, server) = upstream();
    let (proxy, faulty) = mendable(&server.url, |_| Some(Fault::Hang));
    let project = project(ROWS, &proxy.url, "tiny", ", timeout_s: 1, deadline_s: 1");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 8");
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(
        ended.stdout.contains("requests in a row got no answer")
            && ended.stdout.contains("no answer in time"),
        "{told}"
    );
    // Those that took the places of the first eight while these were given up, at most.
    let asked = proxy.requests();
    assert!((8..=16).contains(&asked), "{asked}: {told}");
    faulty.store(false, Ordering::SeqCst);
    project.edit("p.yaml", "timeout_s: 1, deadline_s: 1", "timeout_s: 60");
    run(&project).ok();
    all_there(&project, ROWS);
}

#[test]
fn rows_that_the_server_refuses_are_dropped_up_to_max_failed() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |asked| match asked.query {
        "query 3" => Some(Fault::status(400, "bad_request")),
        "query 5" => Some(Fault::status(500, "server_error")),
        _ => None,
    });
    let project = project(ROWS, &proxy.url, "tiny", ", max_retries: 1");
    project.edit(
        "p.yaml",
        "model: oracle }",
        "model: oracle, max_failed: 1 }",
    );
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(
        ended.stdout.contains("2 of 40 rows got no answer")
            && ended.stdout.contains("2 failed in all (`max_failed` is 1)"),
        "{told}"
    );
    project.edit("p.yaml", "max_failed: 1", "max_failed: 2");
    let ended = run(&project).ok();
    assert!(ended.stdout.contains("\"failed\":2"), "{}", said(&ended));
    all_there(&project, ROWS);
    let dropped = rows(&project, "dropped.jsonl");
    let reason = |query: &str| {
        let found = dropped.iter().find(|(text, _)| text == query);
        found.and_then(|(_, why)| why.clone()).unwrap_or_default()
    };
    assert!(reason("query 3").contains("status 400: refused: bad_request"));
    assert!(reason("query 5").contains("status 500: refused: server_error (2 attempts)"));
    // They have no answer: a run by force asks again, and for nothing else.
    let before = proxy.requests();
    project.run(&["p.yaml", "--json", "--force"]).ok();
    assert_eq!(proxy.requests(), before + 3);
    assert_eq!(proxy.counts()["query 1"].requests, 1);
}

#[test]
fn where_every_row_is_refused_none_is_dropped() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| Some(Fault::status(400, "bad_request")));
    let project = project(3, &proxy.url, "tiny", "");
    project.edit(
        "p.yaml",
        "model: oracle }",
        "model: oracle, max_failed: 9 }",
    );
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(ended.stdout.contains("not one was answered"), "{told}");
}

#[test]
fn a_server_that_answers_as_another_model_is_warned_of_once() {
    let (_folder, server) = upstream();
    let warnings = |name: fn(&mut serde_json::Value)| {
        let proxy = Proxy::start(&server.url, move |_| Some(Fault::Changed(name)));
        let project = project(ROWS, &proxy.url, "tiny", "");
        let ended = run(&project).ok();
        let events = ended.events().into_iter();
        let texts = events
            .filter(|event| event["event"] == "warning")
            .filter_map(|event| Some(event["text"].as_str()?.to_owned()))
            .filter(|text| text.contains("was asked for"));
        texts.collect::<Vec<_>>()
    };
    let other = warnings(|answer| answer["model"] = json!("llama-3.1-8b"));
    assert_eq!(other.len(), 1, "{other:?}");
    assert!(
        other[0].contains("`llama-3.1-8b` answers where `tiny` was asked for"),
        "{other:?}"
    );
    for same in [
        warnings(|answer| answer["model"] = json!("tiny-2025-04-14")),
        warnings(|answer| answer["model"] = json!("/models/Tiny")),
        warnings(|answer| answer["model"] = json!(null)),
    ] {
        assert_eq!(same, Vec::<String>::new());
    }
}

/// A run whose answers come late, once some were asked for.
fn waiting(project: &Project, proxy: &Proxy) -> Child {
    let child = project.spawn(&["p.yaml", "--json"]);
    until("nothing was asked for", || proxy.requests() >= 4);
    child
}

#[test]
fn what_is_in_flight_at_the_first_signal_is_kept() {
    let (_folder, server) = upstream();
    for runner in ["inline", "process"] {
        let late = |_: &Asked<'_>| Some(Fault::Late(Duration::from_millis(1500)));
        let (proxy, faulty) = mendable(&server.url, late);
        let project = project(ROWS, &proxy.url, "tiny", "");
        project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
        let run_it = format!("uses: bootstrap\n    runner: {runner}");
        project.edit("p.yaml", "uses: bootstrap", &run_it);
        let child = waiting(&project, &proxy);
        signal("-INT", child.id());
        let ended = Run::of(child.wait_with_output().unwrap());
        let told = format!("{runner}: {}", said(&ended));
        assert_eq!(ended.code, Some(130), "{told}");
        assert!(proxy.requests() < ROWS, "{told}");
        faulty.store(false, Ordering::SeqCst);
        run(&project).ok();
        all_there(&project, ROWS);
        all_asked_once(&proxy, &told);
    }
}

#[test]
fn what_is_in_flight_when_a_steps_time_is_over_is_kept() {
    let (_folder, server) = upstream();
    let late = |_: &Asked<'_>| Some(Fault::Late(Duration::from_secs(3)));
    let (proxy, faulty) = mendable(&server.url, late);
    let project = project(ROWS, &proxy.url, "tiny", "");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    let timed = "uses: bootstrap\n    timeout: 2s";
    project.edit("p.yaml", "uses: bootstrap", timed);
    let ended = run(&project);
    let told = said(&ended);
    assert_eq!(ended.code, Some(4), "{told}");
    assert!(proxy.requests() < ROWS, "{told}");
    faulty.store(false, Ordering::SeqCst);
    project.edit("p.yaml", "timeout: 2s", "timeout: 10m");
    run(&project).ok();
    all_there(&project, ROWS);
    all_asked_once(&proxy, &told);
}

#[test]
fn a_second_signal_waits_for_nothing() {
    let (_folder, server) = upstream();
    let (proxy, faulty) = mendable(&server.url, |_| Some(Fault::Hang));
    let project = project(ROWS, &proxy.url, "tiny", "");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    let child = waiting(&project, &proxy);
    signal("-INT", child.id());
    std::thread::sleep(Duration::from_millis(200));
    signal("-INT", child.id());
    let ended = Run::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", said(&ended));
    assert_eq!(proxy.requests(), 4, "{}", said(&ended));
    faulty.store(false, Ordering::SeqCst);
    run(&project).ok();
    all_there(&project, ROWS);
}
