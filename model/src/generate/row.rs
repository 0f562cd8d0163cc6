//! [`Row`]: one request on its way to its answer.

use std::sync::Arc;

use super::sampler::Sampler;
use super::{ChoiceSet, Finish, GenerateRequest, Generated, Piece, TokenProb};
use crate::base_model::BaseModel;
use crate::error::ModelError;
use crate::llama::{Adapter, KvCache, Llama};
use crate::tokenizer::TextStream;

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
    /// What answers it.
    pub(super) llama: Arc<Llama>,
    /// Keys and values of a start that it shares with others.
    pub(super) past: Vec<Arc<KvCache>>,
    /// Keys and values of what was fed after `past`.
    pub(super) own: KvCache,
    /// The restriction starts once `pending` is fed.
    pub(super) choosing: bool,
    /// The last token says more than the answer took of it.
    is_cut: bool,
    pub(super) choices: Option<ChoiceSet>,
    pub(super) sampler: Sampler,
    prompt_tokens: usize,
    cached_tokens: usize,
    /// The answer so far.
    said: TextStream,
    /// Its tokens.
    spent: usize,
    most: usize,
    /// Tokens that scoring its choices takes beside `own`.
    pub(super) choice_tokens: usize,
    /// What it shares with others was cut off, and its choices were measured: done once, however
    /// long it waits for room.
    pub(super) prepared: bool,
    stop: Vec<String>,
    watched: Option<Watched>,
}

/// What is told of a row while it is under way.
struct Watched {
    /// Bytes of text that were told.
    told: usize,
    /// Alternatives whose log-probabilities are told.
    logprobs: Option<usize>,
}

impl Row {
    pub(super) fn new(
        index: usize,
        request: &GenerateRequest,
        pending: Vec<u32>,
        llama: &Arc<Llama>,
    ) -> Result<Self, ModelError> {
        let refuse = |reason: String| Err(ModelError::Request(reason));
        let context = llama.base().weights.config.context;
        if pending.is_empty() {
            return refuse("the prompt is empty".to_owned());
        }
        if request.max_tokens == 0 {
            return refuse("`max_tokens` must be at least 1".to_owned());
        }
        if pending.len() >= context {
            let length = pending.len();
            return Err(ModelError::TooLong(format!(
                "the prompt has {length} tokens, the model's context {context}; shorten it"
            )));
        }
        let start = llama.adapter().map(|adapter| adapter.start(&pending));
        let start = start.unwrap_or(Some(0));
        Ok(Self {
            index,
            plain: start.unwrap_or(0),
            adapted: start.is_some(),
            llama: Arc::clone(llama),
            past: Vec::new(),
            own: KvCache::default(),
            choosing: matches!(&request.choices, Some(set) if set.after.is_none()),
            is_cut: false,
            choices: request.choices.clone(),
            sampler: Sampler::new(request.temperature, request.seed, &pending),
            prompt_tokens: pending.len(),
            cached_tokens: 0,
            watched: None,
            said: TextStream::default(),
            spent: 0,
            most: request.max_tokens.min(context - pending.len()),
            choice_tokens: 0,
            prepared: false,
            stop: request.stop.clone(),
            pending,
        })
    }

    /// Bytes of keys and values that it may come to hold by itself, what it shares left out.
    pub(super) fn bytes(&self) -> usize {
        // One that begins with its choice ends with it.
        let answer = match &self.choices {
            Some(set) if set.after.is_none() => 0,
            _ => self.most,
        };
        let left = answer.saturating_sub(self.spent);
        self.bytes_of(self.own.len() + self.pending.len() + left + self.choice_tokens)
    }

    /// Bytes of keys and values of all its choices.
    pub(super) fn choice_bytes(&self) -> usize {
        self.bytes_of(self.choice_tokens)
    }

    fn bytes_of(&self, tokens: usize) -> usize {
        let config = &self.llama.base().weights.config;
        tokens * config.layers * config.kv_width() * 2 * size_of::<f32>()
    }

    /// The values of its choices fit into the context after its prompt.
    ///
    /// # Errors
    /// [`ModelError::TooLong`] when they do not.
    pub(super) fn check_choices(&self, longest: usize) -> Result<(), ModelError> {
        let context = self.llama.base().weights.config.context;
        if self.prompt_tokens + longest <= context {
            return Ok(());
        }
        Err(ModelError::TooLong(format!(
            "the prompt has {} tokens and the longest choice {longest}, the model's context \
             {context}; shorten one of them",
            self.prompt_tokens
        )))
    }

    /// How many of the tokens that come next may be computed once for several rows: all but the
    /// last one, and of those before an activated adapter's invocation.
    pub(super) fn sharable(&self) -> usize {
        let all = self.pending.len().saturating_sub(1);
        match self.llama.adapter() {
            Some(adapter) if adapter.is_activated() && self.adapted => all.min(self.plain),
            _ => all,
        }
    }

    /// The adapter that computes the first tokens; none where those are the base model's.
    pub(super) fn first_adapter(&self) -> Option<&Adapter> {
        let adapter = self.llama.adapter();
        adapter.filter(|adapter| !adapter.is_activated())
    }

    /// Has the row say what it does, token by token.
    pub(super) fn watch(&mut self, top_p: f64, logprobs: Option<usize>) {
        self.sampler.top_p = top_p;
        self.watched = Some(Watched { told: 0, logprobs });
    }

    /// Takes the first `tokens` tokens as fed: their keys and values are in `caches`. Of them,
    /// `cached` were not computed for this row.
    pub(super) fn reuse(&mut self, tokens: usize, cached: usize, caches: &[Arc<KvCache>]) {
        self.pending.drain(..tokens);
        self.plain = self.plain.saturating_sub(tokens);
        self.past = caches.to_vec();
        self.cached_tokens = cached;
    }

    /// Takes the next token; the answer, if it ends with it.
    pub(super) fn take(
        &mut self,
        token: u32,
        base: &BaseModel,
    ) -> Result<Option<Generated>, ModelError> {
        self.spent += 1;
        if base.tokenizer.eos().contains(&token) {
            let text = self.said.finish(&base.tokenizer)?;
            return Ok(Some(self.answer(text, Finish::Stop)));
        }
        let (before, is_whole) = (self.said.text().len(), self.said.is_whole());
        let last = self.said.window().to_vec();
        self.said.push(token, &base.tokenizer)?;
        let text = self.said.text();
        let after = self.choices.as_ref().and_then(|set| set.after.as_deref());
        // A space there comes with the value's first token in most vocabularies.
        let after = after.map(|after| after.trim_end_matches(' '));
        let reached = after.and_then(|after| reached(text, before, after));
        let stop = stopped(text, before, &self.stop);
        if let Some(start) = stop.filter(|start| reached.is_none_or(|end| *start < end)) {
            return Ok(Some(self.answer(text[..start].to_owned(), Finish::Stop)));
        }
        self.choosing = reached.is_some();
        if self.spent >= self.most && !self.choosing {
            let text = self.said.finish(&base.tokenizer)?;
            return Ok(Some(self.answer(text, Finish::Length)));
        }
        self.pending = vec![token];
        if let Some(end) = reached.filter(|end| *end < text.len()) {
            // The token goes on past the place: what it says up to there is fed instead, unless it
            // began within a character or no tokens say that alone.
            if is_whole
                && let Some(tokens) = base.tokenizer.encode_after(&last, &text[before..end])?
            {
                self.pending = tokens;
            }
            self.said.cut(end);
            self.is_cut = true;
        }
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
        let mut text = self.said.finish(&base.tokenizer)?;
        if let Some(set) = &self.choices {
            text.push_str(set.spaces());
            text.push_str(&set.values[value]);
            text.push_str(&set.then);
        }
        self.spent += tokens.len();
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
            cached_tokens: self.cached_tokens,
            completion_tokens: self.spent,
            choice_probs: None,
        }
    }

    /// How likely a token was, where that is told.
    pub(super) fn token_prob(
        &self,
        token: u32,
        logits: &[f32],
        base: &BaseModel,
    ) -> Option<TokenProb> {
        let count = self.watched.as_ref()?.logprobs?;
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = logits.iter().map(|logit| (logit - most).exp()).sum();
        let logprob = |token: u32| logits[token as usize] - most - sum.ln();
        // A vocabulary may have fewer entries than the head has rows.
        let text = |token: u32| base.tokenizer.decode(&[token]).unwrap_or_default();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let count = count.min(order.len());
        let by_logit = |a: &u32, b: &u32| {
            let by = logits[*b as usize].total_cmp(&logits[*a as usize]);
            by.then(a.cmp(b))
        };
        if count < order.len() {
            order.select_nth_unstable_by(count, by_logit);
            order.truncate(count);
        }
        order.sort_unstable_by(by_logit);
        Some(TokenProb {
            text: text(token),
            logprob: logprob(token),
            top: order.into_iter().map(|t| (text(t), logprob(t))).collect(),
        })
    }

    /// How likely a choice was among the others, where that is told.
    pub(super) fn choice_prob(&self, value: usize, probs: &[f32]) -> Option<TokenProb> {
        let count = self.watched.as_ref()?.logprobs?;
        let values = &self.choices.as_ref()?.values;
        let mut order: Vec<usize> = (0..probs.len()).collect();
        order.sort_by(|a, b| probs[*b].total_cmp(&probs[*a]));
        order.truncate(count);
        Some(TokenProb {
            text: values[value].clone(),
            logprob: logprob(probs[value]),
            top: order
                .into_iter()
                .map(|at| (values[at].clone(), logprob(probs[at])))
                .collect(),
        })
    }

    /// Whether the probabilities of its choices are told, the unlikely ones too.
    pub(super) fn tells_choices(&self) -> bool {
        let logprobs = self.watched.as_ref().map(|watched| watched.logprobs);
        logprobs.flatten().is_some()
    }

    /// What the last token adds for certain: nothing that a later one may complete or cut off. One
    /// that says more than the answer took of it is not told.
    pub(super) fn fresh_piece(&mut self, token: Option<TokenProb>) -> Option<Piece> {
        let watched = self.watched.as_mut()?;
        let text = self.said.text();
        let certain = certain(text, &self.stop);
        let fresh = text.get(watched.told..certain).unwrap_or_default();
        watched.told += fresh.len();
        Some(Piece {
            text: fresh.to_owned(),
            token: token.filter(|_| !self.is_cut),
        })
    }

    /// What is left of the answer's whole text.
    pub(super) fn last_piece(&self, token: Option<TokenProb>, text: &str) -> Option<Piece> {
        let watched = self.watched.as_ref()?;
        let text = text.get(watched.told..).unwrap_or_default().to_owned();
        Some(Piece { text, token })
    }
}

/// The logarithm of a probability; a finite number for one that is too small for f32.
fn logprob(probability: f32) -> f32 {
    probability.max(f32::MIN_POSITIVE).ln()
}

/// Where `part` ends in `text` for the first time, given that it does not in the first `before`
/// bytes.
fn reached(text: &str, before: usize, part: &str) -> Option<usize> {
    if part.is_empty() {
        return Some(text.len());
    }
    let mut from = (before + 1).saturating_sub(part.len());
    while !text.is_char_boundary(from) {
        from -= 1;
    }
    text[from..].find(part).map(|at| from + at + part.len())
}

/// Where the first stop text starts, given that none is in the first `before` bytes of `text`.
fn stopped(text: &str, before: usize, stops: &[String]) -> Option<usize> {
    let stops = stops.iter().filter(|stop| !stop.is_empty());
    let starts = stops.filter_map(|stop| {
        let mut from = before.saturating_sub(stop.len());
        while !text.is_char_boundary(from) {
            from -= 1;
        }
        text[from..].find(stop.as_str()).map(|at| from + at)
    });
    starts.min()
}

/// Bytes of `text` that stay whatever comes: not the start of a stop text.
fn certain(text: &str, stops: &[String]) -> usize {
    let longest = stops.iter().map(String::len).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest);
    (from..text.len())
        .filter(|at| text.is_char_boundary(*at))
        .find(|at| stops.iter().any(|stop| stop.starts_with(&text[*at..])))
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::{certain, reached, stopped};

    #[test]
    fn the_place_of_a_choice_is_found_within_a_token() {
        assert_eq!(reached("a ]]", 2, "]]"), Some(4));
        assert_eq!(reached("a ]]\n\n", 2, "]]"), Some(4));
        assert_eq!(reached("a ]]\n", 3, "]]"), Some(4));
        assert_eq!(reached("a ]", 2, "]]"), None);
        assert_eq!(reached("é:x", 2, "é:"), Some(3));
        assert_eq!(reached("ab", 1, ""), Some(2));
    }

    #[test]
    fn what_may_be_cut_off_is_held_back() {
        let stops = ["END".to_owned(), "\n\n".to_owned()];
        assert_eq!(certain("hello", &stops), 5);
        assert_eq!(certain("helloE", &stops), 5);
        assert_eq!(certain("helloEN\n", &stops), 7);
        assert_eq!(certain("é\n", &stops), 2);
        assert_eq!(certain("END", &stops), 0);
    }

    #[test]
    fn a_stop_text_is_found_although_it_came_in_parts() {
        let stops = ["END".to_owned(), "é!".to_owned()];
        assert_eq!(stopped("helloEND", 7, &stops), Some(5));
        assert_eq!(stopped("caféé!", 5, &stops), Some(5));
        assert_eq!(stopped("é!END", 0, &stops), Some(0));
        assert_eq!(stopped("hello", 0, &stops), None);
        assert_eq!(stopped("hello", 0, &[String::new()]), None);
    }
}
