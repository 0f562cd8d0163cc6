//! A server of OpenAI's chat completions on loopback, which counts what it is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::receiver::Receiver;

/// A server that runs as long as the tests do.
pub(crate) struct Oracle {
    pub(crate) url: String,
    calls: Arc<AtomicUsize>,
}

impl Oracle {
    /// `answer` gives the text of the answer to a request's body; none refuses it with status 500.
    pub(crate) fn start(answer: impl Fn(&Value) -> Option<String> + Send + Sync + 'static) -> Self {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let server = Receiver::start(move |_, sent| {
            let Ok(body) = serde_json::from_slice::<Value>(&sent.body) else {
                return (0, String::new());
            };
            counted.fetch_add(1, Ordering::SeqCst);
            completion(answer(&body))
        });
        let url = format!("{}/v1", server.url);
        Self { url, calls }
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

fn completion(answer: Option<String>) -> (u16, String) {
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
    (status, body.to_string())
}
