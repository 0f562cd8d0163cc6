//! OpenAI's files and batches on loopback, over a real server that answers the requests. Counts the
//! batches, and the answers to each query.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::http::Request;
use crate::oracle::query;
use crate::receiver::Receiver;
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
        let server = Receiver::start(move |_, sent| match shared.answer(sent) {
            Some(body) => (200, body),
            None => (0, String::new()),
        });
        let url = format!("{}/v1", server.url);
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
    fn answer(&self, sent: &Request) -> Option<String> {
        let path = sent.place().strip_prefix("/v1/")?;
        let parts: Vec<&str> = path.split('/').collect();
        let reply = match (sent.method.as_str(), parts.as_slice()) {
            ("POST", ["files"]) => {
                json!({"id": self.keep(file_in(sent)?), "object": "file"})
            }
            ("POST", ["batches"]) => {
                let order: Value = serde_json::from_slice(&sent.body).ok()?;
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
            ("GET", ["files", id, "content"]) => return Some(self.file(id)),
            _ => return None,
        };
        Some(reply.to_string())
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
fn file_in(sent: &Request) -> Option<String> {
    let boundary = sent.headers["content-type"].split("boundary=").nth(1)?;
    let text = String::from_utf8_lossy(&sent.body);
    let part = text
        .split(&format!("--{boundary}"))
        .find(|part| part.contains("name=\"file\""))?;
    let (_, content) = part.split_once("\r\n\r\n")?;
    Some(content.strip_suffix("\r\n")?.to_owned())
}
