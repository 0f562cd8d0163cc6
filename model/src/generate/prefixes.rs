//! [`Prefixes`]: keys and values of what prompts begin with, kept from one request to the next.
//!
//! The first prompt is computed as a whole. When a second one begins like a prompt of late, their
//! common start is computed by itself and kept, as a continuation of the longest start that was
//! kept before. A start that a later prompt leaves halfway is cut in two there, as in a radix tree.
//! What comes before an activated adapter's invocation is computed by the base model,
//! so the base model and all such adapters over it have these starts in common; any other adapter
//! has its own. Invariant: what is kept stays below the given size; what was unused longest goes
//! first, and a start that others continue goes after all of them, so that what goes is freed.
//! Nothing here keeps a model alive.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use super::SHORTEST_PREFIX;
use super::row::Row;
use crate::base_model::BaseModel;
use crate::error::ModelError;
use crate::llama::{KvCache, Llama, Precision, Run};

/// Prompts that are remembered, to see what the next one has in common with them.
const RECENT: usize = 32;

/// Starts of prompts.
pub(super) struct Prefixes {
    room: usize,
    /// Most recently used last.
    kept: Vec<Prefix>,
    /// What may be shared of the prompts of late.
    recent: VecDeque<(Owner, Vec<u32>)>,
}

/// What computes a start.
#[derive(Clone)]
enum Owner {
    /// The base model, with what precision, and whether on a GPU.
    Base(Weak<BaseModel>, Precision, bool),
    /// A model with its adapter.
    Adapted(Weak<Llama>),
}

impl Owner {
    fn of(row: &Row) -> Self {
        match row.first_adapter() {
            Some(_) => Self::Adapted(Arc::downgrade(&row.llama)),
            None => {
                let llama = &row.llama;
                Self::Base(llama.weak_base(), llama.precision(), llama.is_on_gpu())
            }
        }
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Base(base, ..) => base.strong_count() == 0,
            Self::Adapted(llama) => llama.strong_count() == 0,
        }
    }
}

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Base(a, of_a, on_a), Self::Base(b, of_b, on_b)) => {
                a.ptr_eq(b) && of_a == of_b && on_a == on_b
            }
            (Self::Adapted(a), Self::Adapted(b)) => a.ptr_eq(b),
            _ => false,
        }
    }
}

struct Prefix {
    owner: Owner,
    tokens: Vec<u32>,
    /// One after the other; all but the last belong to shorter prefixes too.
    caches: Vec<Arc<KvCache>>,
    /// Bytes of a token's keys and values.
    token_bytes: usize,
}

impl Prefix {
    /// Bytes of the last cache.
    fn bytes(&self) -> usize {
        let last = self.caches.last();
        last.map_or(0, |cache| cache.len() * self.token_bytes)
    }

    fn ends_with(&self, cache: &Arc<KvCache>) -> bool {
        let last = self.caches.last();
        last.is_some_and(|last| Arc::ptr_eq(last, cache))
    }

    /// The cache that has the token at `place`, and how many tokens come before that cache.
    fn link(&self, place: usize) -> (usize, usize) {
        let (mut link, mut before) = (0, 0);
        for cache in &self.caches[..self.caches.len().saturating_sub(1)] {
            if before + cache.len() > place {
                break;
            }
            before += cache.len();
            link += 1;
        }
        (link, before)
    }
}

/// How many tokens two prompts begin with alike.
fn alike(one: &[u32], other: &[u32]) -> usize {
    let pairs = one.iter().zip(other);
    pairs.take_while(|(a, b)| a == b).count()
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
        self.forget_the_gone();
        let owner = Owner::of(row);
        let prompt = row.pending[..row.sharable()].to_vec();
        let known = self.longest(&owner, &prompt);
        let start = known.map_or(0, |at| self.kept[at].tokens.len());
        let common = self.common(&owner, &prompt);
        let at = match common >= start + SHORTEST_PREFIX {
            true => Some(self.extend(row, known, &prompt[..common])?),
            false => known,
        };
        self.recent.push_back((owner, prompt));
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
        self.kept.retain(|prefix| !prefix.owner.is_gone());
        self.recent.retain(|(owner, _)| !owner.is_gone());
    }

    /// Moves a prefix to the end, and after it those that it continues, the shortest last.
    fn touch(&mut self, at: usize) {
        let caches = self.kept[at].caches.clone();
        for cache in caches.iter().rev() {
            if let Some(at) = self.kept.iter().position(|p| p.ends_with(cache)) {
                let prefix = self.kept.remove(at);
                self.kept.push(prefix);
            }
        }
    }

    /// The longest kept prefix of what may be shared of a prompt; makes one of the start of a kept
    /// one where that is worth it.
    fn longest(&mut self, owner: &Owner, prompt: &[u32]) -> Option<usize> {
        let kept = self.kept.iter().enumerate();
        let own = kept.filter(|(_, prefix)| prefix.owner == *owner);
        let (common, _, at) = own
            .map(|(at, p)| (alike(&p.tokens, prompt), Reverse(p.tokens.len()), at))
            .max()?;
        let prefix = &self.kept[at];
        if common == prefix.tokens.len() {
            return Some(at);
        }
        let (link, before) = prefix.link(common);
        if common >= before + SHORTEST_PREFIX
            && let Some((first, second)) = prefix.caches[link].split(common - before)
        {
            return Some(self.cut(at, link, common, [Arc::new(first), Arc::new(second)]));
        }
        let shorter = Arc::clone(&prefix.caches[link.checked_sub(1)?]);
        self.kept.iter().position(|p| p.ends_with(&shorter))
    }

    /// Puts its two `parts` in the place of the cache `link` of a prefix, everywhere that it is
    /// kept, and keeps what the first `tokens` tokens of the prefix then are. The parts are copies:
    /// rows under way read the whole.
    fn cut(&mut self, at: usize, link: usize, tokens: usize, parts: [Arc<KvCache>; 2]) -> usize {
        let whole = Arc::clone(&self.kept[at].caches[link]);
        for prefix in &mut self.kept {
            let place = prefix.caches.iter().position(|c| Arc::ptr_eq(c, &whole));
            if let Some(place) = place {
                drop(prefix.caches.splice(place..=place, parts.iter().cloned()));
            }
        }
        let longer = &self.kept[at];
        let start = Prefix {
            owner: longer.owner.clone(),
            tokens: longer.tokens[..tokens].to_vec(),
            caches: longer.caches[..=link].to_vec(),
            token_bytes: longer.token_bytes,
        };
        self.kept.push(start);
        self.kept.len() - 1
    }

    /// How much the prompt has in common with one of late.
    fn common(&self, owner: &Owner, prompt: &[u32]) -> usize {
        let same = self.recent.iter().filter(|(of, _)| of == owner);
        let common = same.map(|(_, other)| alike(prompt, other));
        common.max().unwrap_or(0)
    }

    /// Computes `tokens`, which `row` begins with, after the prefix `known`, and keeps it.
    fn extend(
        &mut self,
        row: &Row,
        known: Option<usize>,
        tokens: &[u32],
    ) -> Result<usize, ModelError> {
        let llama = &row.llama;
        let (start, mut caches) = match known {
            Some(at) => (self.kept[at].tokens.len(), self.kept[at].caches.clone()),
            None => (0, Vec::new()),
        };
        let mut own = llama.cache(tokens.len() - start);
        llama.forward(vec![Run {
            tokens: &tokens[start..],
            past: caches.iter().map(AsRef::as_ref).collect(),
            own: &mut own,
            adapter: row.first_adapter(),
        }])?;
        let config = &llama.base().weights.config;
        caches.push(Arc::new(own));
        self.kept.push(Prefix {
            owner: Owner::of(row),
            tokens: tokens.to_vec(),
            caches,
            token_bytes: config.layers * config.kv_width() * 2 * size_of::<f32>(),
        });
        Ok(self.kept.len() - 1)
    }

    fn shrink(&mut self) {
        let mut bytes: usize = self.kept.iter().map(Prefix::bytes).sum();
        while bytes > self.room && !self.kept.is_empty() {
            bytes -= self.kept.remove(0).bytes();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::chat_template::ChatMessage;
    use crate::generate::{GenerateOptions, GenerateRequest, Generator};
    use crate::tiny;

    fn row(generator: &Generator, prompt: Vec<u32>) -> Row {
        let request = GenerateRequest {
            messages: vec![ChatMessage::new("user", "")],
            template_arguments: BTreeMap::new(),
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
    fn a_start_that_a_prompt_leaves_halfway_is_cut_there_and_not_computed_again() {
        let generator = generator();
        let mut prefixes = Prefixes::new(usize::MAX);
        let long: Vec<u32> = (0..200).map(|i| 3 + i % 40).collect();
        let mut shared = |length: usize, own: u32| {
            let mut row = row(&generator, prompt(&long[..length], own));
            prefixes.share(&mut row).unwrap();
            let tokens: usize = row.past.iter().map(|cache| cache.len()).sum();
            (tokens, row.pending.len())
        };
        assert_eq!(shared(100, 1), (0, 101));
        assert_eq!(shared(100, 2), (100, 1));
        assert_eq!(shared(60, 1), (60, 1));
        assert_eq!(shared(30, 1), (30, 1));
        // Too near to where another one begins to be one of its own.
        assert_eq!(shared(40, 1), (30, 11));
        assert_eq!(shared(100, 3), (100, 1));
        let lengths: Vec<usize> = prefixes.kept.iter().map(|p| p.tokens.len()).collect();
        assert_eq!(lengths, [100, 60, 30]);
        assert_eq!(held(&prefixes), 100);
        for prefix in &prefixes.kept {
            let tokens: usize = prefix.caches.iter().map(|cache| cache.len()).sum();
            assert_eq!(tokens, prefix.tokens.len());
        }
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
