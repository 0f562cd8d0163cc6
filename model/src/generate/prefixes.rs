//! [`Prefixes`]: keys and values of what prompts begin with, kept from one request to the next.
//!
//! The first prompt is computed as a whole. When a second one begins like a prompt of late, their
//! common start is computed by itself and kept, as a continuation of the longest start that was
//! kept before. Invariant: what is kept stays below the given size; what was unused longest goes
//! first, and a start that others continue goes after all of them, so that what goes is freed.
//! Nothing here keeps a model alive.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use super::SHORTEST_PREFIX;
use super::prompt::common_start;
use super::row::Row;
use crate::error::ModelError;
use crate::llama::{Adapter, KvCache, Llama, Run};

/// Prompts that are remembered, to see what the next one has in common with them.
const RECENT: usize = 32;

/// Starts of prompts.
pub(super) struct Prefixes {
    room: usize,
    /// Most recently used last.
    kept: Vec<Prefix>,
    recent: VecDeque<(Weak<Llama>, Vec<u32>)>,
}

struct Prefix {
    llama: Weak<Llama>,
    tokens: Vec<u32>,
    /// One after the other; all but the last belong to shorter prefixes too.
    caches: Vec<Arc<KvCache>>,
    /// Of the last one.
    bytes: usize,
}

impl Prefixes {
    pub(super) fn new(room: usize) -> Self {
        Self {
            room,
            kept: Vec::new(),
            recent: VecDeque::new(),
        }
    }

    /// Cuts off `row` what is known or worth knowing of its prompt.
    pub(super) fn share(&mut self, row: &mut Row) -> Result<(), ModelError> {
        // Where an activated adapter sets in is a matter of each prompt.
        if row.llama.adapter().is_some_and(Adapter::is_activated) {
            return Ok(());
        }
        self.forget_the_gone();
        let prompt = row.pending.clone();
        let known = self.longest(&row.llama, &prompt);
        let start = known.map_or(0, |at| self.kept[at].tokens.len());
        let common = self.common(&row.llama, &prompt);
        let at = match common >= start + SHORTEST_PREFIX {
            true => self.extend(&row.llama, known, &prompt[..common])?,
            false => known,
        };
        self.recent.push_back((Arc::downgrade(&row.llama), prompt));
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        if let Some(at) = at {
            row.reuse(self.kept[at].tokens.len(), start, &self.kept[at].caches);
            self.touch(at);
        }
        self.shrink();
        Ok(())
    }

    /// Drops what belongs to models that nobody holds any more.
    fn forget_the_gone(&mut self) {
        self.kept.retain(|prefix| prefix.llama.strong_count() > 0);
        self.recent.retain(|(llama, _)| llama.strong_count() > 0);
    }

    /// Moves a prefix to the end, and after it those that it continues, the shortest last.
    fn touch(&mut self, at: usize) {
        let caches = self.kept[at].caches.clone();
        for cache in caches.iter().rev() {
            let ends_with = |p: &Prefix| p.caches.last().is_some_and(|c| Arc::ptr_eq(c, cache));
            if let Some(at) = self.kept.iter().position(ends_with) {
                let prefix = self.kept.remove(at);
                self.kept.push(prefix);
            }
        }
    }

    /// The longest kept prefix that leaves a token of the prompt.
    fn longest(&self, llama: &Arc<Llama>, prompt: &[u32]) -> Option<usize> {
        let fits = |prefix: &Prefix| {
            prefix.llama.as_ptr() == Arc::as_ptr(llama)
                && prefix.tokens.len() < prompt.len()
                && prompt.starts_with(&prefix.tokens)
        };
        let fitting = self.kept.iter().enumerate().filter(|(_, p)| fits(p));
        fitting
            .max_by_key(|(_, p)| p.tokens.len())
            .map(|(at, _)| at)
    }

    /// How much the prompt has in common with one of late.
    fn common(&self, llama: &Arc<Llama>, prompt: &[u32]) -> usize {
        let same = self.recent.iter();
        let same = same.filter(|(of, _)| of.as_ptr() == Arc::as_ptr(llama));
        same.map(|(_, other)| common_start([prompt, other].into_iter()))
            .max()
            .unwrap_or(0)
    }

    /// Computes `tokens` after the prefix `known`, and keeps it.
    fn extend(
        &mut self,
        llama: &Arc<Llama>,
        known: Option<usize>,
        tokens: &[u32],
    ) -> Result<Option<usize>, ModelError> {
        let (start, mut caches) = match known {
            Some(at) => (self.kept[at].tokens.len(), self.kept[at].caches.clone()),
            None => (0, Vec::new()),
        };
        let mut own = llama.cache(tokens.len() - start);
        llama.forward(vec![Run {
            tokens: &tokens[start..],
            past: caches.iter().map(AsRef::as_ref).collect(),
            own: &mut own,
            adapter: llama.adapter(),
        }])?;
        let config = &llama.base().weights.config;
        let bytes = own.len() * config.layers * config.kv_width() * 2 * size_of::<f32>();
        caches.push(Arc::new(own));
        self.kept.push(Prefix {
            llama: Arc::downgrade(llama),
            tokens: tokens.to_vec(),
            caches,
            bytes,
        });
        Ok(Some(self.kept.len() - 1))
    }

    fn shrink(&mut self) {
        let mut bytes: usize = self.kept.iter().map(|prefix| prefix.bytes).sum();
        while bytes > self.room && !self.kept.is_empty() {
            bytes -= self.kept.remove(0).bytes;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::chat_template::ChatMessage;
    use crate::generate::{GenerateOptions, GenerateRequest, Generator};
    use crate::tiny;

    fn row(generator: &Generator, prompt: Vec<u32>) -> Row {
        let request = GenerateRequest {
            messages: vec![ChatMessage::new("user", "")],
            max_tokens: 1,
            temperature: 0.0,
            seed: None,
            stop: vec![],
            choices: None,
        };
        Row::new(0, &request, prompt, &generator.llama).unwrap()
    }

    fn generator() -> Generator {
        Generator::new(tiny::base(1), None, GenerateOptions::default()).unwrap()
    }

    /// `start` and then a token of its own.
    fn prompt(start: &[u32], own: u32) -> Vec<u32> {
        [start, &[own]].concat()
    }

    /// Tokens of all caches that are still in memory because of what is kept.
    fn held(prefixes: &Prefixes) -> usize {
        let caches = prefixes.kept.iter().flat_map(|p| &p.caches);
        let mut seen = BTreeSet::new();
        let fresh = caches.filter(|cache| seen.insert(Arc::as_ptr(cache) as usize));
        fresh.map(|cache| cache.len()).sum()
    }

    #[test]
    fn a_chain_of_starts_never_holds_more_than_there_is_room_for() {
        let generator = generator();
        let config = &generator.base().weights.config;
        let token = config.layers * config.kv_width() * 2 * size_of::<f32>();
        let room = 2 * SHORTEST_PREFIX + 4;
        let mut prefixes = Prefixes::new(room * token);
        let long: Vec<u32> = (0..200).map(|i| 3 + i % 40).collect();
        for length in (1..10).map(|links| links * (SHORTEST_PREFIX + 1)) {
            for own in [1, 2] {
                let mut row = row(&generator, prompt(&long[..length], own));
                prefixes.share(&mut row).unwrap();
                assert!(held(&prefixes) <= room, "{length}: {}", held(&prefixes));
            }
        }
        assert!(held(&prefixes) > 0);
    }

    #[test]
    fn a_start_that_another_one_continues_is_kept_longer() {
        let generator = generator();
        let mut prefixes = Prefixes::new(usize::MAX);
        let long: Vec<u32> = (0..200).map(|i| 3 + i % 40).collect();
        for (length, own) in [(20, 1), (20, 2), (50, 1), (50, 2)] {
            let mut row = row(&generator, prompt(&long[..length], own));
            prefixes.share(&mut row).unwrap();
        }
        let lengths: Vec<usize> = prefixes.kept.iter().map(|p| p.tokens.len()).collect();
        assert_eq!(lengths, [50, 20]);
    }

    #[test]
    fn a_model_that_nobody_holds_is_let_go() {
        let (one, other) = (generator(), generator());
        let mut prefixes = Prefixes::new(usize::MAX);
        let start: Vec<u32> = (3..40).collect();
        for own in [1, 2] {
            prefixes.share(&mut row(&one, prompt(&start, own))).unwrap();
        }
        let llama = Arc::downgrade(&one.llama);
        drop(one);
        assert!(llama.upgrade().is_none());
        assert_eq!(prefixes.kept.len(), 1);
        prefixes.share(&mut row(&other, start)).unwrap();
        assert!(prefixes.kept.is_empty() && prefixes.recent.len() == 1);
    }
}
