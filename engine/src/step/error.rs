//! [`StepError`]: how a step fails.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// What kind of failure it was: decides retry and exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepErrorKind {
    /// Input or params are wrong (exit 4 at run time, 3 when found before the run).
    Invalid,
    /// The work failed (exit 4).
    Failed,
    /// It may work when tried again (network, busy server).
    Transient,
    /// A gate (`expect:`, smoke test) was not met (exit 5).
    Gate,
    /// The run was asked to stop (exit 130).
    Cancelled,
    /// Nothing failed: what a step depends on is known only when a run fetches it. Of
    /// [`Step::observe`](super::Step::observe) alone.
    Unseen,
}

/// A step's failure.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// Decides retry and exit code.
    pub kind: StepErrorKind,
    /// What went wrong and where.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl StepError {
    /// An error of the given kind.
    #[must_use]
    pub fn new(kind: StepErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            help: None,
        }
    }
    /// Wrong input or params.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StepErrorKind::Invalid, message)
    }
    /// The work failed.
    #[must_use]
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(StepErrorKind::Failed, message)
    }
    /// The run was asked to stop.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(StepErrorKind::Cancelled, "stopped before it finished")
    }
    /// What `name` holds is known only when a run fetches it.
    #[must_use]
    pub fn unseen(name: &str) -> Self {
        let text = format!("`{name}` is not on this machine: a run looks at it first");
        Self::new(StepErrorKind::Unseen, text)
    }
    /// An input or output error on `path`.
    #[must_use]
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::failed(format!("{}: {error}", path.display()))
    }
    /// The same error with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}
