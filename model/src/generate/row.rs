//! [`Row`]: one request on its way to its answer.

use super::sampler::Sampler;
use super::{ChoiceSet, Finish, GenerateRequest, Generated};
use crate::base_model::BaseModel;
use crate::error::ModelError;
use crate::llama::{KvCache, Llama};

/// A request with what was computed for it.
pub(super) struct Row {
    /// Position in the call.
    pub(super) index: usize,
    /// Tokens to feed next.
    pub(super) pending: Vec<u32>,
    /// How many of them come before the adapter takes effect.
    pub(super) plain: usize,
    /// Whether the adapter takes effect at all.
    pub(super) adapted: bool,
    /// Keys and values of what was fed, after a shared start.
    pub(super) own: KvCache,
    /// The restriction starts once `pending` is fed.
    pub(super) choosing: bool,
    pub(super) choices: Option<ChoiceSet>,
    pub(super) sampler: Sampler,
    prompt_tokens: usize,
    generated: Vec<u32>,
    most: usize,
    stop: Vec<String>,
}

impl Row {
    pub(super) fn new(
        index: usize,
        request: &GenerateRequest,
        llama: &Llama,
    ) -> Result<Self, ModelError> {
        let base = llama.base();
        let refuse = |reason: String| Err(ModelError::Request { index, reason });
        let pending = base.prompt_tokens(&request.messages)?;
        let context = base.weights.config.context;
        if pending.is_empty() {
            return refuse("the prompt is empty".to_owned());
        }
        if request.max_tokens == 0 {
            return refuse("`max_tokens` must be at least 1".to_owned());
        }
        if pending.len() >= context {
            let length = pending.len();
            return refuse(format!(
                "the prompt has {length} tokens, the model's context {context}; shorten it"
            ));
        }
        let start = llama.adapter().map(|adapter| adapter.start(&pending));
        let start = start.unwrap_or(Some(0));
        Ok(Self {
            index,
            plain: start.unwrap_or(0),
            adapted: start.is_some(),
            own: KvCache::default(),
            choosing: matches!(&request.choices, Some(set) if set.after.is_none()),
            choices: request.choices.clone(),
            sampler: Sampler::new(request.temperature, request.seed, &pending),
            prompt_tokens: pending.len(),
            generated: Vec::new(),
            most: request.max_tokens.min(context - pending.len()),
            stop: request.stop.clone(),
            pending,
        })
    }

    /// Takes the next token; the answer, if it ends with it.
    pub(super) fn take(
        &mut self,
        token: u32,
        base: &BaseModel,
    ) -> Result<Option<Generated>, ModelError> {
        self.generated.push(token);
        if base.tokenizer.eos().contains(&token) {
            let text = base.tokenizer.decode(&self.generated)?;
            return Ok(Some(self.answer(text, Finish::Stop)));
        }
        let after = self.choices.as_ref().and_then(|set| set.after.as_deref());
        if !self.stop.is_empty() || after.is_some() {
            let text = base.tokenizer.decode(&self.generated)?;
            let starts = self.stop.iter().filter(|stop| !stop.is_empty());
            if let Some(start) = starts.filter_map(|stop| text.find(stop)).min() {
                return Ok(Some(self.answer(text[..start].to_owned(), Finish::Stop)));
            }
            // A space there comes with the value's first token in most vocabularies.
            self.choosing = after.is_some_and(|after| text.ends_with(after.trim_end_matches(' ')));
        }
        if self.generated.len() >= self.most && !self.choosing {
            let text = base.tokenizer.decode(&self.generated)?;
            return Ok(Some(self.answer(text, Finish::Length)));
        }
        self.pending = vec![token];
        Ok(None)
    }

    /// The answer that ends with a choice.
    pub(super) fn chosen(
        &mut self,
        tokens: &[u32],
        value: usize,
        probs: Vec<f32>,
        base: &BaseModel,
    ) -> Result<Generated, ModelError> {
        let mut text = base.tokenizer.decode(&self.generated)?;
        if let Some(set) = &self.choices {
            text.push_str(set.spaces());
            text.push_str(&set.values[value]);
            text.push_str(&set.then);
        }
        self.generated.extend_from_slice(tokens);
        Ok(Generated {
            choice_probs: Some(probs),
            ..self.answer(text, Finish::Stop)
        })
    }

    fn answer(&self, text: String, finish: Finish) -> Generated {
        Generated {
            text,
            finish,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.generated.len(),
            choice_probs: None,
        }
    }
}
