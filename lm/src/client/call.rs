//! [`Call`]: one call of a server's model that ended, for those who trace calls. Holds no prompt,
//! and no answer but how it ended and what it cost.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::lm::{Completion, LmError, Sampling};

/// One call, from its turn to its end: waits for the limits and further tries are a part of it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The model's name, as the server knows it.
    pub model: &'a str,
    /// The server.
    pub host: &'a str,
    /// Its port.
    pub port: u16,
    /// How tokens were drawn.
    pub sampling: &'a Sampling,
    /// When it began.
    pub started_at: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// How it ended.
    pub answer: &'a Result<Completion, LmError>,
}

/// Called once per call, from the thread that asks.
pub type OnCall = Arc<dyn Fn(&Call<'_>) + Send + Sync>;
