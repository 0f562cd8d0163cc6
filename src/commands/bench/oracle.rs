//! A server of chat completions on loopback that answers every request at once with the same
//! text: what is left of the time is flowrun's own. Only benches start it.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Bytes;
use axum::routing::post;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

/// The server; it ends when this is dropped.
pub(super) struct Oracle {
    url: String,
    calls: Arc<AtomicU64>,
    _runtime: Runtime,
}

impl Oracle {
    /// Starts it, with the text of its answers.
    pub(super) fn start(text: &str) -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let url = format!("http://{}/v1", listener.local_addr()?);
        let answer = json!({
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 60, "completion_tokens": 3},
        });
        let calls = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&calls);
        // The body is read, so that the connection is good for the next request.
        let answered = move |_body: Bytes| {
            counted.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Json(answer.clone()))
        };
        let routes = Router::new().route("/v1/chat/completions", post(answered));
        runtime.spawn(async move {
            // It accepts until the runtime ends.
            let _ = axum::serve(listener, routes).await;
        });
        Ok(Self {
            url,
            calls,
            _runtime: runtime,
        })
    }

    /// The base URL of its API.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Requests since the last time.
    pub(super) fn calls(&self) -> u64 {
        self.calls.swap(0, Ordering::Relaxed)
    }
}
