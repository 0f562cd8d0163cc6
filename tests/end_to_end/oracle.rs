//! A server of OpenAI's chat completions on loopback, which counts what it is asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

/// The text of the answer to a request's body; none refuses it with status 500.
type Answer = dyn Fn(&Value) -> Option<String> + Send + Sync;

/// A server that runs as long as the tests do.
pub(crate) struct Oracle {
    pub(crate) url: String,
    calls: Arc<AtomicUsize>,
}

impl Oracle {
    pub(crate) fn start(answer: impl Fn(&Value) -> Option<String> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let oracle = Self {
            url: format!("http://{}/v1", listener.local_addr().unwrap()),
            calls: Arc::default(),
        };
        let answer: Arc<Answer> = Arc::new(answer);
        let calls = Arc::clone(&oracle.calls);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, calls) = (Arc::clone(&answer), Arc::clone(&calls));
                std::thread::spawn(move || {
                    while let Some(body) = read_request(&stream) {
                        calls.fetch_add(1, Ordering::SeqCst);
                        reply(&stream, answer(&body));
                    }
                });
            }
        });
        oracle
    }

    /// Calls since the last time.
    pub(crate) fn calls(&self) -> usize {
        self.calls.swap(0, Ordering::SeqCst)
    }
}

/// The last message, which holds the query.
pub(crate) fn query(body: &Value) -> &str {
    let last = body["messages"].as_array().and_then(|all| all.last());
    last.unwrap()["content"].as_str().unwrap()
}

fn read_request(stream: &TcpStream) -> Option<Value> {
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
        .find_map(|line| line.strip_prefix("content-length: "))?;
    let mut body = vec![0; length.trim().parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    serde_json::from_slice(&body).ok()
}

fn reply(mut stream: &TcpStream, answer: Option<String>) {
    let (status, body) = match answer {
        None => (500, json!({"error": {"message": "refused by the test"}})),
        Some(text) => (
            200,
            json!({
                "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2},
            }),
        ),
    };
    let body = body.to_string();
    let length = body.len();
    let text = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{body}");
    // The client may be gone.
    let _ = stream.write_all(text.as_bytes());
}
