//! Who and what is refused: strangers, other sites' pages, slow and oversized requests.

use std::io::{Read, Write};
use std::time::Duration;

use super::with_adapters;
use crate::processes::signal;
use crate::project::{Project, Run};
use crate::server::{Server, chat, client};
use crate::tiny::write_model;

#[test]
fn slow_and_oversized_requests_are_refused() {
    let (_project, server) = with_adapters(&["--read-timeout", "1"]);
    // A head that never ends is hung up on.
    let answer = server.raw("GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ");
    assert!(!answer.contains("200 OK"), "{answer}");
    let head = |length: usize| {
        format!(
            "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let answer = server.raw(&format!("{}{{", head(20)));
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    // By its head alone: nothing of it is read.
    let answer = server.raw(&head(2 << 20));
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let mut stream = server.connect();
    let chunked = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(chunked.as_bytes()).unwrap();
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(1 << 16));
    for _ in 0..20 {
        // The server stops reading at its limit, and may hang up before all is sent.
        if stream.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 413"),
        "{answer}"
    );
    let huge = format!(
        "GET /health HTTP/1.1\r\nHost: localhost\r\n{}: x\r\n\r\n",
        "h".repeat(400_000)
    );
    let answer = server.raw(&huge);
    assert!(!answer.contains("200 OK"), "{answer}");
    assert_eq!(
        server.metric("flowrun_refused_total{reason=\"slow_request\"}"),
        1.0
    );
    assert_eq!(
        server.metric("flowrun_refused_total{reason=\"too_large\"}"),
        2.0
    );
    server.json("/v1/chat/completions", &chat("tiny", "still there", 2));
}

#[test]
fn only_those_who_may_are_answered() {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let (_, open) = with_adapters(&[]);
    let get = |host: &str| {
        let request = client()
            .get(format!("{}/v1/models", open.url))
            .header("host", host);
        request.send().unwrap().status().as_u16()
    };
    assert_eq!((get("evil.example"), get("localhost")), (403, 200));
    // A form can send no JSON, and another site's page nothing at all, nor be told that it may.
    let form = || {
        client()
            .post(format!("{}/v1/chat/completions", open.url))
            .header("content-type", "text/plain")
            .body(chat("tiny", "a", 1).to_string())
    };
    assert_eq!(form().send().unwrap().status(), 415);
    let cross = form().header("origin", "http://evil.example");
    let cross = cross.send().unwrap();
    assert_eq!(cross.status(), 403);
    assert!(
        !cross
            .headers()
            .keys()
            .any(|name| name.as_str().starts_with("access-control"))
    );

    let mut command = project.command(&["serve", "tiny", "-v"]);
    command.env("FLOWRUN_API_KEY", "sk-secret-1");
    let locked = Server::start(command);
    let ask = |key: Option<&str>| {
        let mut request = client().get(format!("{}/v1/models", locked.url));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        request.send().unwrap().status().as_u16()
    };
    assert_eq!(ask(None), 401);
    assert_eq!(ask(Some("sk-secret-2")), 401);
    assert_eq!(ask(Some("sk-secret-1")), 200);
    assert_eq!(locked.get("/health/ready").status(), 200);
    assert_eq!(locked.get("/metrics").status(), 401);

    let fails = |args: &[&str]| {
        let mut command = project.command(&["serve", "tiny"]);
        command.args(args).env_remove("FLOWRUN_API_KEY");
        Run::of(command.output().unwrap())
    };
    let everywhere = fails(&["--host", "0.0.0.0"]);
    assert_eq!(everywhere.code, Some(2), "{}", everywhere.stderr);
    assert!(everywhere.stderr.contains("FLOWRUN_API_KEY"));
    let port = open.url.rsplit_once(':').unwrap().1;
    let taken = fails(&["--port", port]);
    assert_eq!(taken.code, Some(1));
    assert!(
        taken.stderr.contains("choose another --port"),
        "{}",
        taken.stderr
    );
}

#[test]
fn a_key_is_never_logged() {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let log = project.path("log");
    let mut command = project.command(&["serve", "tiny", "-v"]);
    command
        .env("FLOWRUN_API_KEY", "sk-secret-1")
        .env("FLOWRUN_LOG", "trace")
        .args(["--port", "0"])
        .stderr(std::fs::File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    let url = loop {
        let text = std::fs::read_to_string(&log).unwrap();
        if let Some((_, rest)) = text.split_once("served at ") {
            break rest.split(';').next().unwrap().to_owned();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let ask = |key: &str| {
        client()
            .get(format!("{url}/v1/models"))
            .bearer_auth(key)
            .send()
    };
    assert_eq!(ask("sk-secret-1").unwrap().status(), 200);
    assert_eq!(ask("sk-wrong-1").unwrap().status(), 401);
    signal("-TERM", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(
        !text.contains("sk-secret") && !text.contains("sk-wrong"),
        "{text}"
    );
}
