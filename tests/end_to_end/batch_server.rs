//! OpenAI's files and batches on loopback, over a real server that answers the requests. Counts the
//! batches, and the answers to each query.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::oracle::query;
use crate::server::client;

/// The line in place of a query's answer, if it has none.
type Spoilt = dyn Fn(&str) -> Option<Value> + Send + Sync;

/// The server; it runs as long as the tests do.
pub(crate) struct BatchServer {
    pub(crate) url: String,
    inner: Arc<Inner>,
}

struct Inner {
    upstream: String,
    spoilt: Box<Spoilt>,
    /// Batches are answered.
    open: AtomicBool,
    /// The reply to the next order is lost.
    deaf: AtomicBool,
    looks: AtomicUsize,
    files: Mutex<Vec<String>>,
    /// Batch by number: its input file, and its output once it is done.
    batches: Mutex<Vec<(String, Option<String>)>>,
    answers: Mutex<BTreeMap<String, usize>>,
}

impl BatchServer {
    /// A server over `upstream`, a server's address without `/v1`.
    pub(crate) fn start(
        upstream: &str,
        spoilt: impl Fn(&str) -> Option<Value> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let inner = Arc::new(Inner {
            upstream: format!("{upstream}/v1/chat/completions"),
            spoilt: Box::new(spoilt),
            open: AtomicBool::new(true),
            deaf: AtomicBool::new(false),
            looks: AtomicUsize::new(0),
            files: Mutex::default(),
            batches: Mutex::default(),
            answers: Mutex::default(),
        });
        let shared = Arc::clone(&inner);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let inner = Arc::clone(&shared);
                std::thread::spawn(move || while inner.serve(&stream).is_some() {});
            }
        });
        Self { url, inner }
    }

    /// Whether batches are answered, or stay in progress.
    pub(crate) fn set_open(&self, open: bool) {
        self.inner.open.store(open, Ordering::SeqCst);
    }

    /// Loses the reply to the next order.
    pub(crate) fn lose_a_reply(&self) {
        self.inner.deaf.store(true, Ordering::SeqCst);
    }

    /// Times that the state of a batch was asked for.
    pub(crate) fn looks(&self) -> usize {
        self.inner.looks.load(Ordering::SeqCst)
    }

    /// Requests in each batch, in the order of the batches.
    pub(crate) fn batches(&self) -> Vec<usize> {
        let batches = self.inner.batches.lock().unwrap().clone();
        let lines = |(file, _): &(String, Option<String>)| self.inner.file(file).lines().count();
        batches.iter().map(lines).collect()
    }

    /// Answers by query.
    pub(crate) fn answers(&self) -> BTreeMap<String, usize> {
        self.inner.answers.lock().unwrap().clone()
    }
}

impl Inner {
    fn serve(&self, stream: &TcpStream) -> Option<()> {
        let (head, body) = read_request(stream)?;
        let mut words = head.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let path = target.split('?').next()?.strip_prefix("/v1/")?;
        let parts: Vec<&str> = path.split('/').collect();
        let reply = match (method, parts.as_slice()) {
            ("POST", ["files"]) => {
                json!({"id": self.keep(file_in(&head, &body)?), "object": "file"})
            }
            ("POST", ["batches"]) => {
                let order: Value = serde_json::from_slice(&body).ok()?;
                let file = order["input_file_id"].as_str()?.to_owned();
                let mut batches = self.batches.lock().unwrap();
                batches.push((file, None));
                let number = batches.len() - 1;
                drop(batches);
                if self.deaf.swap(false, Ordering::SeqCst) {
                    return None;
                }
                self.batch(number)
            }
            ("GET", ["batches"]) => {
                let count = self.batches.lock().unwrap().len();
                let all: Vec<Value> = (0..count).rev().map(|n| self.batch(n)).collect();
                json!({"object": "list", "data": all, "has_more": false})
            }
            ("GET", ["batches", id]) => {
                self.looks.fetch_add(1, Ordering::SeqCst);
                let number = id.strip_prefix("batch_")?.parse().ok()?;
                if self.open.load(Ordering::SeqCst) {
                    self.work(number);
                }
                self.batch(number)
            }
            ("GET", ["files", id, "content"]) => return write(stream, &self.file(id)),
            _ => return None,
        };
        write(stream, &reply.to_string())
    }

    fn keep(&self, text: String) -> String {
        let mut files = self.files.lock().unwrap();
        files.push(text);
        format!("file_{}", files.len() - 1)
    }

    fn file(&self, id: &str) -> String {
        let number: usize = id.strip_prefix("file_").unwrap().parse().unwrap();
        self.files.lock().unwrap()[number].clone()
    }

    fn batch(&self, number: usize) -> Value {
        let (input, output) = self.batches.lock().unwrap()[number].clone();
        let total = self.file(&input).lines().count();
        let status = if output.is_some() {
            "completed"
        } else {
            "in_progress"
        };
        json!({
            "id": format!("batch_{number}"), "object": "batch", "status": status,
            "endpoint": "/v1/chat/completions", "input_file_id": input, "output_file_id": output,
            "error_file_id": null, "errors": null,
            "request_counts": {"total": total, "completed": 0, "failed": 0},
        })
    }

    /// Answers a batch, last line first: answers come in any order.
    fn work(&self, number: usize) {
        let (input, output) = self.batches.lock().unwrap()[number].clone();
        if output.is_some() {
            return;
        }
        let mut lines = String::new();
        for line in self.file(&input).lines().rev() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["url"], "/v1/chat/completions");
            let query = query(&line["body"]).to_owned();
            let mut answer = (self.spoilt)(&query).unwrap_or_else(|| {
                *self.answers.lock().unwrap().entry(query).or_default() += 1;
                let call = client().post(&self.upstream).json(&line["body"]);
                let answer: Value = call.send().unwrap().json().unwrap();
                json!({"response": {"status_code": 200, "body": answer}, "error": null})
            });
            answer["custom_id"] = line["custom_id"].clone();
            lines += &format!("{answer}\n");
        }
        let output = self.keep(lines);
        self.batches.lock().unwrap()[number].1 = Some(output);
    }
}

/// The text of the part `file` of a form.
fn file_in(head: &str, body: &[u8]) -> Option<String> {
    let boundary = head.split("boundary=").nth(1)?.lines().next()?.trim();
    let text = String::from_utf8_lossy(body);
    let part = text
        .split(&format!("--{boundary}"))
        .find(|part| part.contains("name=\"file\""))?;
    let (_, content) = part.split_once("\r\n\r\n")?;
    Some(content.strip_suffix("\r\n")?.to_owned())
}

fn read_request(stream: &TcpStream) -> Option<(String, Vec<u8>)> {
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
    let length = length.map_or(Some(0), |text| text.trim().parse().ok())?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, body))
}

fn write(mut stream: &TcpStream, body: &str) -> Option<()> {
    let length = body.len();
    let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(text.as_bytes()).ok()
}
