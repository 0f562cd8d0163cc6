//! More requests than there are places, answers that nobody waits for or that take too long, and
//! the end of a server that has work.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::{Value, json};

use super::{DEPLOYED, serve, with_adapters};
use crate::server::{Server, chat, chunks, client};

/// Tokens of an answer that does not end while a test looks.
const ENDLESS: u32 = 20_000;

/// Starts an answer that does not end by itself, and reads its first chunk.
fn endless(server: &Server) -> reqwest::blocking::Response {
    let mut body = chat("tiny", "hello", ENDLESS);
    body["stream"] = true.into();
    let mut answer = server.ask("/v1/chat/completions", &body);
    assert_eq!(answer.status(), 200);
    answer.read_exact(&mut [0; 64]).unwrap();
    answer
}

#[test]
fn a_batch_takes_as_many_places_as_it_has_rows_up_to_half_of_all() {
    let server = serve(
        &DEPLOYED,
        &["bundle", "--max-batch", "3", "--max-queue", "1"],
    );
    let running = [endless(&server), endless(&server), endless(&server)];
    let texts = |count: usize| json!({"texts": vec!["My PIN"; count]});
    // One place is left.
    let (status, error) = server.problem("/predict/batch", &texts(2));
    assert_eq!((status, &error["type"]), (429, &json!("rate_limit_error")));
    drop(running);
    server.wait_for("flowrun_running", 0.0);
    server.wait_for("flowrun_waiting", 0.0);
    let answers = server.json("/predict/batch", &texts(10));
    assert_eq!(answers["predictions"].as_array().unwrap().len(), 10);
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_full_queue_refuses_and_a_client_that_leaves_makes_room() {
    let (_project, server) = with_adapters(&["--max-batch", "2", "--max-queue", "1"]);
    let running = [endless(&server), endless(&server)];
    let url = format!("{}/v1/chat/completions", server.url);
    let waiting = std::thread::spawn(move || {
        let body = chat("tiny", "waits", 3);
        let answer = client().post(url).json(&body).send().unwrap();
        answer.json::<Value>().unwrap()
    });
    server.wait_for("flowrun_waiting", 1.0);
    // What never fits is no matter of waiting.
    let mut many = chat("tiny", "no", 3);
    many["n"] = 4.into();
    assert_eq!(server.problem("/v1/chat/completions", &many).0, 400);
    let refused = server.ask("/v1/chat/completions", &chat("tiny", "no", 3));
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let error: Value = refused.json().unwrap();
    assert_eq!(error["error"]["type"], "rate_limit_error");
    assert_eq!(
        server.metric("flowrun_refused_total{reason=\"queue_full\"}"),
        1.0
    );

    drop(running);
    // The one that waited is computed once the others are gone.
    assert_eq!(waiting.join().unwrap()["usage"]["completion_tokens"], 3);
    server.wait_for("flowrun_running", 0.0);
    assert_eq!(server.metric("flowrun_given_up_total"), 2.0);
    let generated = server.metric("flowrun_generated_tokens_total");
    assert!(generated < f64::from(ENDLESS), "{generated}");
    server.json("/v1/chat/completions", &chat("tiny", "again", 3));
}

#[test]
fn a_client_that_leaves_before_its_answer_is_computed_no_further() {
    let (_project, server) = with_adapters(&["--max-batch", "2", "--max-queue", "0"]);
    let body = chat("tiny", "hello", ENDLESS).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut streams = [server.connect(), server.connect()];
    for stream in &mut streams {
        stream.write_all(request.as_bytes()).unwrap();
    }
    server.wait_for("flowrun_running", 2.0);
    let refused = server.ask("/v1/chat/completions", &chat("tiny", "no", 3));
    assert_eq!(refused.status(), 429);
    drop(streams);
    server.wait_for("flowrun_running", 0.0);
    assert_eq!(server.metric("flowrun_given_up_total"), 2.0);
    assert_eq!(server.metric("flowrun_generated_tokens_total"), 0.0);
    server.json("/v1/chat/completions", &chat("tiny", "again", 3));
}

#[test]
fn an_answer_that_takes_too_long_is_cut_off() {
    let (_project, server) = with_adapters(&["--timeout", "1"]);
    let (status, error) = server.problem("/v1/chat/completions", &chat("tiny", "hello", ENDLESS));
    assert_eq!((status, &error["code"]), (504, &json!("timeout")));
    let mut body = chat("tiny", "hello", ENDLESS);
    body["stream"] = true.into();
    let text = server.ask("/v1/chat/completions", &body).text().unwrap();
    assert!(text.contains("took too long") && !text.contains("[DONE]"));
    server.wait_for("flowrun_running", 0.0);
}

#[test]
fn a_server_told_to_stop_finishes_what_is_under_way() {
    let (_project, mut server) = with_adapters(&[]);
    let mut body = chat("tiny", "hello", 1500);
    body["stream"] = true.into();
    let answer = server.ask("/v1/chat/completions", &body);
    server.signal("-TERM");
    let chunks = chunks(answer);
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
    assert_eq!(server.wait(), Some(0));

    // What does not end in time is cut off.
    let (_project, mut server) = with_adapters(&["--drain", "1"]);
    let _answer = endless(&server);
    server.signal("-TERM");
    assert_eq!(server.wait(), Some(0));
    // And a second signal ends it at once.
    let (_project, mut server) = with_adapters(&["--drain", "3600"]);
    let _answer = endless(&server);
    server.signal("-TERM");
    std::thread::sleep(Duration::from_millis(300));
    server.signal("-TERM");
    assert_eq!(server.wait(), Some(0));
}

#[test]
fn a_load_is_measured() {
    let bundle = serve(
        &DEPLOYED,
        &["bundle", "--max-batch", "2", "--max-queue", "1"],
    );
    let bench = |url: &str, more: &[&str]| {
        let args = [&["bench", "serve", url, "--seconds", "1"], more].concat();
        DEPLOYED.run(&args)
    };
    let run = bench(&bundle.url, &["--clients", "1,8", "--json"]).ok();
    let said: Value = serde_json::from_str(&run.stdout).unwrap();
    let rows = said["measured"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[1]["clients"]), (2, &json!(8)));
    let asked = bundle.metric("flowrun_requests_total{path=\"/predict\",status=\"200\"}");
    let answered: f64 = rows
        .iter()
        .map(|row| row["answered"].as_f64().unwrap())
        .sum();
    assert!(
        answered > 1.0 && (asked - answered).abs() < 0.5,
        "{asked} {said}"
    );
    // Eight clients and three places.
    let refused = bundle.metric("flowrun_refused_total{reason=\"queue_full\"}");
    let told = rows[1]["refused"].as_f64().unwrap();
    assert!(
        told > 0.0 && (refused - told).abs() < 0.5,
        "{refused} {said}"
    );
    for row in rows {
        assert_eq!(row["failed"], 0, "{row}");
        let at = |name: &str| row[name].as_f64().unwrap();
        assert!(at("p50_ms") > 0.0 && at("p50_ms") <= at("p95_ms") && at("p95_ms") <= at("p99_ms"));
        assert!(at("memory_most_mb") > 1.0 && at("cpu_ms_per_query") > 0.0);
    }
    // A base model alone is chatted with.
    let (_project, server) = with_adapters(&[]);
    let run = bench(&server.url, &["--clients", "2"]).ok();
    assert!(run.stdout.starts_with("| clients |"), "{}", run.stdout);
    assert!(run.stdout.contains("\n| 2 | "), "{}", run.stdout);
    let nobody = bench("http://127.0.0.1:9", &[]);
    assert_eq!(nobody.code, Some(2), "{}", nobody.stderr);
}
