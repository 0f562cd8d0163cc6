//! [`Prefixes`]: keys and values of what prompts begin with, kept from one request to the next.
//!
//! The first prompt is computed as a whole. When a second one begins like a prompt of late, their
//! common start is computed by itself and kept, as a continuation of the longest start that was
//! kept before. Invariant: what is kept stays below the given size; what was unused longest goes
//! first.

use std::collections::VecDeque;
use std::sync::Arc;

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
    recent: VecDeque<(Arc<Llama>, Vec<u32>)>,
}

struct Prefix {
    llama: Arc<Llama>,
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
        let prompt = row.pending.clone();
        let known = self.longest(&row.llama, &prompt);
        let start = known.map_or(0, |at| self.kept[at].tokens.len());
        let common = self.common(&row.llama, &prompt);
        let at = match common >= start + SHORTEST_PREFIX {
            true => self.extend(&row.llama, known, &prompt[..common])?,
            false => known,
        };
        self.recent.push_back((Arc::clone(&row.llama), prompt));
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        if let Some(at) = at {
            let used = self.kept.remove(at);
            row.reuse(used.tokens.len(), start, &used.caches);
            self.kept.push(used);
        }
        self.shrink();
        Ok(())
    }

    /// The longest kept prefix that leaves a token of the prompt.
    fn longest(&self, llama: &Arc<Llama>, prompt: &[u32]) -> Option<usize> {
        let fits = |prefix: &Prefix| {
            Arc::ptr_eq(&prefix.llama, llama)
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
        let same = self.recent.iter().filter(|(of, _)| Arc::ptr_eq(of, llama));
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
            llama: Arc::clone(llama),
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
