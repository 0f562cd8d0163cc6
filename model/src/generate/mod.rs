//! Text generation: many chats at once over one base model, each with at most one adapter.
//!
//! | file | what |
//! |---|---|
//! | `prompt` | chats as tokens, for answering and for training |
//! | `row` | one request on its way to its answer |
//! | `batch` | rows that are decoded together |
//! | `prefixes` | what prompts begin with, kept from one request to the next |
//! | `starts` | what all prompts of a call begin with, kept by the base model |
//! | `choices` | probabilities of a closed list of answers |
//! | `sampler` | the next token |
//!
//! Rows are decoded together and leave the batch as they finish, when the next one takes the
//! place. What prompts begin with is computed once. Invariant: an answer does not depend on the other requests of the call, up to
//! rounding.

mod batch;
mod choices;
mod prefixes;
mod prompt;
mod row;
mod sampler;
mod starts;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::base_model::BaseModel;
use crate::chat_template::{ChatMessage, TemplateArguments};
use crate::device::Device;
use crate::error::ModelError;
use crate::llama::{Adapter, KvCache, Llama, Precision, Run};
use crate::lora::LoraAdapter;
pub use batch::{Ask, Batch, Piece, Said, TokenProb};
use row::Row;
pub(crate) use starts::Starts;

/// Shorter common starts are not worth a cache of their own.
const SHORTEST_PREFIX: usize = 16;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// The conversation; the model answers its last message.
    pub messages: Vec<ChatMessage>,
    /// What else the chat template is told.
    pub template_arguments: TemplateArguments,
    /// Tokens to generate at most; the model's context is a further bound.
    pub max_tokens: usize,
    /// 0 takes the most likely token each time.
    pub temperature: f64,
    /// Seed of the draws; 0 when absent.
    pub seed: Option<u64>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Restricts a part of the answer.
    pub choices: Option<ChoiceSet>,
}

/// A closed list for a part of the answer, which ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceSet {
    /// The restriction starts right after this text was generated; at the very start when `None`.
    pub after: Option<String>,
    /// The allowed texts, each once.
    pub values: Vec<String>,
    /// Fixed text that follows the choice; may be empty.
    pub then: String,
}

impl ChoiceSet {
    /// The spaces that `after` ends with: they are generated with the value.
    fn spaces(&self) -> &str {
        let after = self.after.as_deref().unwrap_or_default();
        &after[after.trim_end_matches(' ').len()..]
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// End of turn, a stop text, or the choice.
    Stop,
    /// `max_tokens` or the model's context.
    Length,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt, a shared start included.
    pub prompt_tokens: usize,
    /// Of them, those that were computed for another request.
    pub cached_tokens: usize,
    /// Tokens of the answer, the one that ended the turn included.
    pub completion_tokens: usize,
    /// Probability of each value of the [`ChoiceSet`]; they sum to 1.
    pub choice_probs: Option<Vec<f32>>,
}

/// How to generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerateOptions {
    /// Rows that are decoded together.
    pub batch: usize,
    /// What the base model's linear layers are computed with.
    pub precision: Precision,
    /// Where everything is computed. On a GPU `precision` does not count: it computes in f32.
    pub device: Device,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            batch: 32,
            precision: Precision::default(),
            device: Device::default(),
        }
    }
}

/// The outcome of one request.
pub type Answer = Result<Generated, ModelError>;

/// A base model with its adapter, ready to answer.
pub struct Generator {
    llama: Arc<Llama>,
    options: GenerateOptions,
}

impl Generator {
    /// # Errors
    /// When `adapter` does not fit `base`, or the device cannot be used.
    pub fn new(
        base: Arc<BaseModel>,
        adapter: Option<&LoraAdapter>,
        options: GenerateOptions,
    ) -> Result<Self, ModelError> {
        let llama = Arc::new(Llama::on(base, adapter, options.precision, options.device)?);
        Ok(Self { llama, options })
    }

    #[cfg(all(test, feature = "cuda"))]
    pub(crate) fn of(llama: Llama, options: GenerateOptions) -> Self {
        let llama = Arc::new(llama);
        Self { llama, options }
    }

    /// The base model.
    pub fn base(&self) -> &BaseModel {
        self.llama.base()
    }

    /// Bytes of the matrices that a generated token goes through.
    pub(crate) fn matrix_bytes(&self) -> Result<usize, ModelError> {
        self.llama.matrix_bytes()
    }

    /// Answers all requests, in their order. `on_answer` hears of each once, as it is done.
    /// `cancelled` is asked between steps; what is not done by then is [`ModelError::Cancelled`].
    pub fn generate(
        &self,
        requests: &[GenerateRequest],
        on_answer: &(dyn Fn(usize, &Answer) + Sync),
        cancelled: &dyn Fn() -> bool,
    ) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
        let mut tell = |index: usize, answer: Answer| {
            on_answer(index, &answer);
            answers[index] = Some(answer);
        };
        let mut waiting = VecDeque::with_capacity(requests.len());
        for (index, request) in requests.iter().enumerate() {
            let arguments = &request.template_arguments;
            let tokens = self.base().prompt_tokens_with(&request.messages, arguments);
            match tokens.and_then(|tokens| Row::new(index, request, tokens, &self.llama)) {
                Ok(row) => waiting.push_back(row),
                Err(error) => tell(index, Err(error)),
            }
        }
        match self.share_prefix(&mut waiting) {
            Ok(()) => {
                let mut batch = Batch::closed(self.options.batch, waiting);
                while !batch.is_empty() && !cancelled() {
                    batch.step(&mut |index, said| {
                        if let Said::End(answer) = said {
                            tell(index, answer);
                        }
                    });
                }
            }
            Err(error) => {
                for Row { index, .. } in waiting {
                    tell(index, Err(error.again()));
                }
            }
        }
        let lost = |(index, answer): (usize, Option<Answer>)| {
            answer.unwrap_or_else(|| {
                let answer = Err(ModelError::Cancelled);
                on_answer(index, &answer);
                answer
            })
        };
        answers.into_iter().enumerate().map(lost).collect()
    }

    /// Computes what all prompts begin with, and cuts it off them.
    fn share_prefix(&self, rows: &mut VecDeque<Row>) -> Result<(), ModelError> {
        let mut common = prompt::common_start(rows.iter().map(|row| row.pending.as_slice()));
        let activated = self.llama.adapter().is_some_and(Adapter::is_activated);
        if activated {
            let plain = rows.iter().filter(|row| row.adapted).map(|row| row.plain);
            common = plain.fold(common, usize::min);
        }
        if rows.len() < 2 || common < SHORTEST_PREFIX {
            return Ok(());
        }
        let caches = [self.start(&rows[0].pending[..common])?];
        for row in rows {
            row.reuse(common, 0, &caches);
        }
        Ok(())
    }

    /// Keys and values of what prompts begin with, before an activated adapter takes effect.
    fn start(&self, tokens: &[u32]) -> Result<Arc<KvCache>, ModelError> {
        let llama = &self.llama;
        let adapter = llama.adapter().filter(|adapter| !adapter.is_activated());
        // On a GPU they would take its memory for good.
        let of_base = adapter.is_none() && !llama.is_on_gpu();
        let starts = of_base.then(|| &llama.base().starts);
        if let Some(cache) = starts.and_then(|starts| starts.get(tokens, llama.precision())) {
            return Ok(cache);
        }
        let mut own = llama.cache(tokens.len());
        llama.forward(vec![Run {
            tokens,
            past: vec![],
            own: &mut own,
            adapter,
        }])?;
        let cache = Arc::new(own);
        if let Some(starts) = starts {
            starts.keep(tokens, llama.precision(), &cache);
        }
        Ok(cache)
    }
}
