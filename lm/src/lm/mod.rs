//! [`Lm`]: a language model as prompting programs see it: chat messages and
//! sampling in; text, token counts and finish reason out. Knows no provider.

mod budget;
mod cached;
mod metered;

pub use budget::{Budget, Held, Ledger, Patience, Refused, Spending, Taken};
pub use cached::Cached;
pub use metered::{Metered, Prices, Usage};

use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The user's turn.
    User,
    /// The model's turn.
    Assistant,
}

impl Role {
    /// The word that chat formats use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One chat message, as in OpenAI's chat format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// How to draw tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 = greedy.
    pub temperature: f64,
    /// Upper bound on generated tokens.
    pub max_tokens: u32,
    /// Texts that end generation (not included in the answer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Seed for sampling, where the provider takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Distinguishes repeated samples of one prompt in the cache; never sent (DSPy's `rollout_id`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<u64>,
}

impl Default for Sampling {
    /// DSPy 2.5's defaults: greedy, 1000 tokens.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            max_tokens: 1000,
            stop: Vec::new(),
            seed: None,
            rollout: None,
        }
    }
}

/// Restricts a part of the answer to a closed list. Providers that cannot do it ignore it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choices {
    /// The restriction starts right after this text was generated (a field
    /// header such as `[[ ## label ## ]]\n`); at the very start when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The allowed texts.
    pub values: Vec<String>,
    /// Fixed text that follows the choice and ends the answer; may be empty.
    #[serde(default)]
    pub then: String,
}

/// One call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The conversation so far; the last message is the user's.
    pub messages: Vec<Message>,
    /// How to draw tokens.
    pub sampling: Sampling,
    /// Optional restriction of a part of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choices: Option<Choices>,
}

/// Characters of a token, before a server has counted.
const CHARS_PER_TOKEN: usize = 4;

/// Tokens of a prompt, roughly.
#[must_use]
pub fn prompt_tokens(request: &Request) -> u64 {
    let chars = request.messages.iter().map(|m| m.content.chars().count());
    chars.sum::<usize>().div_ceil(CHARS_PER_TOKEN) as u64
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End of turn, stop text, or the last choice.
    Stop,
    /// `max_tokens` reached.
    Length,
    /// Withheld by the provider.
    ContentFilter,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The assistant's text.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens of the prompt, as the provider counts them.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// With [`Choices`], where the provider can: probability of each value (sums to 1), in the order given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice_probs: Option<Vec<f32>>,
    /// Taken from the completion cache: nothing was computed or paid.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
}

/// Why a call failed for good (providers retry transient errors themselves).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum LmError {
    /// The server cannot be reached or kept failing.
    #[error("{0}")]
    Unavailable(String),
    /// The server had an error of its own (5xx) at every try of this request; others may be
    /// answered.
    #[error("{0}")]
    ServerError(String),
    /// This request is wrong: a field is not known.
    #[error("{0}")]
    Rejected(String),
    /// The prompt does not fit into the model's context: no fault of the model, and others may fit.
    #[error("context_length_exceeded: {0}")]
    TooLong(String),
    /// No call to the model will be answered before somebody changes something: its key, its name,
    /// the account's credit, the budget.
    #[error("{0}")]
    Barred(String),
    /// The server has no such model, or not any more; no other call to it will be answered either.
    #[error("{0}")]
    NoModel(String),
    /// The run was asked to stop.
    #[error("stopped")]
    Cancelled,
}

/// Called once per request, in any order, as soon as its answer is there: `(index, result)`.
pub type OnAnswer<'a> = dyn Fn(usize, &Result<Completion, LmError>) + Sync + 'a;

/// A language model. Calls are blocking and come in batches, so that an
/// in-process model can compute them together and a remote one can keep many in flight.
pub trait Lm: Send + Sync {
    /// Identity for the completion cache: model name, or digest of weights and adapter. No URL, no key.
    fn id(&self) -> &str;
    /// Answers every request, results in request order; `on_answer` hears of each as it completes.
    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>>;
    /// Says that answers are of no use any more, as they cannot be kept: a model that is paid for
    /// sends no further request and answers `why` instead. Those in flight are awaited.
    fn bar(&self, why: &LmError) {
        let _ = why;
    }
}
