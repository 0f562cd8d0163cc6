//! [`Batched`]: a model behind OpenAI's Batch API: the requests go up as one file, the answers come
//! down as another, within a day and at a lower price.
//!
//! An order is written down before it is placed and until its answers are there, so that a killed
//! run waits for the same batch, also when it did not hear that it was made. Answers to requests
//! that the run has not asked again yet are kept beside it until it does. Invariants: a request is
//! in one batch of those that may still answer it; an answer that came is not ordered again.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use flowrun_cache::Digest;
use serde_json::{Value, json};

use self::folder::Folder;
use self::lines::{Charge, is_answer};
use self::orders::Ended;
use super::identity::{Identity, OnWarning};
use super::{Api, ApiError, OpenAiSpec, model_id, wire};
use crate::lm::{Completion, Ledger, Lm, LmError, OnAnswer, Patience, Refused, Request, Taken};

mod folder;
mod lines;
mod orders;
#[cfg(test)]
mod tests;

type Answer = Result<Completion, LmError>;

/// Requests of a batch, and bytes of its file, that OpenAI takes.
const MOST_REQUESTS: usize = 50_000;
const MOST_BYTES: usize = 190 << 20;
const OPENAI: &str = "https://api.openai.com/";
/// Bytes that other servers take, `flowrun serve` among them (64 MiB, the form around the file
/// included).
const MOST_BYTES_ELSEWHERE: usize = 60 << 20;
/// Waits between looks: the first, and the longest.
const FIRST_LOOK: Duration = Duration::from_millis(500);
const LONGEST_LOOK: Duration = Duration::from_secs(60);
/// How long a batch may take: a budget that other batches hold back is waited for so long.
const WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// Hears how a batch goes on: requests done, of how many, and in words.
pub type Told = Box<dyn Fn(u64, u64, &str) + Send + Sync>;

/// A model whose requests are answered batch by batch.
pub struct Batched {
    id: String,
    spec: OpenAiSpec,
    api: Api,
    ledger: Option<Ledger>,
    folder: Folder,
    told: Told,
    identity: Identity,
    /// Why answers cannot be kept.
    barred: OnceLock<LmError>,
    /// One order at a time.
    turn: Mutex<()>,
}

/// Requests by name, and their answers.
struct Job<'a> {
    requests: &'a [Request],
    places: BTreeMap<String, usize>,
    answers: Vec<Option<Answer>>,
    charges: Vec<Charge>,
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
            folder: Folder(folder),
            told,
            identity: Identity::new(spec),
            barred: OnceLock::new(),
            turn: Mutex::default(),
        }
    }

    /// The same client, which tells `on_warning` when another model answers than was asked for.
    #[must_use]
    pub fn warning(mut self, on_warning: Option<OnWarning>) -> Self {
        self.identity = self.identity.told_to(on_warning);
        self
    }

    /// Answers that cannot be kept are still at the server: what was written down of them stays,
    /// and nothing is ordered.
    fn unless_barred(&self) -> Result<(), LmError> {
        self.barred.get().map_or(Ok(()), |why| Err(why.clone()))
    }

    fn answer_all(&self, job: &mut Job<'_>) -> Result<(), LmError> {
        self.take_kept(job)?;
        // That of a run that was cut short; what it did not answer is ordered anew.
        if let Some(order) = self.placed()? {
            let ended = self.collect(&order)?;
            self.hand_out(&ended, job, false)?;
            self.unless_barred()?;
            self.folder.forget_order()?;
        }
        loop {
            let open = job.open();
            if open.is_empty() {
                return Ok(());
            }
            let mut taken = self.afford(job, &open)?;
            let (text, count) = self.file(job, &taken);
            give_back(taken.split_off(count));
            let order = match self.place(&text) {
                Ok(order) => order,
                Err(error) => {
                    // After an outage, nobody knows what became of it.
                    if matches!(error, LmError::Barred(_)) {
                        give_back(taken);
                        self.folder.forget_order()?;
                    }
                    return Err(error);
                }
            };
            let ended = self.collect(&order)?;
            let whole = self.hand_out(&ended, job, true)?;
            if self.barred.get().is_none() {
                self.folder.forget_order()?;
            }
            if ended.refused {
                give_back(taken);
                // All of it, whatever is in it.
                return Err(LmError::Barred(ended.told));
            }
            for (at, part) in taken {
                let charge = match &job.answers[at] {
                    None if ended.gone || !whole => Charge::Used(None),
                    _ => job.charges[at],
                };
                settle(part, charge);
                let why = format!("{} without an answer", ended.told);
                job.answer(at, Err(LmError::Unavailable(why)));
            }
            self.unless_barred()?;
        }
    }

    /// Answers requests by what an earlier order has answered.
    fn take_kept(&self, job: &mut Job<'_>) -> Result<(), LmError> {
        let mut kept = self.folder.kept()?;
        if kept.is_empty() {
            return Ok(());
        }
        kept.retain(|name, line| {
            let Some(at) = job.places.get(name).copied() else {
                return true;
            };
            if let Ok(line) = serde_json::from_str::<Value>(line) {
                let (answer, _) = self.read(&line, &job.requests[at]);
                job.answer(at, answer);
            }
            false
        });
        self.unless_barred()?;
        self.folder.keep(&kept)
    }

    /// Answers requests by the lines of a batch, and keeps the answers to others. What a batch that
    /// is not this call's `own` gave no answer to, for nothing, stays open. Says whether all could
    /// be read.
    fn hand_out(&self, ended: &Ended, job: &mut Job<'_>, own: bool) -> Result<bool, LmError> {
        let mut others = BTreeMap::new();
        let mut whole = true;
        for text in ended.lines.lines().filter(|line| !line.trim().is_empty()) {
            let line: Value = serde_json::from_str(text).unwrap_or_default();
            let Some(name) = line["custom_id"].as_str() else {
                whole = false;
                continue;
            };
            let Some(at) = job.places.get(name).copied() else {
                if is_answer(&line) {
                    others.insert(name.to_owned(), text.to_owned());
                }
                continue;
            };
            let (answer, charge) = self.read(&line, &job.requests[at]);
            job.charges[at] = charge;
            // What was paid for and cannot be used is not paid for again before somebody has seen it.
            if own || answer.is_ok() || matches!(charge, Charge::Used(_)) {
                job.answer(at, answer);
            }
        }
        if !others.is_empty() {
            let mut kept = self.folder.kept()?;
            kept.append(&mut others);
            self.folder.keep(&kept)?;
        }
        Ok(whole)
    }

    /// As many requests as the budget has place for, each with its worst case. While other batches
    /// hold back so much that there is place for none, it waits for them.
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
        let model = &self.spec.model;
        let mut taken = Vec::new();
        let mut patience = Patience::new(WINDOW);
        let mut wait = FIRST_LOOK;
        for at in open.iter().take(MOST_REQUESTS) {
            let need = wire::worst_case(&self.spec, &job.requests[*at]);
            loop {
                match ledger.take(need).map_err(broken)? {
                    Ok(part) => {
                        taken.push((*at, Some(part)));
                        break;
                    }
                    Err(_) if !taken.is_empty() => return Ok(taken),
                    Err(Refused::Spent(told)) => return Err(super::spent(model, &told)),
                    Err(Refused::Later(held)) if patience.is_over(ledger, held) => {
                        let told = ledger.stuck(need).map_err(broken)?;
                        return Err(super::held_back(model, &told));
                    }
                    Err(Refused::Later(_)) => {
                        let text = "waits for other batches, which hold back the model's `budget`";
                        (self.told)(0, open.len() as u64, text);
                        self.api.pause(wait).map_err(failed)?;
                        wait = longer(wait);
                    }
                }
            }
        }
        Ok(taken)
    }

    /// The file of the first requests that a batch takes, and how many they are.
    fn file(&self, job: &Job<'_>, taken: &[(usize, Option<Taken<'_>>)]) -> (String, usize) {
        let most = most_bytes(&self.spec);
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
            if count > 0 && text.len() + line.len() > most {
                break;
            }
            text += &line;
            text.push('\n');
            count += 1;
        }
        (text, count)
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
            charges: vec![Charge::Nothing; requests.len()],
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

    fn bar(&self, why: &LmError) {
        self.barred.get_or_init(|| why.clone());
    }
}

/// What a request is called in a batch.
fn name(model: &str, request: &Request) -> String {
    Digest::of_record("batch-request", &json!([model, request])).to_hex()
}

fn settle(part: Option<Taken<'_>>, charge: Charge) {
    match (part, charge) {
        (Some(part), Charge::Used(used)) => part.answered(used),
        (Some(part), Charge::Nothing) => part.refused(),
        (None, _) => {}
    }
}

/// Gives back what requests hold that were not sent.
fn give_back(taken: Vec<(usize, Option<Taken<'_>>)>) {
    for (_, part) in taken {
        settle(part, Charge::Nothing);
    }
}

fn longer(wait: Duration) -> Duration {
    wait.mul_f64(1.5).min(LONGEST_LOOK)
}

/// Bytes of a batch's file that a model's server takes.
fn most_bytes(spec: &OpenAiSpec) -> usize {
    match spec.base_url.trim_start().starts_with(OPENAI) {
        true => MOST_BYTES,
        false => MOST_BYTES_ELSEWHERE,
    }
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
