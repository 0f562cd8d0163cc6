//! A proxy on loopback before a real server: it spoils what it is told to, and counts for each
//! query the requests and the whole answers.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::listen;
use crate::oracle::query;
use crate::server::patient_client;

/// Longest silence of a client in the middle of a request.
const SILENCE: Duration = Duration::from_secs(10);

/// What becomes of a request.
pub(crate) enum Fault {
    /// This answer, and the server sees nothing.
    Instead {
        status: u16,
        headers: String,
        body: String,
    },
    /// The connection is reset before the request is read.
    Reset,
    /// Nothing is ever answered.
    Hang,
    /// The server's answer comes later.
    Late(Duration),
    /// The server's answer breaks off in its middle.
    Truncated,
    /// The server's answer is changed.
    Changed(fn(&mut Value)),
}

impl Fault {
    /// An error as OpenAI words it.
    pub(crate) fn status(status: u16, code: &str) -> Self {
        Self::with_headers(status, code, String::new())
    }

    pub(crate) fn with_headers(status: u16, code: &str, headers: String) -> Self {
        let error = json!({"error": {"message": format!("refused: {code}"), "code": code}});
        Self::Instead {
            status,
            headers,
            body: error.to_string(),
        }
    }

    /// A success with another body.
    pub(crate) fn body(text: &str) -> Self {
        Self::Instead {
            status: 200,
            headers: String::new(),
            body: text.to_owned(),
        }
    }
}

/// What the proxy knows when it decides.
pub(crate) struct Asked<'a> {
    pub(crate) query: &'a str,
    /// Requests for this query, with this one.
    pub(crate) attempt: usize,
    /// Whole answers so far, of all queries.
    pub(crate) answered: usize,
    /// Since the first request for this query.
    pub(crate) since: Duration,
}

/// Requests and whole answers of a query.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count {
    pub(crate) requests: usize,
    pub(crate) answers: usize,
    first: Instant,
}

type Plan = dyn Fn(&Asked<'_>) -> Option<Fault> + Send + Sync;

/// The proxy; it runs as long as the tests do.
pub(crate) struct Proxy {
    pub(crate) url: String,
    seen: Arc<Seen>,
}

/// What went through.
#[derive(Default)]
struct Seen {
    counts: Mutex<BTreeMap<String, Count>>,
    connections: AtomicUsize,
    tokens: Mutex<u64>,
    under_way: UnderWay,
    last: Mutex<Value>,
}

/// Requests under way, and the most there were at once.
#[derive(Default)]
struct UnderWay {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// A request under way; it ends when this is dropped.
struct Passing<'a>(&'a UnderWay);

impl UnderWay {
    fn begin(&self) -> Passing<'_> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        Passing(self)
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Proxy {
    /// A proxy before `upstream`, a server's address without `/v1`.
    pub(crate) fn start(
        upstream: &str,
        plan: impl Fn(&Asked<'_>) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        let seen: Arc<Seen> = Arc::default();
        let own = Arc::clone(&seen);
        let upstream = format!("{upstream}/v1/chat/completions");
        let url = listen(move |stream| {
            own.connections.fetch_add(1, Ordering::SeqCst);
            let connection = Connection {
                stream,
                upstream: &upstream,
                seen: &own,
            };
            while connection.serve(&plan).is_some() {}
        });
        Self {
            url: format!("{url}/v1"),
            seen,
        }
    }

    /// Requests and answers by query.
    pub(crate) fn counts(&self) -> BTreeMap<String, Count> {
        self.seen.counts.lock().unwrap().clone()
    }

    /// Requests in all.
    pub(crate) fn requests(&self) -> usize {
        self.counts().values().map(|count| count.requests).sum()
    }

    /// Tokens of all whole answers and their prompts, as the server counts them.
    pub(crate) fn tokens(&self) -> u64 {
        *self.seen.tokens.lock().unwrap()
    }

    /// The last request.
    pub(crate) fn last_body(&self) -> Value {
        self.seen.last.lock().unwrap().clone()
    }

    /// The most requests that were under way at once.
    pub(crate) fn most_at_once(&self) -> usize {
        self.seen.under_way.most.load(Ordering::SeqCst)
    }

    /// Connections that were made.
    pub(crate) fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::SeqCst)
    }
}

struct Connection<'a> {
    stream: TcpStream,
    upstream: &'a str,
    seen: &'a Seen,
}

impl Connection<'_> {
    /// One request; `None` ends the connection.
    fn serve(&self, plan: &Plan) -> Option<()> {
        let (length, body) = peek_request(&self.stream)?;
        self.seen.last.lock().unwrap().clone_from(&body);
        let query = query(&body);
        let fault = {
            let mut counts = self.seen.counts.lock().unwrap();
            let answered = counts.values().map(|count| count.answers).sum();
            let count = counts.entry(query.to_owned()).or_insert_with(|| Count {
                requests: 0,
                answers: 0,
                first: Instant::now(),
            });
            count.requests += 1;
            plan(&Asked {
                query,
                attempt: count.requests,
                answered,
                since: count.first.elapsed(),
            })
        };
        if matches!(fault, Some(Fault::Reset)) {
            // To close it with unread bytes resets it.
            return None;
        }
        let mut stream = &self.stream;
        stream.read_exact(&mut vec![0; length]).ok()?;
        match fault {
            Some(Fault::Instead {
                status,
                headers,
                body,
            }) => return self.write(status, &headers, &body, body.len()),
            Some(Fault::Hang) => {
                // Until the client goes.
                let _ = stream.read(&mut [0]);
                return None;
            }
            Some(Fault::Late(wait)) => std::thread::sleep(wait),
            _ => {}
        }
        let passing = self.seen.under_way.begin();
        let request = patient_client().post(self.upstream).json(&body);
        let answer = request.send().unwrap();
        let status = answer.status().as_u16();
        let mut text = answer.text().unwrap();
        drop(passing);
        match fault {
            Some(Fault::Truncated) => {
                self.write(status, "", &text[..text.len() / 2], text.len())?;
                return None;
            }
            Some(Fault::Changed(change)) => {
                let mut value = serde_json::from_str(&text).unwrap();
                change(&mut value);
                text = value.to_string();
            }
            _ => {}
        }
        let chosen: Value = serde_json::from_str(&text).unwrap();
        if chosen["choices"].as_array().is_some_and(|c| !c.is_empty()) {
            let mut counts = self.seen.counts.lock().unwrap();
            counts.get_mut(query).unwrap().answers += 1;
            *self.seen.tokens.lock().unwrap() += chosen["usage"]["total_tokens"].as_u64().unwrap();
        }
        self.write(status, "", &text, text.len())
    }

    fn write(&self, status: u16, headers: &str, body: &str, length: usize) -> Option<()> {
        let text =
            format!("HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\n\r\n{body}");
        (&self.stream).write_all(text.as_bytes()).ok()
    }
}

/// The next request, left unread: its length with its head, and its body. `None` when it does not come
/// to its end, or is too long to be left unread.
fn peek_request(stream: &TcpStream) -> Option<(usize, Value)> {
    let mut buffer = vec![0; 1 << 18];
    let (mut came, mut since) = (0, Instant::now());
    loop {
        let there = stream.peek(&mut buffer).ok()?;
        if there == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&buffer[..there]);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_lowercase();
            let mut lines = head.lines();
            let length = lines.find_map(|line| line.strip_prefix("content-length: "))?;
            let length: usize = length.trim().parse().ok()?;
            if body.len() >= length {
                let value = serde_json::from_str(&body[..length]).ok()?;
                return Some((head.len() + 4 + length, value));
            }
        }
        if there > came {
            (came, since) = (there, Instant::now());
        }
        // A client that went away leaves what it sent.
        if there == buffer.len() || since.elapsed() > SILENCE {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
