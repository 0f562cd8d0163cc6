//! [`Starts`]: keys and values of what the prompts of a call began with, kept by the base model from
//! one call to the next.
//!
//! Only what the base model computed: the calls of all its activated adapters, and its own, find it
//! there, so that checkpoints that are scored on the same rows compute their common start once.
//! Knows no model. Invariants: a start serves a call that begins with exactly its tokens, so a call
//! gets what it would have computed itself, to the bit; what is kept takes no more than its room,
//! and what was unused longest goes first.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::llama::{KvCache, Precision};

/// Bytes of keys and values that are kept for a base model.
const ROOM: usize = 256 << 20;

/// What is kept.
pub(crate) struct Starts {
    room: usize,
    /// Most recently used last.
    kept: Mutex<VecDeque<Start>>,
}

struct Start {
    tokens: Vec<u32>,
    precision: Precision,
    cache: Arc<KvCache>,
}

impl Default for Starts {
    fn default() -> Self {
        Self::new(ROOM)
    }
}

impl std::fmt::Debug for Starts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Starts({})", self.kept().len())
    }
}

impl Starts {
    fn new(room: usize) -> Self {
        Self {
            room,
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Start>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keys and values of just these tokens, where they are kept.
    pub(super) fn get(&self, tokens: &[u32], precision: Precision) -> Option<Arc<KvCache>> {
        let mut kept = self.kept();
        let is_it = |start: &Start| start.precision == precision && start.tokens == tokens;
        let at = kept.iter().position(is_it)?;
        let start = kept.remove(at)?;
        let cache = Arc::clone(&start.cache);
        kept.push_back(start);
        Some(cache)
    }

    /// Keeps those of a start that was not there, if there is room for it at all.
    pub(super) fn keep(&self, tokens: &[u32], precision: Precision, cache: &Arc<KvCache>) {
        if cache.bytes() > self.room {
            return;
        }
        let mut kept = self.kept();
        kept.push_back(Start {
            tokens: tokens.to_vec(),
            precision,
            cache: Arc::clone(cache),
        });
        let mut bytes: usize = kept.iter().map(|start| start.cache.bytes()).sum();
        while bytes > self.room
            && let Some(oldest) = kept.pop_front()
        {
            bytes -= oldest.cache.bytes();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::base_model::BaseModel;
    use crate::generate::{ChoiceSet, GenerateOptions, Generated, Generator};
    use crate::tiny;

    impl Starts {
        fn caches(&self) -> Vec<Arc<KvCache>> {
            let kept = self.kept();
            kept.iter().map(|start| Arc::clone(&start.cache)).collect()
        }
    }

    /// What is asked of a model with an adapter, or of the base model.
    fn answers(
        base: &Arc<BaseModel>,
        adapter: Option<u64>,
        invocation: Option<&str>,
    ) -> Vec<Generated> {
        let adapter = adapter.map(|seed| {
            let mut adapter = tiny::adapter(&base.weights.config, seed);
            let tokens = invocation.map(|text| base.tokenizer.encode(text, true).unwrap());
            adapter.config.invocation_tokens = tokens;
            adapter
        });
        let options = GenerateOptions::default();
        let generator = Generator::new(base.clone(), adapter.as_ref(), options).unwrap();
        let request = |number: u32| {
            let text = format!("a question long enough to share its start: {number}");
            let mut request = tiny::request(&text, 7);
            // Its probabilities show a difference in the last bit.
            request.choices = (number > 1).then(|| ChoiceSet {
                after: None,
                values: vec!["yes".to_owned(), "no".to_owned()],
                then: String::new(),
            });
            request
        };
        let requests: Vec<_> = (0..4).map(request).collect();
        let answers = generator.generate(&requests, &|_, _| {}, &|| false);
        answers.into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn activated_adapters_and_their_base_compute_what_prompts_begin_with_once() {
        let base = tiny::base(1);
        let mark = Some("<|im_start|>assistant");
        let first = answers(&base, Some(2), mark);
        let kept = base.starts.caches();
        assert_eq!(kept.len(), 1);
        for (adapter, invocation) in [(Some(2), mark), (Some(3), mark), (None, None)] {
            let found = answers(&base, adapter, invocation);
            // Over a base model that kept nothing.
            assert_eq!(found, answers(&tiny::base(1), adapter, invocation));
            assert_eq!(found == first, adapter == Some(2));
            let now = base.starts.caches();
            assert!(now.len() == 1 && Arc::ptr_eq(&now[0], &kept[0]));
        }
    }

    #[test]
    fn what_a_plain_adapter_computed_is_its_own() {
        let base = tiny::base(1);
        let alone = answers(&tiny::base(1), Some(2), None);
        answers(&base, None, None);
        let kept = base.starts.caches();
        assert_eq!(answers(&base, Some(2), None), alone);
        assert_eq!(base.starts.caches().len(), kept.len());
    }

    #[test]
    fn what_was_unused_longest_goes_first() {
        let mut base = tiny::base(1);
        let config = &base.weights.config;
        let token = config.layers * config.kv_width() * 2 * size_of::<f32>();
        Arc::get_mut(&mut base).unwrap().starts = Starts::new(25 * token);
        let generator = Generator::new(base, None, GenerateOptions::default()).unwrap();
        let start = |first: u32, count: u32| {
            let tokens: Vec<u32> = (first..first + count).collect();
            generator.start(&tokens).unwrap()
        };
        let (one, two) = (start(1, 10), start(2, 10));
        assert!(Arc::ptr_eq(&start(1, 10), &one));
        start(3, 10);
        assert!(Arc::ptr_eq(&start(1, 10), &one));
        assert!(!Arc::ptr_eq(&start(2, 10), &two));
        // Longer than all of the room.
        let before = generator.base().starts.caches().len();
        start(4, 26);
        assert_eq!(generator.base().starts.caches().len(), before);
    }
}
