//! `requests_per_minute` and `tokens_per_minute` before a server that enforces the same limits: what
//! they allow is not refused, and no row is lost.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::{Value, json};

use crate::label_job::{all_there, project, run};
use crate::receiver::Receiver;

const ROWS: usize = 60;
/// Refusals that a busy machine may cause, where requests that were sent apart arrive together.
const FEW: usize = ROWS / 10;

/// What an account may use: a bucket that fills steadily.
struct Account {
    per_second: f64,
    /// A second's worth, and half a second's for what the way here delays.
    capacity: f64,
    level: f64,
    at: Instant,
    served: usize,
    refused: usize,
}

impl Account {
    fn new(per_minute: u32) -> Self {
        let per_second = f64::from(per_minute) / 60.0;
        let capacity = 1.5 * per_second;
        Self {
            per_second,
            capacity,
            level: capacity,
            at: Instant::now(),
            served: 0,
            refused: 0,
        }
    }

    fn serves(&mut self, cost: f64) -> bool {
        let now = Instant::now();
        let passed = now.duration_since(self.at).as_secs_f64();
        self.at = now;
        self.level = (self.level + passed * self.per_second).min(self.capacity);
        let serves = self.level >= cost;
        match serves {
            true => {
                self.level -= cost;
                self.served += 1;
            }
            false => self.refused += 1,
        }
        serves
    }
}

/// Tokens of a prompt and of its answer. The client guesses the prompt's from its length, and does
/// not know of the template or of the answer.
fn tokens(body: &Value) -> (u32, u32) {
    let messages = body["messages"].as_array().unwrap().iter();
    let chars = messages.map(|message| message["content"].as_str().unwrap().chars().count());
    let text = u32::try_from(chars.sum::<usize>()).unwrap();
    (text.div_ceil(4) + 3, 2)
}

/// A server whose account has this limit; `cost` of a request by its tokens.
fn serve(per_minute: u32, cost: fn(u32) -> f64) -> (String, Arc<Mutex<Account>>) {
    let account = Arc::new(Mutex::new(Account::new(per_minute)));
    let kept = Arc::clone(&account);
    let server = Receiver::start(move |_, sent| {
        let body = sent.json();
        let (prompt, answer) = tokens(&body);
        if !kept.lock().unwrap().serves(cost(prompt + answer)) {
            let error = json!({"message": "slow down", "code": "rate_limit_exceeded"});
            return (429, json!({ "error": error }).to_string());
        }
        let completion = json!({
            "model": body["model"],
            "choices": [{
                "message": {"role": "assistant", "content": "pin"}, "finish_reason": "stop",
            }],
            "usage": {"prompt_tokens": prompt, "completion_tokens": answer},
        });
        (200, completion.to_string())
    });
    (format!("{}/v1", server.url), account)
}

/// Labels all rows; served and refused requests.
fn asked(per_minute: u32, cost: fn(u32) -> f64, limit: &str) -> (usize, usize) {
    let (url, account) = serve(per_minute, cost);
    let project = project(ROWS, &url, "m", limit);
    project.edit("p.yaml", "concurrency: 1", "concurrency: 64");
    // Long enough that the guess of a prompt's tokens is near the truth.
    let instructions = "Sort it into one of the labels. ".repeat(8);
    let long = format!("instructions: {}", instructions.trim());
    project.edit("p.yaml", "instructions: Sort.", &long);
    run(&project).ok();
    all_there(&project, ROWS);
    let account = account.lock().unwrap();
    (account.served, account.refused)
}

#[test]
fn limits_per_minute_keep_to_what_a_server_allows() {
    let one: fn(u32) -> f64 = |_| 1.0;
    let of_tokens: fn(u32) -> f64 = f64::from;
    std::thread::scope(|scope| {
        for (field, per_minute, cost) in [
            ("requests_per_minute", 1_200, one),
            ("tokens_per_minute", 90_000, of_tokens),
        ] {
            scope.spawn(move || {
                let limit = format!(", {field}: {per_minute}");
                let (served, refused) = asked(per_minute, cost, &limit);
                assert_eq!(served, ROWS, "{field}: each row is answered once");
                assert!(refused <= FEW, "{field}: {refused} refused");
                // Without it, this very server refuses many.
                let (_, refused) = asked(per_minute, cost, "");
                assert!(refused > FEW, "without {field}: {refused} refused");
            });
        }
    });
}
