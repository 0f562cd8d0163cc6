//! [`Gate`]: what all users of an entry share within a process, such as steps that run at the same
//! time: the limits, the places of requests in flight, and the connections.
//!
//! The server counts what its account sends, not which step sends it. Invariant: a process has one
//! gate for an entry and its key, as long as anybody uses it.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::Duration;

use flowrun_cache::Digest;
use serde_json::json;
use tokio::sync::Semaphore;

use super::limits::Limits;
use super::runtime::Runtime;
use super::{CONNECT_WITHIN, OpenAiSpec};
use crate::lm::LmError;

static GATES: LazyLock<Mutex<BTreeMap<Digest, Weak<Gate>>>> = LazyLock::new(Mutex::default);

/// The way to a server.
pub(super) struct Gate {
    pub(super) limits: Limits,
    /// One for each request that may be in flight.
    pub(super) slots: Semaphore,
    pub(super) http: reqwest::Client,
    /// Kept over calls, so that connections are.
    runtime: Runtime,
}

impl Gate {
    /// The gate of an entry; `loopback` servers are reached without a proxy.
    ///
    /// # Errors
    /// [`LmError::Unavailable`] when this machine gives no threads or no TLS.
    pub(super) fn of(
        spec: &OpenAiSpec,
        key: Option<&str>,
        loopback: bool,
    ) -> Result<Arc<Self>, LmError> {
        // What a checkpoint's chat template is told is no other account.
        let entry = OpenAiSpec {
            chat_template_kwargs: Default::default(),
            ..spec.clone()
        };
        let name = Digest::of_record("gate", &json!([entry, key]));
        let mut all = GATES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = all.get(&name).and_then(Weak::upgrade) {
            return Ok(gate);
        }
        let gate = Arc::new(Self::new(spec, loopback)?);
        all.retain(|_, gate| gate.strong_count() > 0);
        all.insert(name, Arc::downgrade(&gate));
        Ok(gate)
    }

    fn new(spec: &OpenAiSpec, loopback: bool) -> Result<Self, LmError> {
        let mut builder = reqwest::Client::builder()
            .timeout(Duration::from_secs(spec.timeout_s.max(1)))
            .connect_timeout(CONNECT_WITHIN);
        if loopback {
            builder = builder.no_proxy();
        }
        let http = builder
            .build()
            .map_err(|e| LmError::Unavailable(format!("no HTTP client: {e}")))?;
        let runtime = Runtime::new("openai").map_err(LmError::Unavailable)?;
        Ok(Self {
            limits: Limits::new(spec),
            slots: Semaphore::new(spec.concurrency.clamp(1, Semaphore::MAX_PERMITS)),
            http,
            runtime,
        })
    }

    /// Runs `work` on this thread until it is done; `None` only while this is dropped.
    pub(super) fn block_on<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(work)
    }
}
