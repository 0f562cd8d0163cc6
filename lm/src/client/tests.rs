//! The client against a real server on loopback.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::*;
use crate::lm::{FinishReason, Message, Role, Sampling};

/// What the server says next: status, headers, body.
type Reply = (u16, &'static str, String);

/// A server that answers from a script, then echoes the last message.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
    most_at_once: Arc<AtomicUsize>,
    /// `slow` is answered from here on.
    go: Arc<AtomicBool>,
}

fn serve(script: Vec<Reply>) -> Server {
    serve_on(TcpListener::bind("127.0.0.1:0").unwrap(), script)
}

fn serve_on(listener: TcpListener, script: Vec<Reply>) -> Server {
    let server = Server {
        url: format!("http://{}/v1", listener.local_addr().unwrap()),
        seen: Arc::default(),
        most_at_once: Arc::default(),
        go: Arc::default(),
    };
    let script = Arc::new(Mutex::new(VecDeque::from(script)));
    let (seen, most) = (Arc::clone(&server.seen), Arc::clone(&server.most_at_once));
    let now = Arc::new(AtomicUsize::new(0));
    let go = Arc::clone(&server.go);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (script, seen) = (Arc::clone(&script), Arc::clone(&seen));
            let (most, now) = (Arc::clone(&most), Arc::clone(&now));
            let go = Arc::clone(&go);
            std::thread::spawn(move || {
                while let Some((head, body)) = read_request(&stream) {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    seen.lock().unwrap().push((head, body.clone()));
                    let scripted = script.lock().unwrap().pop_front();
                    if scripted.is_none() {
                        // Long enough for others to come in.
                        std::thread::sleep(Duration::from_millis(20));
                        let slow = body["messages"][0]["content"] == "slow";
                        while slow && !go.load(Ordering::SeqCst) {
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                    let reply = scripted.unwrap_or_else(|| echo(&body));
                    now.fetch_sub(1, Ordering::SeqCst);
                    write_reply(&stream, &reply);
                }
            });
        }
    });
    server
}

/// The head and the body of the next request.
pub(super) fn read_message(stream: &TcpStream) -> Option<(String, Vec<u8>)> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let lower = head.to_lowercase();
    let length = lower
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(Some(0), |text| text.trim().parse().ok())?];
    reader.read_exact(&mut body).ok()?;
    Some((head, body))
}

fn read_request(stream: &TcpStream) -> Option<(String, Value)> {
    let (head, body) = read_message(stream)?;
    Some((head, serde_json::from_slice(&body).ok()?))
}

fn write_reply(mut stream: &TcpStream, (status, headers, body): &Reply) {
    let length = body.len();
    let text = format!("HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\n\r\n{body}");
    // The client may have given up.
    let _ = stream.write_all(text.as_bytes());
}

fn echo(body: &Value) -> Reply {
    let text = &body["messages"][0]["content"];
    let answer = json!({
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    });
    (200, "", answer.to_string())
}

fn spec(url: &str) -> OpenAiSpec {
    serde_json::from_value(json!({"base_url": url, "model": "m", "max_retries": 2})).unwrap()
}

fn client(spec: &OpenAiSpec, key: Option<&str>) -> OpenAi {
    let pace = Pace {
        first: Duration::from_millis(1),
        longest: Duration::from_millis(2),
    };
    OpenAi::with_pace(spec, key.map(str::to_owned), Arc::new(|| false), pace).unwrap()
}

fn request(text: &str) -> Request {
    Request {
        messages: vec![Message {
            role: Role::User,
            content: text.into(),
        }],
        sampling: Sampling {
            seed: Some(3),
            stop: vec!["x".into()],
            ..Sampling::default()
        },
        choices: None,
    }
}

fn ask(client: &OpenAi, texts: &[&str]) -> Vec<Result<Completion, LmError>> {
    let requests: Vec<Request> = texts.iter().map(|text| request(text)).collect();
    let told = Mutex::new(vec![0; texts.len()]);
    let answers = client.complete(&requests, &|i, _| told.lock().unwrap()[i] += 1);
    assert_eq!(*told.lock().unwrap(), vec![1; texts.len()]);
    answers
}

fn error(answers: &[Result<Completion, LmError>]) -> String {
    answers[0].as_ref().unwrap_err().to_string()
}

#[test]
fn answers_come_in_order_and_no_more_are_in_flight_than_allowed() {
    let server = serve(vec![]);
    let mut spec = spec(&server.url);
    spec.concurrency = 3;
    let texts: Vec<String> = (0..12).map(|i| format!("q{i}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let answers = ask(&client(&spec, Some("secret")), &texts);
    for (text, answer) in texts.iter().zip(answers) {
        let answer = answer.unwrap();
        assert_eq!(
            (answer.text.as_str(), answer.finish),
            (*text, FinishReason::Stop)
        );
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (5, 2));
    }
    let most = server.most_at_once.load(Ordering::SeqCst);
    assert!((1..=3).contains(&most), "{most}");
    let (head, body) = server.seen.lock().unwrap()[0].clone();
    assert!(head.starts_with("POST /v1/chat/completions "), "{head}");
    assert!(head.to_lowercase().contains("authorization: bearer secret"));
    assert_eq!(body["model"], "m");
    assert_eq!((&body["seed"], &body["stop"]), (&json!(3), &json!(["x"])));
}

#[test]
fn busy_and_broken_servers_are_asked_again() {
    let script = vec![
        (429, "retry-after: 0\r\n", "{}".to_owned()),
        (503, "", "down".to_owned()),
    ];
    let server = serve(script);
    let answers = ask(&client(&spec(&server.url), None), &["a"]);
    assert_eq!(answers[0].as_ref().unwrap().text, "a");
    assert_eq!(server.seen.lock().unwrap().len(), 3);
}

#[test]
fn a_server_that_keeps_failing_is_given_up() {
    let server = serve((0..3).map(|_| (500, "", "oops".to_owned())).collect());
    let text = error(&ask(&client(&spec(&server.url), None), &["a"]));
    assert!(text.contains("status 500: oops (3 attempts)"), "{text}");
    assert!(text.contains(&server.url), "{text}");
}

#[test]
fn a_wrong_request_is_not_repeated_and_says_why() {
    let body = json!({"error": {"message": "bad key secret"}}).to_string();
    let script = vec![
        (401, "", body),
        (404, "", "{}".into()),
        (
            400,
            "",
            "{\"detail\": \"Maximum context length is 8\"}".into(),
        ),
    ];
    let server = serve(script);
    let mut spec = spec(&server.url);
    spec.api_key_env = Some("MY_KEY".into());
    let client = client(&spec, Some("secret"));
    let text = error(&ask(&client, &["a"]));
    assert!(
        text.contains("bad key [key]; check the key in `MY_KEY`"),
        "{text}"
    );
    assert!(!text.contains("secret") && !format!("{client:?}").contains("secret"));
    let text = error(&ask(&client, &["a"]));
    assert!(text.contains("model id `m`"), "{text}");
    let text = error(&ask(&client, &["a"]));
    assert!(
        text.contains("length is 8; the prompt and `max_tokens` are"),
        "{text}"
    );
    assert_eq!(server.seen.lock().unwrap().len(), 3);
}

#[test]
fn a_dead_server_fails_all_requests_without_waiting_for_each() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut spec = spec(&format!("http://{free}/v1"));
    spec.concurrency = 1;
    let texts = vec!["a"; 200];
    let client = client(&spec, None);
    let answers = ask(&client, &texts);
    assert!(
        answers
            .iter()
            .all(|a| matches!(a, Err(LmError::Unavailable(_))))
    );
    assert!(
        error(&answers).contains("cannot be reached"),
        "{}",
        error(&answers)
    );
    assert!(error(&answers).contains("(3 attempts)"));
    // The next call finds out with one try.
    assert!(error(&ask(&client, &["a"])).contains("(1 attempts)"));
    // The server is there again.
    let listener = TcpListener::bind(free).unwrap();
    let server = serve_on(listener, vec![(503, "", "starting".to_owned())]);
    assert!(ask(&client, &["a"])[0].is_ok());
    assert_eq!(server.seen.lock().unwrap().len(), 2);
}

#[test]
fn answers_may_overtake_each_other() {
    let server = serve(vec![]);
    let told = Mutex::new(Vec::new());
    let requests = ["slow", "quick"].map(request);
    let answers = client(&spec(&server.url), None).complete(&requests, &|index, _| {
        told.lock().unwrap().push(index);
        server.go.store(true, Ordering::SeqCst);
    });
    let texts: Vec<_> = answers.into_iter().map(|a| a.unwrap().text).collect();
    assert_eq!(texts, ["slow", "quick"]);
    assert_eq!(*told.lock().unwrap(), [1, 0]);
}

#[test]
fn calls_of_several_threads_share_the_limit() {
    let server = serve(vec![]);
    let mut spec = spec(&server.url);
    spec.concurrency = 2;
    let client = client(&spec, None);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let answers = ask(&client, &["a", "b", "c"]);
                assert!(answers.iter().all(Result::is_ok));
            });
        }
    });
    let most = server.most_at_once.load(Ordering::SeqCst);
    assert!((1..=2).contains(&most), "{most}");
    assert_eq!(server.seen.lock().unwrap().len(), 12);
}

#[test]
fn an_ignored_restriction_is_noticed() {
    let server = serve(vec![]);
    let mut spec = spec(&server.url);
    spec.guided = Some(Guided::Vllm);
    let client = client(&spec, None);
    let ask_for = |values: [&str; 2]| {
        let request = Request {
            choices: Some(crate::lm::Choices {
                after: None,
                values: values.map(str::to_owned).into(),
                then: String::new(),
            }),
            ..request("a")
        };
        client.complete(&[request], &|_, _| {})
    };
    assert_eq!(ask_for(["b", "a"])[0].as_ref().unwrap().text, "a");
    let text = error(&ask_for(["b", "c"]));
    assert!(text.contains("`a` is none of the allowed ones"), "{text}");
}

#[test]
fn the_pace_of_requests_is_kept() {
    let server = serve(vec![]);
    let mut spec = spec(&server.url);
    // The first passes; the second would come a minute later.
    spec.requests_per_minute = Some(1);
    let seen = Arc::clone(&server.seen);
    let cancelled = Arc::new(move || !seen.lock().unwrap().is_empty());
    let pace = Pace::default();
    let client = OpenAi::with_pace(&spec, None, cancelled, pace).unwrap();
    ask(&client, &["a", "b"]);
    assert_eq!(server.seen.lock().unwrap().len(), 1);
}

#[test]
fn an_async_task_may_be_the_last_owner() {
    let client = client(&spec("http://localhost:1/v1"), None);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async move { drop(client) });
}

#[test]
fn a_key_that_no_header_can_carry_is_refused_unseen() {
    let mut spec = spec("http://localhost:1/v1");
    spec.api_key_env = Some("MY_KEY".into());
    let key = Some("sec\nret".to_owned());
    let error = OpenAi::new(&spec, key, Arc::new(|| false)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("`MY_KEY`") && !text.contains("sec\n"),
        "{text}"
    );
}

#[test]
fn an_answer_that_is_no_json_is_shown() {
    let server = serve((0..3).map(|_| (200, "", "<html>".to_owned())).collect());
    let text = error(&ask(&client(&spec(&server.url), None), &["a"]));
    assert!(
        text.contains("cannot be read") && text.contains("<html>"),
        "{text}"
    );
}

#[test]
fn a_refusal_is_not_an_empty_answer() {
    let body = json!({"choices": [{"message": {"content": null, "refusal": "no"}}]});
    let server = serve(vec![(200, "", body.to_string())]);
    let answer = ask(&client(&spec(&server.url), None), &["a"])
        .remove(0)
        .unwrap();
    assert_eq!(answer.finish, FinishReason::ContentFilter);
}

#[test]
fn what_is_in_flight_when_the_run_stops_is_awaited() {
    let server = serve(vec![]);
    let mut spec = spec(&server.url);
    spec.concurrency = 1;
    let stop = Arc::new(AtomicBool::new(false));
    let hears = Arc::clone(&stop);
    let client = OpenAi::new(&spec, None, Arc::new(move || hears.load(Ordering::SeqCst))).unwrap();
    let answers = std::thread::scope(|scope| {
        scope.spawn(|| {
            while server.seen.lock().unwrap().is_empty() {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::SeqCst);
            // Until it has looked.
            std::thread::sleep(4 * LOOK_EVERY);
            server.go.store(true, Ordering::SeqCst);
        });
        ask(&client, &["slow", "b"])
    });
    assert_eq!(answers[0].as_ref().unwrap().text, "slow");
    assert_eq!(answers[1], Err(LmError::Cancelled));
    assert_eq!(server.seen.lock().unwrap().len(), 1);
}

#[test]
fn a_server_that_takes_too_long_is_not_awaited_for_ever() {
    let server = serve(vec![]);
    let seen = Arc::clone(&server.seen);
    let cancelled = Arc::new(move || !seen.lock().unwrap().is_empty());
    let mut client = OpenAi::new(&spec(&server.url), None, cancelled).unwrap();
    client.grace = Duration::ZERO;
    assert_eq!(ask(&client, &["slow"]), [Err(LmError::Cancelled)]);
    server.go.store(true, Ordering::SeqCst);
}

#[test]
fn a_server_that_answers_nobody_is_left_alone() {
    let server = serve((0..200).map(|_| (500, "", "oops".to_owned())).collect());
    let mut spec = spec(&server.url);
    spec.concurrency = 2;
    spec.max_retries = 1;
    let client = client(&spec, None);
    let answers = ask(&client, &["a"; 100]);
    // Eight that were given up, and the one beside the last of them.
    let seen = server.seen.lock().unwrap().len();
    assert!((16..=18).contains(&seen), "{seen}");
    assert!(matches!(&answers[0], Err(LmError::ServerError(why)) if why.contains("status 500")));
    let Err(LmError::Unavailable(why)) = &answers[99] else {
        unreachable!("{answers:?}");
    };
    assert!(
        why.starts_with("8 requests in a row got no answer") && why.contains("oops (2 attempts)"),
        "{why}"
    );
    // The next call finds out with one try.
    let again = ask(&client, &["a"]);
    assert!(matches!(&again[0], Err(LmError::Unavailable(_))));
    assert_eq!(server.seen.lock().unwrap().len(), seen + 1);
}

#[test]
fn refusals_are_no_outage() {
    let refused = || (400, "", "{\"detail\": \"no\"}".to_owned());
    let server = serve((0..40).map(|_| refused()).collect());
    let mut spec = spec(&server.url);
    spec.concurrency = 1;
    let answers = ask(&client(&spec, None), &["a"; 50]);
    assert!(
        answers[..40]
            .iter()
            .all(|answer| matches!(answer, Err(LmError::Rejected(_))))
    );
    assert!(answers[40..].iter().all(Result::is_ok));
}

#[test]
fn other_failures_than_5xx_are_told_apart() {
    let script = vec![
        (500, "", "oops".to_owned()),
        (200, "", "<html>".to_owned()),
        (500, "", "oops".to_owned()),
    ];
    let server = serve(script);
    let answers = ask(&client(&spec(&server.url), None), &["a"]);
    assert!(
        matches!(&answers[0], Err(LmError::Unavailable(_))),
        "{answers:?}"
    );
}

#[test]
fn a_barred_client_sends_nothing_more() {
    let server = serve(vec![]);
    let mut spec = spec(&server.url);
    spec.concurrency = 1;
    let client = client(&spec, None);
    let full = LmError::Barred("the disk is full".to_owned());
    let requests = ["a"; 5].map(request);
    let answers = client.complete(&requests, &|_, _| client.bar(&full));
    assert!(answers[0].is_ok());
    assert!(
        answers[1..]
            .iter()
            .all(|answer| *answer == Err(full.clone()))
    );
    assert_eq!(ask(&client, &["b"]), [Err(full)]);
    assert_eq!(server.seen.lock().unwrap().len(), 1);
}

#[test]
fn an_answer_that_is_too_large_was_paid_for() {
    let server = serve(vec![(200, "", "x".repeat(17 << 20))]);
    let spec = spec(&server.url);
    let folder = tempfile::tempdir().unwrap();
    let budget = crate::lm::Budget {
        usd: None,
        tokens: Some(worst_case(&spec, &request("a")).tokens()),
    };
    let ledger = Ledger::open(&folder.path().join("ledger"), budget, None).unwrap();
    let client = client(&spec, None).with_ledger(Some(ledger));
    let text = error(&ask(&client, &["a"]));
    assert!(text.contains("larger than"), "{text}");
    let text = error(&ask(&client, &["a"]));
    assert!(text.contains("is spent"), "{text}");
    assert_eq!(server.seen.lock().unwrap().len(), 1);
}

#[test]
fn counts_without_measure_are_not_believed() {
    let body = json!({
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": u64::MAX, "completion_tokens": 1e300},
    });
    let server = serve(vec![(200, "", body.to_string()); 2]);
    let mut spec = spec(&server.url);
    spec.tokens_per_minute = Some(60_000_000);
    let folder = tempfile::tempdir().unwrap();
    let budget = crate::lm::Budget {
        usd: None,
        tokens: Some(1_000_000),
    };
    let ledger = Ledger::open(&folder.path().join("ledger"), budget, None).unwrap();
    let client = client(&spec, None).with_ledger(Some(ledger));
    assert_eq!(
        ask(&client, &["a"])[0].as_ref().unwrap().prompt_tokens,
        u64::MAX
    );
    // It counts with its worst case, and leaves the rest of the budget to others.
    assert!(ask(&client, &["a"])[0].is_ok());
}

#[test]
fn a_stopped_run_does_not_wait_for_the_server() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let spec = spec(&format!("http://{}/v1", listener.local_addr().unwrap()));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let cancelled = Arc::new(move || count.fetch_add(1, Ordering::SeqCst) > 2);
    let killed = cancelled.clone();
    let client = OpenAi::new(&spec, None, cancelled).unwrap();
    let client = client.killed_by(killed);
    assert_eq!(ask(&client, &["a", "b"]), vec![Err(LmError::Cancelled); 2]);
}

#[test]
fn a_bad_url_is_refused() {
    let error = OpenAi::new(&spec("nonsense"), None, Arc::new(|| false)).unwrap_err();
    assert!(error.to_string().contains("`nonsense`"), "{error}");
}

#[test]
fn guided_answers_are_not_kept_with_free_ones() {
    let mut spec = spec("http://127.0.0.1:9/v1");
    let free = client(&spec, None);
    spec.guided = Some(Guided::Vllm);
    let guided = client(&spec, None);
    assert_eq!(free.id(), "m");
    assert_ne!(free.id(), guided.id());
}
