//! [`Batch`]: rows that are decoded together; they join and leave while it runs (continuous
//! batching, Yu et al. 2022, "Orca").
//!
//! Rows may be of several [`Generator`]s, one an adapter; those over one base model are fed in one
//! pass, so that its weights are read once for all. Knows no threads and no callers. Invariant: a
//! row that was added ends with one [`Said::End`], unless it is removed.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use super::choices::{self, Trie};
use super::prefixes::Prefixes;
use super::row::Row;
use super::{Answer, ChoiceSet, GenerateRequest, Generator};
use crate::base_model::BaseModel;
use crate::error::ModelError;
use crate::llama::{Llama, Run};

/// Lists of choices whose tries are kept.
const TRIES: usize = 16;
/// The room of a batch, in bytes.
const ROOM: usize = 1 << 30;

/// One request to a [`Batch`], with what only its caller may want.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// The request.
    pub request: GenerateRequest,
    /// A text to go on with instead of the request's messages; special tokens that it spells are
    /// those tokens, and it begins as [`Tokenizer::text_tokens`](crate::Tokenizer::text_tokens)
    /// says.
    pub text: Option<String>,
    /// Draws come from the likeliest tokens that have this share of the probability together
    /// (nucleus sampling, Holtzman et al. 2020); 1 for all.
    pub top_p: f64,
    /// Log-probabilities of each token and of this many alternatives; of all values of a choice,
    /// each by itself, which is slower, and refused where these are too many and too long for the
    /// batch's room.
    pub logprobs: Option<usize>,
}

/// What a row says.
#[derive(Debug)]
pub enum Said {
    /// More of its answer.
    Piece(Piece),
    /// All of its answer, or why there is none. Nothing follows.
    End(Answer),
}

/// A part of an answer, as it comes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// Text that no later token changes; may be empty.
    pub text: String,
    /// How likely the token was, where that was asked for; none for one of which the answer takes a
    /// part only, up to a choice.
    pub token: Option<TokenProb>,
}

/// A token, or a whole choice, with its log-probability under the model.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenProb {
    /// Its text.
    pub text: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest ones in its place, itself among them when it is one, in order.
    pub top: Vec<(String, f32)>,
}

/// A list of choices in the tokens of a base model.
struct KeptTrie {
    base: Weak<BaseModel>,
    set: ChoiceSet,
    trie: Trie,
}

/// Rows on their way.
#[derive(Default)]
pub struct Batch {
    size: usize,
    /// Bytes of keys and values that the rows under way may come to hold together; a row that
    /// needs more runs alone.
    room: usize,
    waiting: VecDeque<Row>,
    active: Vec<Row>,
    tries: Vec<KeptTrie>,
    /// Starts of prompts that were computed before; a closed call shares its own.
    prefixes: Option<Prefixes>,
}

impl Batch {
    /// An empty batch that decodes `size` rows together and keeps at most `prefix_bytes` bytes of
    /// keys and values of prompts' common starts.
    pub fn new(size: usize, prefix_bytes: usize) -> Self {
        Self {
            prefixes: Some(Prefixes::new(prefix_bytes)),
            ..Self::closed(size, VecDeque::new())
        }
    }

    #[cfg(test)]
    pub(super) fn with_room(self, room: usize) -> Self {
        Self { room, ..self }
    }

    /// Takes `rows` to their answers, without a store of common starts.
    pub(super) fn closed(size: usize, rows: VecDeque<Row>) -> Self {
        Self {
            size: size.max(1),
            room: ROOM,
            waiting: rows,
            ..Self::default()
        }
    }

    /// Adds a request. `id` is the caller's name for it.
    ///
    /// # Errors
    /// When the request cannot be asked at all.
    pub fn add(&mut self, on: &Generator, id: usize, ask: &Ask) -> Result<(), ModelError> {
        let base = on.base();
        let tokens = match &ask.text {
            Some(text) => base.tokenizer.text_tokens(text)?,
            None => {
                let request = &ask.request;
                base.prompt_tokens_with(&request.messages, &request.template_arguments)?
            }
        };
        let mut row = Row::new(id, &ask.request, tokens, &on.llama)?;
        row.watch(ask.top_p, ask.logprobs);
        self.waiting.push_back(row);
        Ok(())
    }

    /// Takes a row out; it says nothing any more.
    pub fn remove(&mut self, id: usize) {
        self.waiting.retain(|row| row.index != id);
        self.active.retain(|row| row.index != id);
    }

    /// Rows that were not answered yet.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.active.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Feeds every row once. `tell` hears what they say, by their ids.
    pub fn step(&mut self, tell: &mut dyn FnMut(usize, Said)) {
        self.admit(tell);
        let mut rows = std::mem::take(&mut self.active);
        while !rows.is_empty() {
            let llama = Arc::clone(&rows[0].llama);
            let (group, others) = rows
                .into_iter()
                .partition(|row| row.llama.computes_with(&llama));
            rows = others;
            self.advance(&llama, by_adapter(group), tell);
        }
    }

    fn admit(&mut self, tell: &mut dyn FnMut(usize, Said)) {
        while self.active.len() < self.size
            && let Some(mut row) = self.waiting.pop_front()
        {
            match self.prepare(&mut row) {
                Ok(()) if !self.has_room(&row) => {
                    self.waiting.push_front(row);
                    return;
                }
                Ok(()) => {
                    row.own = row.llama.cache(row.pending.len() + 8);
                    self.active.push(row);
                }
                Err(error) => tell(row.index, Said::End(Err(error))),
            }
        }
    }

    fn prepare(&mut self, row: &mut Row) -> Result<(), ModelError> {
        if row.prepared {
            return Ok(());
        }
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.share(row)?;
        }
        self.measure(row)?;
        row.prepared = true;
        Ok(())
    }

    /// Finds what the choices of a row take.
    fn measure(&mut self, row: &mut Row) -> Result<(), ModelError> {
        let Some(set) = &row.choices else {
            return Ok(());
        };
        let at = self.trie(set, &row.llama)?;
        let trie = &self.tries[at].trie;
        row.check_choices(trie.longest())?;
        row.choice_tokens = trie.fed();
        // All are computed then, however unlikely, and they are held until the last one is.
        if row.tells_choices() && row.choice_bytes() > self.room {
            return Err(ModelError::Request(format!(
                "the log-probabilities of all choices take {} MiB of keys and values, more than the \
                 {} MiB that there are; ask without log-probabilities, or for fewer or shorter \
                 choices",
                row.choice_bytes() >> 20,
                self.room >> 20
            )));
        }
        Ok(())
    }

    fn has_room(&self, row: &Row) -> bool {
        let held: usize = self.active.iter().map(Row::bytes).sum();
        self.active.is_empty() || held + row.bytes() <= self.room
    }

    /// Where the trie of a list is among those that are kept.
    fn trie(&mut self, set: &ChoiceSet, llama: &Llama) -> Result<usize, ModelError> {
        let base = llama.weak_base();
        let is_it = |kept: &KeptTrie| kept.base.ptr_eq(&base) && kept.set == *set;
        if let Some(at) = self.tries.iter().position(is_it) {
            return Ok(at);
        }
        let trie = Trie::new(set, &llama.base().tokenizer)?;
        let set = set.clone();
        self.tries.push(KeptTrie { base, set, trie });
        Ok(self.tries.len() - 1)
    }

    /// One pass over the rows of one base model, `llama`'s.
    fn advance(&mut self, llama: &Llama, mut rows: Vec<Row>, tell: &mut dyn FnMut(usize, Said)) {
        let fed = feed_plain(llama, &mut rows).and_then(|()| {
            let runs = rows.iter_mut().map(|row| Run {
                tokens: &row.pending,
                past: row.past.iter().map(AsRef::as_ref).collect(),
                own: &mut row.own,
                adapter: row.llama.adapter().filter(|_| row.adapted),
            });
            llama.forward(runs.collect())
        });
        let hidden = match fed {
            Ok(hidden) => hidden,
            Err(error) => return fail(rows.iter(), &error, tell),
        };
        let width = llama.base().weights.config.hidden;
        let (mut choosing, mut free) = (Vec::new(), Vec::new());
        for (row, hidden) in rows.into_iter().zip(hidden.chunks(width)) {
            let to = if row.choosing {
                &mut choosing
            } else {
                &mut free
            };
            to.push((row, hidden));
        }
        self.choose(llama, choosing, tell);
        self.decode(llama, free, tell);
    }

    /// Answers the rows that are at their restriction.
    fn choose(
        &mut self,
        llama: &Llama,
        rows: Vec<(Row, &[f32])>,
        tell: &mut dyn FnMut(usize, Said),
    ) {
        let mut groups: Vec<Vec<(Row, &[f32])>> = Vec::new();
        // Before the rows are looked at: positions must hold until the end of this call.
        if self.tries.len() > TRIES {
            self.tries.drain(..self.tries.len() - TRIES);
        }
        for (row, hidden) in rows {
            let Some(set) = &row.choices else { continue };
            let at = match self.trie(set, llama) {
                Ok(at) => at,
                Err(error) => {
                    tell(row.index, Said::End(Err(error)));
                    continue;
                }
            };
            groups.resize_with(self.tries.len().max(groups.len()), Vec::new);
            groups[at].push((row, hidden));
        }
        for (group, KeptTrie { trie, .. }) in groups.into_iter().zip(&self.tries) {
            let starts: Vec<choices::Start<'_>> = group
                .iter()
                .map(|(row, hidden)| choices::Start {
                    hidden,
                    adapter: row.llama.adapter().filter(|_| row.adapted),
                    exact: row.tells_choices(),
                    past: row
                        .past
                        .iter()
                        .map(AsRef::as_ref)
                        .chain([&row.own])
                        .collect(),
                })
                .collect();
            let scores = match trie.score(llama, &starts) {
                Ok(scores) => scores,
                Err(error) => {
                    fail(group.iter().map(|(row, _)| row), &error, tell);
                    continue;
                }
            };
            for ((mut row, _), probs) in group.into_iter().zip(scores) {
                let value = row.sampler.choose(&probs);
                let token = row.choice_prob(value, &probs);
                let answer = row.chosen(trie.tokens(value), value, probs, llama.base());
                end(row, token, answer, tell);
            }
        }
    }

    /// Draws one token for every row; those that go on stay.
    fn decode(
        &mut self,
        llama: &Llama,
        rows: Vec<(Row, &[f32])>,
        tell: &mut dyn FnMut(usize, Said),
    ) {
        let base = llama.base();
        let hidden: Vec<f32> = rows.iter().flat_map(|(_, h)| h.iter().copied()).collect();
        let logits = match llama.logits(&hidden) {
            Ok(logits) => logits,
            Err(error) => return fail(rows.iter().map(|(row, _)| row), &error, tell),
        };
        let vocab = base.weights.config.vocab;
        for ((mut row, _), logits) in rows.into_iter().zip(logits.chunks(vocab)) {
            let token = row.sampler.next(logits);
            let prob = row.token_prob(token, logits, base);
            match row.take(token, base) {
                Ok(None) => {
                    if let Some(piece) = row.fresh_piece(prob) {
                        tell(row.index, Said::Piece(piece));
                    }
                    self.active.push(row);
                }
                Ok(Some(answer)) => {
                    // The token that ends a turn is no part of the answer.
                    let prob = prob.filter(|_| !base.tokenizer.eos().contains(&token));
                    end(row, prob, Ok(answer), tell);
                }
                Err(error) => tell(row.index, Said::End(Err(error))),
            }
        }
    }
}

/// The same rows, those of one adapter beside each other: their products are then one.
fn by_adapter(mut rows: Vec<Row>) -> Vec<Row> {
    let mut order = Vec::with_capacity(rows.len());
    while !rows.is_empty() {
        let llama = Arc::clone(&rows[0].llama);
        let (same, others): (Vec<_>, Vec<_>) = rows
            .into_iter()
            .partition(|row| Arc::ptr_eq(&row.llama, &llama));
        order.extend(same);
        rows = others;
    }
    order
}

/// Feeds the parts of prompts that come before an activated adapter's invocation.
fn feed_plain(llama: &Llama, rows: &mut [Row]) -> Result<(), ModelError> {
    let waiting = rows.iter_mut().filter(|row| row.plain > 0);
    let mut waiting: Vec<(Vec<u32>, &mut Row)> = waiting
        .map(|row| {
            let plain = std::mem::take(&mut row.plain);
            (row.pending.drain(..plain).collect(), row)
        })
        .collect();
    if waiting.is_empty() {
        return Ok(());
    }
    let runs = waiting.iter_mut().map(|(tokens, row)| Run {
        tokens,
        past: row.past.iter().map(AsRef::as_ref).collect(),
        own: &mut row.own,
        adapter: None,
    });
    llama.forward(runs.collect()).map(|_| ())
}

/// The last piece of an answer, and its end.
fn end(row: Row, token: Option<TokenProb>, answer: Answer, tell: &mut dyn FnMut(usize, Said)) {
    if let Ok(answer) = &answer
        && let Some(piece) = row.last_piece(token, &answer.text)
    {
        tell(row.index, Said::Piece(piece));
    }
    tell(row.index, Said::End(answer));
}

/// An error that struck several rows.
fn fail<'a>(
    rows: impl Iterator<Item = &'a Row>,
    error: &ModelError,
    tell: &mut dyn FnMut(usize, Said),
) {
    for row in rows {
        tell(row.index, Said::End(Err(error.again())));
    }
}
