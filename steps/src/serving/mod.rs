//! The embedded model as a server uses it: requests come and go while one batch runs, adapters
//! are loaded when they are asked for.
//!
//! | file | what |
//! |---|---|
//! | `engine` | the thread that computes |
//! | `adapters` | which models there are; the adapters in memory |
//! | `absent` | stands for both where the embedded model was left out of the build |
//!
//! Knows no HTTP.

#[cfg(not(feature = "model"))]
mod absent;
#[cfg(feature = "model")]
mod adapters;
#[cfg(feature = "model")]
mod engine;

#[cfg(not(feature = "model"))]
pub use absent::{Engine, EngineLm, Loaded};
#[cfg(feature = "model")]
pub use adapters::Loaded;
#[cfg(feature = "model")]
pub use engine::{Engine, EngineLm};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use flowrun_lm::lm::{Choices, FinishReason, LmError, Message, Sampling};
use serde_json::Value;

use crate::models::EmbeddedSpec;

/// What to serve, and within which bounds.
pub struct EngineSpec<'a> {
    /// The base model.
    pub model: &'a EmbeddedSpec,
    /// Its id.
    pub base_id: String,
    /// An adapter that always stays: its id and its folder.
    pub pinned: Option<(String, PathBuf)>,
    /// The only folders that adapters may come from. Each adapter is a folder in one of them.
    pub folders: Vec<PathBuf>,
    /// Adapters from `folders` that stay in memory; what was unused longest goes first.
    pub keep: usize,
    /// Rows that are decoded together.
    pub batch: usize,
    /// Requests that wait at most.
    pub queue: usize,
    /// Hears of every step of the batch, on the thread that computes.
    pub on_step: Box<dyn Fn(&Step) + Send>,
}

/// One step of the batch.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Rows that took part.
    pub rows: usize,
    /// How long it took.
    pub took: Duration,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What is said.
    pub prompt: Prompt,
    /// What the chat template is told besides what the model's checkpoint or entry says; wins over
    /// that.
    pub chat_template_kwargs: BTreeMap<String, Value>,
    /// How to draw tokens.
    pub sampling: Sampling,
    /// Draws come from the likeliest tokens that have this share of the probability together.
    pub top_p: f64,
    /// Log-probabilities of each token and of this many alternatives.
    pub logprobs: Option<usize>,
    /// Restricts a part of the answer.
    pub choices: Option<Choices>,
}

/// What a model goes on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, whose last message it answers.
    Chat(Vec<Message>),
    /// A text as it is.
    Text(String),
}

/// What is heard of a request.
#[derive(Debug)]
pub enum Event {
    /// More of the answer.
    Piece(Piece),
    /// The end; nothing follows.
    End(Result<Ended, LmError>),
}

/// A part of an answer, as it comes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// Text; may be empty.
    pub text: String,
    /// How likely the token was, where that was asked for.
    pub token: Option<TokenProb>,
}

/// A token, or a whole choice, with its log-probability.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenProb {
    /// Its text.
    pub text: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest ones in its place, in order.
    pub top: Vec<(String, f32)>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// Why.
    pub finish: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Of them, those that were computed for another request.
    pub cached_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// With [`Choices`]: probability of each value, in the order given.
    pub choice_probs: Option<Vec<f32>>,
}

/// A model that can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelEntry {
    /// Its id: the base model's, or `base:adapter`.
    pub id: String,
    /// The base model's id, for an adapter.
    pub parent: Option<String>,
    /// Whether it is in memory.
    pub loaded: bool,
}

/// Why a model or an adapter is not to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelsError {
    /// There is none of that name.
    #[error("the model `{0}` does not exist here")]
    Unknown(String),
    /// The name or the path is not allowed.
    #[error("{0}")]
    Forbidden(String),
    /// The name is in use.
    #[error("the adapter `{0}` has already been loaded")]
    Taken(String),
    /// So many names are in use.
    #[error("{0} adapters have a name already; unload one first")]
    Full(usize),
    /// The files are no adapter for this base model.
    #[error("{0}")]
    Unusable(String),
    /// The device has too little memory for it.
    #[error("{0}")]
    NoRoom(String),
    /// The device failed.
    #[error("{0}")]
    Down(String),
}
