//! Inference of a Llama model: many token runs through the layers at once.
//!
//! Knows no text and no sampling. All runs of a call are laid end to end into one matrix, so
//! linear layers waste nothing on padding; only attention looks at one run at a time. The rows
//! of that matrix are split into chunks, one thread each, with no synchronisation inside a pass.
//! Invariant: a run's result does not depend on the other runs of the call, up to rounding.

mod attention;
mod delta;
mod kv_cache;
mod pass;

use std::sync::Arc;

use rayon::prelude::*;

pub(crate) use kv_cache::KvCache;

use crate::base_model::BaseModel;
use crate::error::ModelError;
use crate::kernels::View;
use crate::kernels::matmul::{Into, Threads};
use crate::kernels::rows::linear;
use crate::kernels::vector::dot;
use crate::lora::LoraAdapter;
use delta::LayerDelta;

/// Most tokens that one thread takes through the layers together: more would fall out of the
/// processor's cache.
const CHUNK: usize = 512;
/// Fewest tokens of a call for which splitting rows beats splitting each product.
const SPLIT: usize = 32;

/// Tokens that continue a sequence.
pub(crate) struct Run<'a> {
    /// The new tokens; at least one.
    pub(crate) tokens: &'a [u32],
    /// What came before `own`, in order; read only, so that runs can share it.
    pub(crate) past: Vec<&'a KvCache>,
    /// Where the keys and values of the new tokens are appended; what it already holds comes
    /// before the new tokens.
    pub(crate) own: &'a mut KvCache,
}

/// A base model with at most one adapter, ready to run.
pub(crate) struct Llama {
    base: Arc<BaseModel>,
    deltas: Vec<LayerDelta>,
    frequencies: Vec<f64>,
}

impl Llama {
    /// Checks that `adapter` fits `base` and repacks it for inference.
    pub(crate) fn new(
        base: Arc<BaseModel>,
        adapter: Option<&LoraAdapter>,
    ) -> Result<Self, ModelError> {
        let config = &base.weights.config;
        let deltas = match adapter {
            Some(adapter) => delta::pack(adapter, config)?,
            None => Vec::new(),
        };
        let frequencies = config.inverse_frequencies();
        Ok(Self { base, deltas, frequencies })
    }

    pub(crate) fn base(&self) -> &BaseModel {
        &self.base
    }

    /// An empty cache with room for `capacity` tokens.
    pub(crate) fn cache(&self, capacity: usize) -> KvCache {
        let config = &self.base.weights.config;
        KvCache::new(config.layers, config.kv_width(), capacity)
    }

    /// Feeds every run and returns the normed hidden state of each run's last token,
    /// `[runs, hidden]`.
    pub(crate) fn forward(&self, runs: Vec<Run<'_>>) -> Result<Vec<f32>, ModelError> {
        let total: usize = runs.iter().map(|run| run.tokens.len()).sum();
        let longest = runs.iter().map(|run| run.tokens.len()).max().unwrap_or(0);
        let threads = rayon::current_num_threads();
        if threads == 1 || total < SPLIT || longest * threads > 2 * total {
            let whole = plan(runs, total.div_ceil(CHUNK * threads).max(1));
            let parts = whole.into_iter().map(|runs| self.pass(runs, Threads::All));
            return Ok(parts.collect::<Result<Vec<_>, _>>()?.concat());
        }
        let chunks = plan(runs, threads * total.div_ceil(CHUNK * threads));
        let parts = chunks.into_par_iter().map(|runs| self.pass(runs, Threads::One));
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// Logits over the whole vocabulary for `hidden`, `[rows, hidden]`.
    pub(crate) fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        let weights = &self.base.weights;
        let (width, vocab) = (weights.config.hidden, weights.config.vocab);
        let head = View::new(&weights.head)?;
        let mut logits = vec![0.0; hidden.len() / width * vocab];
        linear(hidden, &head, width, &mut logits, Into::Replace, Threads::All);
        Ok(logits)
    }

    /// Logits of a few tokens for one hidden state.
    pub(crate) fn logits_of(&self, hidden: &[f32], tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let head = View::new(&self.base.weights.head)?;
        let row = |token: &u32| &head[*token as usize * hidden.len()..][..hidden.len()];
        Ok(tokens.iter().map(|token| dot(hidden, row(token))).collect())
    }
}

/// Splits runs, in order, into at most `chunks` parts with about equally many tokens.
fn plan(runs: Vec<Run<'_>>, chunks: usize) -> Vec<Vec<Run<'_>>> {
    let total: usize = runs.iter().map(|run| run.tokens.len()).sum();
    let share = total.div_ceil(chunks).max(1);
    let mut parts: Vec<Vec<Run<'_>>> = Vec::new();
    parts.resize_with(chunks, Vec::new);
    let mut before = 0;
    for run in runs {
        // By the middle of the run: rounds to the nearer side of a boundary.
        let part = (before + run.tokens.len() / 2) / share;
        before += run.tokens.len();
        parts[part.min(chunks - 1)].push(run);
    }
    parts.retain(|part| !part.is_empty());
    parts
}
