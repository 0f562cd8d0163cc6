//! What can go wrong in the embedded model.

use std::path::PathBuf;

/// An error of this crate. Every variant names the place; most name the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file of the model could not be read or written.
    #[error("cannot access `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file was read, but is not what its name says.
    #[error("`{}` is not usable: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what was expected.
        reason: String,
    },
    /// The text could not be turned into tokens, or back.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template could not be parsed or refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// A request cannot be answered. The caller knows which one: answers come one for each.
    #[error("{0}")]
    Request(String),
    /// A prompt, with what it is to be answered with, does not fit into the model's context.
    #[error("{0}")]
    TooLong(String),
    /// A row to train on does not fit the model.
    #[error("training row {}: {reason}", index + 1)]
    Row {
        /// Position of the row, counted from 0; the message counts from 1, as lines are counted.
        index: usize,
        /// What is wrong, and the remedy.
        reason: String,
    },
    /// An adapter does not fit the base model.
    #[error("adapter: {0}")]
    Adapter(String),
    /// A setting is outside its range.
    #[error("`{name}`: {reason}")]
    Config {
        /// The setting.
        name: &'static str,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// Training cannot go on from this step.
    #[error("training step {step}: {reason}")]
    Training {
        /// The step, counted from 1.
        step: usize,
        /// What happened, and the remedy.
        reason: String,
    },
    /// The GPU that was asked for cannot be had, or has too little memory for the model or for what
    /// is under way; other work may go on.
    #[error("GPU: {0}")]
    NoDevice(String),
    /// The GPU failed at work. It fails at all that follows in this process.
    #[error("GPU: {0}")]
    Device(String),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The tensor library reported an error.
    #[error("tensor: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// An [`ModelError::Io`] at `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// A [`ModelError::Format`] at `path`.
    pub fn format(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::Format {
            path: path.into(),
            reason: reason.to_string(),
        }
    }

    /// The same for another request that it struck. Where the device is not to blame, the message
    /// is all that is left.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::NoDevice(why) => Self::NoDevice(why.clone()),
            Self::Device(why) => Self::Device(why.clone()),
            other => Self::Request(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_fails_several_requests_is_to_blame_for_each() {
        let failed = ModelError::Device("lost".to_owned()).again();
        assert!(matches!(failed, ModelError::Device(why) if why == "lost"));
        let full = ModelError::NoDevice("full".to_owned()).again();
        assert!(matches!(full, ModelError::NoDevice(why) if why == "full"));
        let other = ModelError::Tokenizer("no".to_owned()).again();
        assert!(matches!(other, ModelError::Request(why) if why == "tokenizer: no"));
    }
}
