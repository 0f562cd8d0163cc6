//! A `flowrun serve` process, and what to ask it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

/// A server that is up; stopped when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
    pub(crate) model: String,
}

impl Server {
    /// Starts `command`, which lacks only how to listen.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .args(["--port", "0", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        if line.is_empty() {
            let mut said = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut said)
                .unwrap();
            panic!("the server did not come up: {said}");
        }
        let said: Value = serde_json::from_str(&line).unwrap();
        let text = |name: &str| said[name].as_str().unwrap().to_owned();
        Self {
            child,
            url: text("url"),
            model: text("model"),
        }
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        client().get(format!("{}{path}", self.url)).send().unwrap()
    }

    pub(crate) fn ask(&self, path: &str, body: &Value) -> Response {
        let url = format!("{}{path}", self.url);
        client().post(url).json(body).send().unwrap()
    }

    /// An answer that must be 200.
    pub(crate) fn json(&self, path: &str, body: &Value) -> Value {
        let answer = self.ask(path, body);
        let status = answer.status();
        let text = answer.text().unwrap();
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The status and the error of an answer that must not be 200.
    pub(crate) fn problem(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.ask(path, body);
        let status = answer.status().as_u16();
        let body: Value = answer.json().unwrap();
        assert!(body["error"]["message"].is_string(), "{body}");
        (status, body["error"].clone())
    }

    /// A connection, for what no client would send.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends bytes and gives all that comes back until the server closes.
    pub(crate) fn raw(&self, text: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // A server that does not read all that is sent may cut the connection off.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The value of a metric; 0 when it was never counted.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0.0, |rest| rest.trim().parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub(crate) fn wait_for(&self, name: &str, value: f64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while (self.metric(name) - value).abs() > 1e-9 {
            assert!(Instant::now() < deadline, "{name} is {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it says something in its log.
    pub(crate) fn hear(&mut self, text: &str) {
        let log = self.child.stderr.as_mut().unwrap();
        let mut lines = BufReader::new(log).lines().map(Result::unwrap);
        let said = lines.any(|line| line.contains(text));
        assert!(said, "the server ended without saying: {text}");
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        crate::processes::signal(name, self.pid());
    }

    /// Waits for its end; its exit code.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Asks it to finish as an operator would; gives its exit code.
    pub(crate) fn stop(mut self) -> Option<i32> {
        self.signal("-TERM");
        self.wait()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where tests' own ports lie: below what systems hand out for the near ends of connections
/// (`ip_local_port_range`, 32768 and up on Linux), and above those that Ray gives its workers.
const PORTS: std::ops::Range<u16> = 20_000..32_768;

/// A port that nobody has right now, nor will be given by the system before the caller's server
/// takes it, unless it hands out those below 32768 too. No two calls of a process give the same.
pub(crate) fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    // Processes that run at once begin at different places.
    let first = std::process::id().wrapping_mul(613);
    let nth = |n: u32| PORTS.start + (first.wrapping_add(n) % PORTS.len() as u32) as u16;
    let mut next = (0..PORTS.len()).map(|_| nth(GIVEN.fetch_add(1, Ordering::Relaxed)));
    let free = |port: &u16| std::net::TcpListener::bind(("0.0.0.0", *port)).is_ok();
    next.find(free).expect("all ports are taken")
}

pub(crate) fn client() -> Client {
    Client::builder().no_proxy().build().unwrap()
}

/// For a server whose first answers take their time.
pub(crate) fn patient_client() -> Client {
    let client = Client::builder().no_proxy();
    client.timeout(Duration::from_secs(120)).build().unwrap()
}

/// A chat of one message, greedy.
pub(crate) fn chat(model: &str, text: &str, max_tokens: u32) -> Value {
    json!({
        "model": model, "temperature": 0, "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": text}],
    })
}

/// What the first choice says.
pub(crate) fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// The events of a stream, without the last, which must be `[DONE]`.
pub(crate) fn chunks(answer: Response) -> Vec<Value> {
    let text = answer.text().unwrap();
    let data: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    let (last, chunks) = data.split_last().unwrap();
    assert_eq!(*last, "[DONE]", "{text}");
    chunks
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
