//! [`Batched`]: a model behind OpenAI's Batch API: the requests go up as one file, the answers come
//! down as another, within a day and at a lower price.
//!
//! An order is written down before it is placed and until its answers are there, so that a killed
//! run waits for the same batch, also when it did not hear that it was made. Invariant: a request
//! is in one batch of those that may still answer it.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use flowrun_cache::Digest;
use reqwest::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::retry::{self, Failure};
use super::{Api, ApiError, OpenAiSpec, fitting, model_id, wire};
use crate::lm::{Completion, Ledger, Lm, LmError, OnAnswer, Refused, Request, Spending, Taken};

type Answer = Result<Completion, LmError>;

/// Requests of a batch, and bytes of its file, that OpenAI takes.
const MOST_REQUESTS: usize = 50_000;
const MOST_BYTES: usize = 190 << 20;
/// Waits between looks: the first, and the longest.
const FIRST_LOOK: Duration = Duration::from_millis(500);
const LONGEST_LOOK: Duration = Duration::from_secs(60);
/// Batches in a page of the list.
const PAGE: &str = "100";
/// Where the order stands while its answers are not here.
const ORDER: &str = "order.json";
/// What goes up.
const REQUESTS: &str = "requests.jsonl";

/// Hears how a batch goes on: requests done, of how many, and in words.
pub type Told = Box<dyn Fn(u64, u64, &str) + Send + Sync>;

/// A model whose requests are answered batch by batch.
pub struct Batched {
    id: String,
    spec: OpenAiSpec,
    api: Api,
    ledger: Option<Ledger>,
    folder: PathBuf,
    told: Told,
    /// One order at a time.
    turn: Mutex<()>,
}

/// A batch that was, or is about to be, ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    /// Its file at the server.
    file: String,
    /// Its id, once that was heard.
    batch: Option<String>,
}

/// Requests by name, and their answers.
struct Job<'a> {
    requests: &'a [Request],
    places: BTreeMap<String, usize>,
    answers: Vec<Option<Answer>>,
    on_answer: &'a OnAnswer<'a>,
}

impl Job<'_> {
    fn answer(&mut self, at: usize, answer: Answer) {
        if self.answers[at].is_none() {
            (self.on_answer)(at, &answer);
            self.answers[at] = Some(answer);
        }
    }

    fn open(&self) -> Vec<usize> {
        let places = self.places.values().copied();
        let mut open: Vec<usize> = places.filter(|at| self.answers[*at].is_none()).collect();
        open.sort_unstable();
        open
    }
}

impl Batched {
    /// A client; nothing is sent yet. `folder` outlives a kill; `told` hears how a batch goes on.
    #[must_use]
    pub fn new(
        spec: &OpenAiSpec,
        api: Api,
        folder: PathBuf,
        ledger: Option<Ledger>,
        told: Told,
    ) -> Self {
        Self {
            id: model_id(spec),
            spec: spec.clone(),
            api,
            ledger,
            folder,
            told,
            turn: Mutex::default(),
        }
    }

    fn answer_all(&self, job: &mut Job<'_>) -> Result<(), LmError> {
        // That of a run that was cut short.
        if let Some(order) = self.placed()? {
            self.collect(&order, job)?;
            self.forget()?;
        }
        loop {
            let open = job.open();
            if open.is_empty() {
                return Ok(());
            }
            let taken = self.afford(job, &open)?;
            let (text, count) = self.file(job, &taken);
            let order = self.place(&text)?;
            let end = self.collect(&order, job)?;
            self.forget()?;
            for (place, (at, part)) in taken.into_iter().enumerate() {
                settle(part, job.answers[at].as_ref());
                if place < count {
                    let why = format!("{end} without an answer");
                    job.answer(at, Err(LmError::Unavailable(why)));
                }
            }
        }
    }

    /// As many requests as the budget has place for, each with its worst case.
    fn afford(
        &self,
        job: &Job<'_>,
        open: &[usize],
    ) -> Result<Vec<(usize, Option<Taken<'_>>)>, LmError> {
        let Some(ledger) = &self.ledger else {
            return Ok(open.iter().map(|at| (*at, None)).collect());
        };
        let broken = |e: io::Error| {
            LmError::Barred(format!("the ledger of the model's `budget` fails: {e}"))
        };
        let mut taken = Vec::new();
        for at in open {
            let need = wire::worst_case(&self.spec, &job.requests[*at]);
            let told = match ledger.take(need).map_err(broken)? {
                Ok(part) => {
                    taken.push((*at, Some(part)));
                    continue;
                }
                Err(Refused::Spent(told)) => told,
                Err(Refused::Later) => ledger.stuck(need).map_err(broken)?,
            };
            if taken.is_empty() {
                return Err(super::spent(&self.spec.model, &told));
            }
            break;
        }
        Ok(taken)
    }

    /// The file of the first requests that a batch takes, and how many they are.
    fn file(&self, job: &Job<'_>, taken: &[(usize, Option<Taken<'_>>)]) -> (String, usize) {
        let mut text = String::new();
        let mut count = 0;
        for (at, _) in taken.iter().take(MOST_REQUESTS) {
            let request = &job.requests[*at];
            let line = json!({
                "custom_id": name(&self.id, request),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": wire::body(&self.spec, request),
            });
            let line = line.to_string();
            if count > 0 && text.len() + line.len() > MOST_BYTES {
                break;
            }
            text += &line;
            text.push('\n');
            count += 1;
        }
        (text, count)
    }

    /// Orders a batch.
    fn place(&self, text: &str) -> Result<Order, LmError> {
        let path = self.folder.join(REQUESTS);
        std::fs::create_dir_all(&self.folder)
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|e| LmError::Rejected(format!("{}: {e}", path.display())))?;
        let file = self.api.upload(&["files"], &path, &[("purpose", "batch")]);
        let mut order = Order {
            file: text_of(&file.map_err(failed)?, "id")?,
            batch: None,
        };
        self.write(&order)?;
        let body = json!({
            "input_file_id": order.file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        });
        let batch = self.api.post(&["batches"], &body).map_err(failed)?;
        order.batch = Some(text_of(&batch, "id")?);
        self.write(&order)?;
        Ok(order)
    }

    /// The order that was written down, if the server made a batch of it.
    fn placed(&self) -> Result<Option<Order>, LmError> {
        let path = self.folder.join(ORDER);
        let order = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(LmError::Rejected(format!("{}: {e}", path.display()))),
        };
        let unreadable = |e| LmError::Rejected(format!("{}: {e}", path.display()));
        let order: Order = serde_json::from_slice(&order).map_err(unreadable)?;
        if order.batch.is_some() {
            return Ok(Some(order));
        }
        // It may have been made without our hearing of it.
        let mut after = String::new();
        loop {
            let mut query = vec![("limit", PAGE)];
            if !after.is_empty() {
                query.push(("after", &after));
            }
            let page = self.api.get(&["batches"], &query).map_err(failed)?;
            let all = page["data"].as_array().map_or(&[][..], Vec::as_slice);
            let ours = all
                .iter()
                .find(|batch| batch["input_file_id"] == order.file.as_str());
            if let Some(batch) = ours {
                let batch = Some(text_of(batch, "id")?);
                return Ok(Some(Order { batch, ..order }));
            }
            let last = all.last().filter(|_| page["has_more"] == true);
            match last {
                Some(last) => after = text_of(last, "id")?,
                None => return Ok(None),
            }
        }
    }

    /// Waits for a batch and takes its answers; says how it ended.
    fn collect(&self, order: &Order, job: &mut Job<'_>) -> Result<String, LmError> {
        let id = order.batch.as_deref().unwrap_or_default();
        let mut wait = FIRST_LOOK;
        let batch = loop {
            let batch = match self.api.get(&["batches", id], &[]) {
                Ok(batch) => batch,
                Err(error) if error.status() == Some(404) => {
                    return Ok(format!(
                        "the server does not know the batch `{id}` any more, it is gone"
                    ));
                }
                Err(error) => return Err(failed(error)),
            };
            let status = text_of(&batch, "status")?;
            let counts = &batch["request_counts"];
            let count = |name: &str| counts[name].as_u64().unwrap_or(0);
            let text = format!("batch {id}: {status}");
            (self.told)(count("completed") + count("failed"), count("total"), &text);
            if ["completed", "failed", "expired", "cancelled"].contains(&status.as_str()) {
                break batch;
            }
            self.api.pause(wait).map_err(failed)?;
            wait = wait.mul_f64(1.5).min(LONGEST_LOOK);
        };
        for name in ["output_file_id", "error_file_id"] {
            if let Some(file) = batch[name].as_str() {
                let text = self.api.text(&["files", file, "content"]).map_err(failed)?;
                for line in text.lines().filter(|line| !line.trim().is_empty()) {
                    self.line(line, job)?;
                }
            }
        }
        let status = text_of(&batch, "status")?;
        let why = batch
            .pointer("/errors/data/0/message")
            .and_then(Value::as_str);
        if let ("failed", Some(why)) = (status.as_str(), why) {
            return Err(LmError::Rejected(format!(
                "the server refused the batch `{id}`: {why}"
            )));
        }
        Ok(format!("the batch `{id}` ended as {status}"))
    }

    /// One answer.
    fn line(&self, line: &str, job: &mut Job<'_>) -> Result<(), LmError> {
        let unreadable =
            |e| LmError::Unavailable(format!("a line of the batch's answers is no JSON: {e}"));
        let line: Value = serde_json::from_str(line).map_err(unreadable)?;
        // Another run has asked for more than this one needs.
        let Some(at) = line["custom_id"]
            .as_str()
            .and_then(|id| job.places.get(id).copied())
        else {
            return Ok(());
        };
        let answer = self.read(&line, &job.requests[at]);
        job.answer(at, answer);
        Ok(())
    }

    fn read(&self, line: &Value, request: &Request) -> Answer {
        let shown = "the batch";
        if let Some(message) = line.pointer("/error/message").and_then(Value::as_str) {
            return Err(LmError::Unavailable(format!("{shown}: {message}")));
        }
        let body = line["response"]["body"].to_string();
        let status = line["response"]["status_code"].as_u64().unwrap_or(200);
        let status = u16::try_from(status)
            .ok()
            .and_then(|n| StatusCode::from_u16(n).ok());
        let status = status.unwrap_or(StatusCode::OK);
        let read = if status.is_success() {
            wire::completion(body.as_bytes())
                .map_err(|why| Failure::Unreadable { why })
                .and_then(|answer| fitting(&self.spec, shown, request, answer))
        } else {
            let why = wire::error_text(body.as_bytes());
            let code = wire::error_code(body.as_bytes());
            let code = code.as_deref();
            Err(retry::of_status(
                status, &why, code, None, shown, &self.spec,
            ))
        };
        match read {
            Err(Failure::Withheld) => Ok(wire::withheld()),
            read => read.map_err(|failure| failure.into_error(shown, "batch")),
        }
    }

    fn write(&self, order: &Order) -> Result<(), LmError> {
        let path = self.folder.join(ORDER);
        let part = path.with_extension("part");
        std::fs::write(&part, json!(order).to_string())
            .and_then(|()| std::fs::rename(&part, &path))
            .map_err(|e| LmError::Rejected(format!("{}: {e}", path.display())))
    }

    fn forget(&self) -> Result<(), LmError> {
        let path = self.folder.join(ORDER);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(LmError::Rejected(format!("{}: {e}", path.display())))
            }
            _ => Ok(()),
        }
    }
}

impl Lm for Batched {
    fn id(&self) -> &str {
        &self.id
    }

    fn complete(&self, requests: &[Request], on_answer: &OnAnswer<'_>) -> Vec<Answer> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let named = requests.iter().enumerate();
        let mut job = Job {
            requests,
            places: named.map(|(at, r)| (name(&self.id, r), at)).collect(),
            answers: requests.iter().map(|_| None).collect(),
            on_answer,
        };
        let ended = self.answer_all(&mut job);
        let error = ended.err().unwrap_or(LmError::Cancelled);
        for (at, request) in requests.iter().enumerate() {
            // An equal request has the answer of its twin.
            let twin = job.places.get(&name(&self.id, request)).copied();
            let answer = twin.and_then(|twin| job.answers[twin].clone());
            job.answer(at, answer.unwrap_or_else(|| Err(error.clone())));
        }
        job.answers.into_iter().flatten().collect()
    }
}

/// What a request is called in a batch.
fn name(model: &str, request: &Request) -> String {
    Digest::of_record("batch-request", &json!([model, request])).to_hex()
}

fn settle(part: Option<Taken<'_>>, answer: Option<&Answer>) {
    match (part, answer) {
        (Some(part), Some(Ok(answer))) => part.answered(Spending::of(answer)),
        (Some(part), _) => part.refused(),
        (None, _) => {}
    }
}

fn text_of(object: &Value, name: &str) -> Result<String, LmError> {
    object[name].as_str().map(str::to_owned).ok_or_else(|| {
        let shown = wire::shown(object.to_string().as_bytes());
        LmError::Rejected(format!("the server's batch API gave no `{name}`: {shown}"))
    })
}

fn failed(error: ApiError) -> LmError {
    match error {
        ApiError::Cancelled => LmError::Cancelled,
        error if error.may_pass() => LmError::Unavailable(error.to_string()),
        error if matches!(error.status(), Some(400 | 404 | 405)) => LmError::Barred(format!(
            "{error}; where the server has no batch API, leave out `batch`"
        )),
        error => LmError::Barred(error.to_string()),
    }
}
