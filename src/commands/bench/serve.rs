//! `flowrun bench serve`: a closed loop of clients against a server that is up.
//!
//! A server of a bundle is asked `POST /predict`, one of a base model `POST /v1/chat/completions`.
//! Memory and processor time are the server's own, where it runs on this machine.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::blocking::{Client, RequestBuilder};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{GlobalArgs, ServeBench};
use crate::exit::{Exit, Failure};
use crate::{output, surroundings};

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(300);
/// A refused client comes again after what the server says, but not later than this.
const AGAIN: Duration = Duration::from_secs(5);
/// Tokens of a chat's answer.
const TOKENS: u32 = 16;
/// What is asked where no texts are given; a number makes each its own.
const TEXTS: [&str; 4] = [
    "Where is my new card?",
    "How do I change my PIN?",
    "Why was I charged a fee abroad?",
    "The machine has not given me my money",
];

/// A server to measure.
struct Target {
    client: Client,
    url: String,
    key: Option<String>,
    /// The base model, where there is no program.
    model: Option<String>,
    pid: Option<u32>,
    /// Inputs of the program that take a text.
    inputs: Vec<String>,
    texts: Vec<String>,
}

/// What one number of clients saw.
#[derive(Serialize)]
struct Measured {
    clients: u16,
    seconds: f64,
    /// Queries answered.
    answered: usize,
    per_second: f64,
    /// Milliseconds that this share of them took at most (nearest rank).
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
    /// 429: the queue was full.
    refused: usize,
    /// Any other answer, or none.
    failed: usize,
    /// What the first of them said.
    failure: Option<String>,
    /// Of the server.
    cpu_ms_per_query: Option<f64>,
    /// Of the server, MB, once a minute and at the end.
    memory_mb: Vec<f64>,
    /// The most that was seen, once a second.
    memory_most_mb: Option<f64>,
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    took: Vec<Duration>,
    refused: usize,
    failed: usize,
    failure: Option<String>,
}

/// Measures a server.
#[allow(clippy::print_stderr)]
pub(crate) fn serve(args: &ServeBench, global: &GlobalArgs) -> Result<Exit, Failure> {
    let target = Target::open(args, global)?;
    let mut rows = Vec::with_capacity(args.clients.len());
    for clients in &args.clients {
        if !global.quiet && !global.json {
            eprintln!("{clients} clients for {} s", args.seconds);
        }
        rows.push(target.measure(*clients, Duration::from_secs(args.seconds)));
    }
    let failed = rows.iter().all(|row| row.answered == 0);
    match global.json {
        true => output::json(&json!({"url": target.url, "measured": rows}))?,
        false => output::print(&table(&rows))?,
    };
    match failed {
        true => Err(Failure::new(
            Exit::Internal,
            "no query was answered".to_owned(),
        )),
        false => Ok(Exit::Ok),
    }
}

impl Target {
    fn open(args: &ServeBench, global: &GlobalArgs) -> Result<Self, Failure> {
        let world = surroundings::world(Path::new("."), global)?;
        let url = args.url.trim_end_matches('/').to_owned();
        let wrong = |why: String| Failure::new(Exit::Usage, format!("{url}: {why}"));
        let client = Client::builder().no_proxy().timeout(ANSWER).build();
        let client = client.map_err(|e| wrong(e.to_string()))?;
        let health = client.get(format!("{url}/health")).send();
        let health: Value = health
            .and_then(|answer| answer.error_for_status()?.json())
            .map_err(|e| wrong(format!("it does not answer as `flowrun serve` does: {e}")))?;
        let pid = health["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok());
        let texts = match &args.texts {
            Some(path) => std::fs::read_to_string(path)?
                .lines()
                .filter(|line| !line.trim().is_empty())
                .map(str::to_owned)
                .collect(),
            None => TEXTS.map(str::to_owned).to_vec(),
        };
        if texts.is_empty() {
            return Err(wrong("there is no text to ask".to_owned()));
        }
        let mut target = Self {
            client,
            url,
            key: world.env.get("FLOWRUN_API_KEY").cloned(),
            model: None,
            pid: pid.filter(|pid| memory_mb(*pid).is_some()),
            inputs: texts_of(&health["inputs"]),
            texts,
        };
        if health["bundle"].is_null() {
            target.model = Some(target.base_model()?);
        }
        Ok(target)
    }

    fn base_model(&self) -> Result<String, Failure> {
        let request = self.with_key(self.client.get(format!("{}/v1/models", self.url)));
        let models: Value = request
            .send()
            .and_then(|answer| answer.error_for_status()?.json())
            .map_err(|e| Failure::new(Exit::Usage, format!("{}: {e}", self.url)))?;
        let id = models["data"][0]["id"].as_str();
        id.map(str::to_owned)
            .ok_or_else(|| Failure::new(Exit::Usage, format!("{}: it has no model", self.url)))
    }

    fn with_key(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    fn measure(&self, clients: u16, time: Duration) -> Measured {
        let (count, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (cpu, started) = (self.pid.and_then(cpu_time), Instant::now());
        let (seen, memory) = std::thread::scope(|scope| {
            let client = |_| scope.spawn(|| self.ask_until(&over, &count));
            let all: Vec<_> = (0..clients).map(client).collect();
            let memory = self.watch(started, time);
            over.store(true, Ordering::Relaxed);
            let seen: Vec<Seen> = all.into_iter().filter_map(|one| one.join().ok()).collect();
            (seen, memory)
        });
        let took = started.elapsed();
        let cpu = self
            .pid
            .and_then(cpu_time)
            .zip(cpu)
            .map(|(now, then)| now - then);
        measured(clients, took, seen, cpu, memory)
    }

    /// The server's memory once a second, until the time is over.
    fn watch(&self, started: Instant, time: Duration) -> Vec<f64> {
        let mut memory = Vec::new();
        while started.elapsed() < time {
            memory.extend(self.pid.and_then(memory_mb));
            let left = time.saturating_sub(started.elapsed());
            std::thread::sleep(left.min(Duration::from_secs(1)));
        }
        memory.extend(self.pid.and_then(memory_mb));
        memory
    }

    fn ask_until(&self, over: &AtomicBool, count: &AtomicUsize) -> Seen {
        let mut seen = Seen::default();
        while !over.load(Ordering::Relaxed) {
            let number = count.fetch_add(1, Ordering::Relaxed);
            let asked = Instant::now();
            let why = match self.ask(number) {
                Ok(answer) if answer.status().is_success() => match answer.bytes() {
                    Ok(_) => {
                        seen.took.push(asked.elapsed());
                        continue;
                    }
                    Err(error) => error.without_url().to_string(),
                },
                Ok(answer) if answer.status() == 429 => {
                    seen.refused += 1;
                    let after = answer.headers().get("retry-after");
                    let after = after.and_then(|text| text.to_str().ok()?.parse().ok());
                    std::thread::sleep(Duration::from_secs(after.unwrap_or(1)).min(AGAIN));
                    continue;
                }
                Ok(answer) => format!("{} {}", answer.status(), answer.text().unwrap_or_default()),
                Err(error) => error.without_url().to_string(),
            };
            seen.failed += 1;
            seen.failure.get_or_insert(why);
            // A server that is gone is not asked as fast as this machine can.
            std::thread::sleep(Duration::from_millis(100));
        }
        seen
    }

    fn ask(&self, number: usize) -> reqwest::Result<reqwest::blocking::Response> {
        let text = format!("{} ({number})", self.texts[number % self.texts.len()]);
        let (path, body) = match &self.model {
            None => {
                let given = self.inputs.iter().map(|name| (name.clone(), json!(text)));
                ("/predict", Value::Object(given.collect()))
            }
            Some(model) => {
                let messages = json!([{"role": "user", "content": text}]);
                let body = json!({"model": model, "messages": messages, "max_tokens": TOKENS});
                ("/v1/chat/completions", body)
            }
        };
        let request = self.client.post(format!("{}{path}", self.url)).json(&body);
        self.with_key(request).send()
    }
}

/// The inputs that take a text, by what the server says of them.
fn texts_of(inputs: &Value) -> Vec<String> {
    let texts = inputs.as_array().into_iter().flatten();
    let texts = texts.filter(|input| input["schema"]["type"] == "string");
    texts
        .filter_map(|input| input["name"].as_str().map(str::to_owned))
        .collect()
}

fn measured(
    clients: u16,
    time: Duration,
    seen: Vec<Seen>,
    cpu: Option<Duration>,
    memory: Vec<f64>,
) -> Measured {
    let count = |of: fn(&Seen) -> usize| seen.iter().map(of).sum();
    let (refused, failed) = (count(|seen| seen.refused), count(|seen| seen.failed));
    let failure = seen.iter().find_map(|seen| seen.failure.clone());
    let mut took: Vec<Duration> = seen.into_iter().flat_map(|seen| seen.took).collect();
    took.sort_unstable();
    let seconds = time.as_secs_f64();
    let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
    let last = memory.last().copied();
    let mut minutes: Vec<f64> = memory.iter().copied().step_by(60).collect();
    minutes.extend(last);
    Measured {
        clients,
        seconds,
        answered: took.len(),
        per_second: took.len() as f64 / seconds,
        p50_ms: ms(percentile(&took, 50)),
        p95_ms: ms(percentile(&took, 95)),
        p99_ms: ms(percentile(&took, 99)),
        refused,
        failed,
        failure,
        cpu_ms_per_query: cpu
            .filter(|_| !took.is_empty())
            .map(|cpu| cpu.as_secs_f64() * 1e3 / took.len() as f64),
        memory_mb: minutes,
        memory_most_mb: memory.into_iter().reduce(f64::max),
    }
}

/// Of sorted times, the one that `percent` % do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    let at = sorted.get(rank.saturating_sub(1));
    at.copied().unwrap_or_default()
}

fn table(rows: &[Measured]) -> String {
    let mut text = "| clients | queries | queries/s | CPU ms/query | p50 ms | p95 ms | p99 ms | 429 | failed | memory MB |\n|---|---|---|---|---|---|---|---|---|---|\n".to_owned();
    let known = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.1}"));
    for row in rows {
        let memory: Vec<String> = row.memory_mb.iter().map(|mb| format!("{mb:.0}")).collect();
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {} | {} | {} | {} | {} | {} | {} (most {}) |",
            row.clients,
            row.answered,
            row.per_second,
            known(row.cpu_ms_per_query),
            row.p50_ms,
            row.p95_ms,
            row.p99_ms,
            row.refused,
            row.failed,
            memory.join(" → "),
            known(row.memory_most_mb),
        );
    }
    for row in rows {
        if let Some(why) = &row.failure {
            let _ = writeln!(
                text,
                "\nWith {} clients the first failure was: {why}",
                row.clients
            );
        }
    }
    text
}

/// Resident memory of a process of this machine, where the system says it as Linux does.
fn memory_mb(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kb: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kb / 1024.0)
}

/// Processor time of a process and of the threads that it had.
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: fields 3 and on; utime is field 14, stime 15.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    // Linux counts for programs in hundredths of a second.
    Some(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_saw_is_added_up() {
        let ms = Duration::from_millis;
        let seen = |took: Vec<Duration>, refused| Seen {
            took,
            refused,
            ..Seen::default()
        };
        let all = vec![
            seen((1..=60).map(ms).collect(), 2),
            seen((61..=100).map(ms).collect(), 1),
        ];
        let memory = (0..90).map(f64::from).collect();
        let row = measured(2, ms(10_000), all, Some(ms(500)), memory);
        assert_eq!((row.answered, row.refused, row.failed), (100, 3, 0));
        assert_eq!((row.p50_ms, row.p95_ms, row.p99_ms), (50.0, 95.0, 99.0));
        assert_eq!(row.cpu_ms_per_query, Some(5.0));
        assert_eq!(row.memory_mb, [0.0, 60.0, 89.0]);
        assert!(table(&[row]).contains("| 2 | 100 | 10.0 | 5.0 | 50 | 95 | 99 | 3 | 0 |"));
    }

    #[test]
    fn every_input_that_takes_a_text_is_given_one() {
        let text = json!({"type": "string"});
        let said = json!([
            {"name": "text", "schema": text}, {"name": "count", "schema": {"type": "integer"}},
            {"name": "about", "schema": text},
        ]);
        assert_eq!(texts_of(&said), ["text", "about"]);
    }

    #[test]
    fn nothing_answered_is_told_as_such() {
        let row = measured(1, Duration::from_secs(1), vec![], None, vec![]);
        assert_eq!((row.answered, row.cpu_ms_per_query), (0, None));
        assert!(table(&[row]).contains("| – |"));
    }
}
