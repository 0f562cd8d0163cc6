//! Text generation: many chats at once over one base model and at most one adapter.
//!
//! | file | what |
//! |---|---|
//! | `prompt` | chats as tokens, for answering and for training |
//! | `row` | one request on its way to its answer |
//! | `choices` | probabilities of a closed list of answers |
//! | `sampler` | the next token |
//!
//! Rows are decoded together and leave the batch as they finish, when the next one takes the
//! place (continuous batching, Yu et al. 2022, "Orca"). What all prompts of a call begin with is
//! computed once. Invariant: an answer does not depend on the other requests of the call, up to
//! rounding.

mod choices;
mod prompt;
mod row;
mod sampler;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::base_model::BaseModel;
use crate::chat_template::ChatMessage;
use crate::error::ModelError;
use crate::llama::{Adapter, KvCache, Llama, Precision, Run};
use crate::lora::LoraAdapter;
use choices::Trie;
use row::Row;

/// Shorter common starts are not worth a cache of their own.
const SHORTEST_PREFIX: usize = 16;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// The conversation; the model answers its last message.
    pub messages: Vec<ChatMessage>,
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
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            batch: 32,
            precision: Precision::default(),
        }
    }
}

/// The outcome of one request.
pub type Answer = Result<Generated, ModelError>;

/// A base model with its adapter, ready to answer.
pub struct Generator {
    llama: Llama,
    options: GenerateOptions,
}

impl Generator {
    /// # Errors
    /// When `adapter` does not fit `base`.
    pub fn new(
        base: Arc<BaseModel>,
        adapter: Option<&LoraAdapter>,
        options: GenerateOptions,
    ) -> Result<Self, ModelError> {
        let llama = Llama::new(base, adapter, options.precision)?;
        Ok(Self { llama, options })
    }

    /// The base model.
    pub fn base(&self) -> &BaseModel {
        self.llama.base()
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
            match Row::new(index, request, &self.llama) {
                Ok(row) => waiting.push_back(row),
                Err(error) => tell(index, Err(error)),
            }
        }
        if let Err(error) = self.serve(&mut waiting, &mut tell, cancelled) {
            // The rows that it struck have no answer yet; the message is all they share.
            let reason = error.to_string();
            let lost: Vec<usize> = (0..requests.len())
                .filter(|index| answers[*index].is_none())
                .collect();
            for index in lost {
                let again = match &error {
                    ModelError::Cancelled => ModelError::Cancelled,
                    _ => ModelError::Request {
                        index,
                        reason: reason.clone(),
                    },
                };
                let answer = Err(again);
                on_answer(index, &answer);
                answers[index] = Some(answer);
            }
        }
        answers
            .into_iter()
            .map(|answer| answer.unwrap_or(Err(ModelError::Cancelled)))
            .collect()
    }

    /// Takes all rows to their answers.
    fn serve(
        &self,
        waiting: &mut VecDeque<Row>,
        tell: &mut dyn FnMut(usize, Answer),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let prefix = self.share_prefix(waiting)?;
        let mut tries: Vec<(ChoiceSet, Trie)> = Vec::new();
        let mut active: Vec<Row> = Vec::new();
        loop {
            while active.len() < self.options.batch.max(1)
                && let Some(mut row) = waiting.pop_front()
            {
                row.own = self.llama.cache(row.pending.len() + 8);
                active.push(row);
            }
            if active.is_empty() {
                return Ok(());
            }
            if cancelled() {
                return Err(ModelError::Cancelled);
            }
            self.feed_plain(&mut active, prefix.as_ref())?;
            let runs = active.iter_mut().map(|row| Run {
                tokens: &row.pending,
                past: prefix.iter().collect(),
                own: &mut row.own,
                adapter: self.llama.adapter().filter(|_| row.adapted),
            });
            let hidden = self.llama.forward(runs.collect())?;
            let width = self.base().weights.config.hidden;
            let (mut choosing, mut free) = (Vec::new(), Vec::new());
            for (row, hidden) in active.drain(..).zip(hidden.chunks(width)) {
                let to = if row.choosing {
                    &mut choosing
                } else {
                    &mut free
                };
                to.push((row, hidden));
            }
            self.choose(choosing, prefix.as_ref(), &mut tries, tell)?;
            active = self.decode(free, tell)?;
        }
    }

    /// Feeds the parts of prompts that come before an activated adapter's invocation.
    fn feed_plain(&self, rows: &mut [Row], prefix: Option<&KvCache>) -> Result<(), ModelError> {
        let waiting = rows.iter_mut().filter(|row| row.plain > 0);
        let mut waiting: Vec<(Vec<u32>, &mut Row)> = waiting
            .map(|row| {
                (
                    row.pending
                        .drain(..std::mem::take(&mut row.plain))
                        .collect(),
                    row,
                )
            })
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let runs = waiting.iter_mut().map(|(tokens, row)| Run {
            tokens,
            past: prefix.into_iter().collect(),
            own: &mut row.own,
            adapter: None,
        });
        self.llama.forward(runs.collect())?;
        Ok(())
    }

    /// Computes what all prompts begin with, and cuts it off them.
    fn share_prefix(&self, rows: &mut VecDeque<Row>) -> Result<Option<KvCache>, ModelError> {
        let mut common = prompt::common_start(rows.iter().map(|row| row.pending.as_slice()));
        let activated = self.llama.adapter().is_some_and(Adapter::is_activated);
        if activated {
            let plain = rows.iter().filter(|row| row.adapted).map(|row| row.plain);
            common = plain.fold(common, usize::min);
        }
        if rows.len() < 2 || common < SHORTEST_PREFIX {
            return Ok(None);
        }
        let mut cache = self.llama.cache(common);
        let tokens = rows[0].pending[..common].to_vec();
        self.llama.forward(vec![Run {
            tokens: &tokens,
            past: vec![],
            own: &mut cache,
            adapter: self.llama.adapter().filter(|_| !activated),
        }])?;
        for row in rows {
            row.pending.drain(..common);
            row.plain = row.plain.saturating_sub(common);
        }
        Ok(Some(cache))
    }

    /// Answers the rows that are at their restriction.
    fn choose(
        &self,
        rows: Vec<(Row, &[f32])>,
        prefix: Option<&KvCache>,
        tries: &mut Vec<(ChoiceSet, Trie)>,
        tell: &mut dyn FnMut(usize, Answer),
    ) -> Result<(), ModelError> {
        let mut groups: Vec<Vec<(Row, &[f32])>> = Vec::new();
        for (row, hidden) in rows {
            let Some(set) = &row.choices else { continue };
            let at = match tries.iter().position(|(known, _)| known == set) {
                Some(at) => at,
                None => match Trie::new(set, &self.base().tokenizer, row.index) {
                    Ok(trie) => {
                        tries.push((set.clone(), trie));
                        tries.len() - 1
                    }
                    Err(error) => {
                        tell(row.index, Err(error));
                        continue;
                    }
                },
            };
            groups.resize_with(tries.len().max(groups.len()), Vec::new);
            groups[at].push((row, hidden));
        }
        for (group, (_, trie)) in groups.into_iter().zip(tries) {
            let starts: Vec<choices::Start<'_>> = group
                .iter()
                .map(|(row, hidden)| choices::Start {
                    hidden,
                    adapter: self.llama.adapter().filter(|_| row.adapted),
                    past: prefix.into_iter().chain([&row.own]).collect(),
                })
                .collect();
            let scores = trie.score(&self.llama, &starts)?;
            for ((mut row, _), probs) in group.into_iter().zip(scores) {
                let value = row.sampler.choose(&probs);
                let answer = row.chosen(trie.tokens(value), value, probs, self.base());
                tell(row.index, answer);
            }
        }
        Ok(())
    }

    /// Draws one token for every row; returns those that go on.
    fn decode(
        &self,
        rows: Vec<(Row, &[f32])>,
        tell: &mut dyn FnMut(usize, Answer),
    ) -> Result<Vec<Row>, ModelError> {
        let hidden: Vec<f32> = rows.iter().flat_map(|(_, h)| h.iter().copied()).collect();
        let logits = self.llama.logits(&hidden)?;
        let vocab = self.base().weights.config.vocab;
        let mut left = Vec::with_capacity(rows.len());
        for ((mut row, _), logits) in rows.into_iter().zip(logits.chunks(vocab)) {
            let token = row.sampler.next(logits);
            match row.take(token, self.base()) {
                Ok(None) => left.push(row),
                Ok(Some(answer)) => tell(row.index, Ok(answer)),
                Err(error) => tell(row.index, Err(error)),
            }
        }
        Ok(left)
    }
}
