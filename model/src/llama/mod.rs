//! Inference of a model of Llama's family: many token runs through the layers at once.
//!
//! Knows no text and no sampling. All runs of a call are laid end to end into one matrix, so
//! linear layers waste nothing on padding; only attention looks at one run at a time. The rows
//! of that matrix are split into chunks, one thread each, with no synchronisation inside a pass.
//! Invariant: a run's result does not depend on the other runs of the call, up to rounding.

mod attention;
mod delta;
mod kv_cache;
mod matrices;
#[cfg(feature = "cuda")]
mod on_gpu;
mod pass;

use std::sync::{Arc, Weak};

use rayon::prelude::*;

pub(crate) use delta::Adapter;
pub(crate) use kv_cache::KvCache;
pub(crate) use matrices::Int8Weights;
pub use matrices::Precision;

use crate::base_model::BaseModel;
use crate::device::Device;
use crate::error::ModelError;
use crate::kernels::View;
use crate::kernels::matmul::{Into, Threads};
use crate::kernels::vector::dot;
use crate::kernels::window::WHOLE;
use crate::lora::{LoraAdapter, Module};
use crate::profile::{self, Operation};
use matrices::Matrix;

/// Most tokens that one thread takes through the layers together: more would fall out of the
/// processor's cache.
const CHUNK: usize = 512;
/// Fewest tokens of a call for which splitting rows beats splitting each product.
const SPLIT: usize = 32;

/// Most tokens of one run in a pass: what they take besides keys and values is bounded by it. Whole
/// blocks of the attention.
const PIECE: usize = 4 * WHOLE;

/// Tokens that continue a sequence.
pub(crate) struct Run<'a> {
    /// The new tokens; at least one.
    pub(crate) tokens: &'a [u32],
    /// What came before `own`, in order; read only, so that runs can share it.
    pub(crate) past: Vec<&'a KvCache>,
    /// Where the keys and values of the new tokens are appended; what it already holds comes
    /// before the new tokens.
    pub(crate) own: &'a mut KvCache,
    /// The adapter of the new tokens; what came before may have had another one.
    pub(crate) adapter: Option<&'a Adapter>,
}

/// A base model with at most one adapter of its own, ready to run.
pub(crate) struct Llama {
    base: Arc<BaseModel>,
    adapter: Option<Adapter>,
    precision: Precision,
    /// Where it computes, when that is not the CPU.
    #[cfg(feature = "cuda")]
    on_gpu: Option<on_gpu::OnGpu>,
    /// See [`LlamaConfig::frequency_tables`](crate::config::LlamaConfig::frequency_tables).
    frequencies: Vec<Vec<f64>>,
}

impl Llama {
    /// The same on a device; `precision` is for the CPU alone.
    pub(crate) fn on(
        base: Arc<BaseModel>,
        adapter: Option<&LoraAdapter>,
        precision: Precision,
        device: Device,
    ) -> Result<Self, ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = device.open()? {
            return Self::new(base, adapter, Precision::F32)?.moved_to(&gpu);
        }
        device.gpu_name()?;
        Self::new(base, adapter, precision)
    }

    /// Checks that `adapter` fits `base` and repacks it for inference.
    pub(crate) fn new(
        base: Arc<BaseModel>,
        adapter: Option<&LoraAdapter>,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        let config = &base.weights.config;
        let adapter = adapter.map(|adapter| Adapter::new(adapter, config));
        let frequencies = config.frequency_tables();
        match precision {
            Precision::Int8 => {
                base.int8()?;
            }
            Precision::F32 if base.answers_only() => {
                return Err(ModelError::Config {
                    name: "precision",
                    reason: "this base model is in memory for 8-bit answers only; load all of it"
                        .to_owned(),
                });
            }
            Precision::F32 => {}
        }
        Ok(Self {
            adapter: adapter.transpose()?,
            precision,
            #[cfg(feature = "cuda")]
            on_gpu: None,
            frequencies,
            base,
        })
    }

    /// The adapter that it was made with.
    pub(crate) fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// Whether the two may compute together: they differ in their adapters at most.
    pub(crate) fn computes_with(&self, other: &Self) -> bool {
        #[cfg(feature = "cuda")]
        if !on_gpu::is_same(self.on_gpu.as_ref(), other.on_gpu.as_ref()) {
            return false;
        }
        Arc::ptr_eq(&self.base, &other.base) && self.precision == other.precision
    }

    /// The rounded weights, where they are wanted and there are any.
    fn int8(&self) -> Result<Option<&Int8Weights>, ModelError> {
        match self.precision {
            Precision::Int8 => self.base.int8(),
            Precision::F32 => Ok(None),
        }
    }

    pub(crate) fn base(&self) -> &BaseModel {
        &self.base
    }

    /// The base model, without keeping it.
    pub(crate) fn weak_base(&self) -> Weak<BaseModel> {
        Arc::downgrade(&self.base)
    }

    /// What its linear layers are computed with.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of the matrices that a token goes through, the head among them.
    pub(crate) fn matrix_bytes(&self) -> Result<usize, ModelError> {
        let (weights, int8) = (&self.base.weights, self.int8()?);
        let mut bytes = Matrix::head(weights, int8)?.bytes();
        for layer in 0..weights.config.layers {
            for module in Module::ALL {
                bytes += Matrix::of_layer(weights, int8, layer, module)?.bytes();
            }
        }
        Ok(bytes)
    }

    /// Whether it computes, and keeps keys and values, on a GPU.
    pub(crate) fn is_on_gpu(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.on_gpu.is_some();
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// An empty cache with room for `capacity` tokens.
    pub(crate) fn cache(&self, capacity: usize) -> KvCache {
        #[cfg(feature = "cuda")]
        if self.on_gpu.is_some() {
            return KvCache::default();
        }
        let config = &self.base.weights.config;
        KvCache::new(config.layers, config.kv_width(), capacity)
    }

    /// Feeds every run and returns the normed hidden state of each run's last token,
    /// `[runs, hidden]`.
    pub(crate) fn forward(&self, mut runs: Vec<Run<'_>>) -> Result<Vec<f32>, ModelError> {
        for run in &mut runs {
            self.shorten(run)?;
        }
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &self.on_gpu {
            return on_gpu.forward(runs, &self.frequencies);
        }
        let total: usize = runs.iter().map(|run| run.tokens.len()).sum();
        let longest = runs.iter().map(|run| run.tokens.len()).max().unwrap_or(0);
        let threads = rayon::current_num_threads();
        // Where one run takes half as much again as a thread's share, the others would wait for it.
        if threads == 1 || total < SPLIT || 2 * longest * threads > 3 * total {
            let whole = plan(runs, total.div_ceil(CHUNK * threads).max(1));
            let parts = whole.into_iter().map(|runs| self.pass(runs, Threads::All));
            return Ok(parts.collect::<Result<Vec<_>, _>>()?.concat());
        }
        let chunks = plan(runs, threads * total.div_ceil(CHUNK * threads));
        let parts = chunks
            .into_par_iter()
            .map(|runs| self.pass(runs, Threads::One));
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// Feeds all of a run but its last tokens, piece by piece.
    fn shorten(&self, run: &mut Run<'_>) -> Result<(), ModelError> {
        while run.tokens.len() > PIECE {
            let (now, later) = run.tokens.split_at(PIECE);
            let piece = Run {
                tokens: now,
                past: run.past.clone(),
                own: &mut *run.own,
                adapter: run.adapter,
            };
            self.feed(piece)?;
            run.tokens = later;
        }
        Ok(())
    }

    /// Feeds a run by itself.
    fn feed(&self, run: Run<'_>) -> Result<(), ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &self.on_gpu {
            return on_gpu.forward(vec![run], &self.frequencies).map(drop);
        }
        self.pass(vec![run], Threads::All).map(drop)
    }

    /// Logits over the whole vocabulary for `hidden`, `[rows, hidden]`.
    pub(crate) fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &self.on_gpu {
            return on_gpu.logits(hidden);
        }
        let _counted = profile::scope(Operation::Head);
        let weights = &self.base.weights;
        let (width, vocab) = (weights.config.hidden, weights.config.vocab);
        let mut logits = vec![0.0; hidden.len() / width * vocab];
        let head = Matrix::head(weights, self.int8()?)?;
        head.times(hidden, &mut logits, Into::Replace, Threads::All);
        Ok(logits)
    }

    /// Logits of a few tokens for one hidden state.
    pub(crate) fn logits_of(&self, hidden: &[f32], tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let weights = &self.base.weights;
        // A head of its own may be there in 8 bits only; the answer must not hang on that.
        let int8 = self.int8()?.filter(|_| !weights.config.tied_head);
        if let Some(head) = int8.and_then(Int8Weights::head) {
            let logit = |token: &u32| dot(hidden, &head.row(*token as usize));
            return Ok(tokens.iter().map(logit).collect());
        }
        let head = View::new(&weights.head)?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::LlamaConfig;
    use crate::{architecture, tiny};

    fn last_logits(
        llama: &Llama,
        adapter: Option<&Adapter>,
        past: Vec<&KvCache>,
        tokens: &[u32],
    ) -> (Vec<f32>, KvCache) {
        let mut own = llama.cache(0);
        let run = Run {
            tokens,
            past,
            own: &mut own,
            adapter,
        };
        let hidden = llama.forward(vec![run]).unwrap();
        (llama.logits(&hidden).unwrap(), own)
    }

    fn assert_close(got: &[f32], wanted: &[f64]) {
        assert_eq!(got.len(), wanted.len());
        let worst = got
            .iter()
            .zip(wanted)
            .map(|(g, w)| (f64::from(*g) - w).abs());
        assert!(worst.fold(0.0, f64::max) < 2e-4);
    }

    #[test]
    fn logits_equal_the_slow_pass_with_and_without_an_adapter() {
        let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 200).collect();
        let mut seen = Vec::new();
        for architecture in architecture::ALL {
            let base = tiny::base_of(architecture, 1);
            let adapter = tiny::adapter(&base.weights.config, 2);
            for adapter in [None, Some(&adapter)] {
                let llama = Llama::new(base.clone(), adapter, Precision::F32).unwrap();
                let (got, _) = last_logits(&llama, llama.adapter(), vec![], &tokens);
                assert_close(&got, &tiny::logits(&base, adapter, &tokens));
                assert!(!seen.contains(&got), "{} is another's", architecture.gguf);
                seen.push(got);
            }
        }
    }

    #[test]
    fn a_sequence_may_be_fed_in_stretches() {
        for architecture in architecture::ALL {
            fed_in_stretches(&tiny::base_of(architecture, 3));
        }
    }

    fn fed_in_stretches(base: &Arc<BaseModel>) {
        let llama = Llama::new(base.clone(), None, Precision::F32).unwrap();
        let tokens: Vec<u32> = (0..12).map(|i| i * 11 + 1).collect();
        let wanted = tiny::logits(base, None, &tokens);
        let (_, first) = last_logits(&llama, None, vec![], &tokens[..4]);
        let empty = llama.cache(0);
        let (_, mut second) = last_logits(&llama, None, vec![&first, &empty], &tokens[4..7]);
        let (got, _) = last_logits(&llama, None, vec![&first, &second], &tokens[7..]);
        assert_close(&got, &wanted);
        // Token by token into the same stretch.
        for token in tokens[7..].chunks(1) {
            let run = Run {
                tokens: token,
                past: vec![&first],
                own: &mut second,
                adapter: None,
            };
            let hidden = llama.forward(vec![run]).unwrap();
            if second.len() == 8 {
                assert_close(&llama.logits(&hidden).unwrap(), &wanted);
                let few = llama.logits_of(&hidden, &[7, 3]).unwrap();
                assert_close(&few, &[wanted[7], wanted[3]]);
            }
        }
    }

    #[test]
    fn windows_that_span_stretches_and_blocks_of_rows_are_those_of_the_slow_pass() {
        let base = tiny::base_of(architecture::ALL[3], 7);
        assert!(base.weights.config.local.is_some());
        let llama = Llama::new(base.clone(), None, Precision::F32).unwrap();
        let tokens: Vec<u32> = (0..120).map(|i| (i * 37 + 5) % 200).collect();
        let wanted = tiny::logits(&base, None, &tokens);
        for (first, second) in [(50, 51), (1, 40), (63, 119), (2, 3)] {
            let (_, one) = last_logits(&llama, None, vec![], &tokens[..first]);
            let (_, two) = last_logits(&llama, None, vec![&one], &tokens[first..second]);
            let (got, _) = last_logits(&llama, None, vec![&one, &two], &tokens[second..]);
            assert_close(&got, &wanted);
        }
    }

    #[test]
    fn a_long_run_goes_piece_by_piece_and_computes_the_same() {
        for architecture in [architecture::ALL[0], architecture::ALL[3]] {
            let base = tiny::base_of(architecture, 8);
            let adapter = tiny::adapter(&base.weights.config, 9);
            let llama = Llama::new(base, Some(&adapter), Precision::F32).unwrap();
            let tokens: Vec<u32> = (0..PIECE as u32 + 700).map(|i| (i * 37) % 200).collect();
            let (mut whole, mut pieces) = (llama.cache(0), llama.cache(0));
            let run = |own| Run {
                tokens: &tokens,
                past: vec![],
                own,
                adapter: llama.adapter(),
            };
            let wanted = llama.pass(vec![run(&mut whole)], Threads::One).unwrap();
            let got = llama.forward(vec![run(&mut pieces)]).unwrap();
            assert_eq!(pieces.len(), whole.len());
            let off = got.iter().zip(&wanted).map(|(a, b)| (a - b).abs());
            assert!(off.fold(0.0, f32::max) < 1e-4, "{}", architecture.gguf);
        }
    }

    #[test]
    fn runs_of_one_call_do_not_see_each_other() {
        let base = tiny::base(4);
        let llama = Llama::new(base.clone(), None, Precision::F32).unwrap();
        let length = |i: u32| 1 + (i * 7) % 5;
        let rows: Vec<Vec<u32>> = (0..30)
            .map(|i| (0..length(i)).map(|j| (i * 13 + j * 29) % 250).collect())
            .collect();
        let mut caches: Vec<KvCache> = rows.iter().map(|_| llama.cache(4)).collect();
        let runs = rows.iter().zip(&mut caches);
        let runs = runs
            .map(|(row, own)| Run {
                tokens: row,
                past: vec![],
                own,
                adapter: None,
            })
            .collect();
        let hidden = llama.forward(runs).unwrap();
        let logits = llama.logits(&hidden).unwrap();
        for (row, got) in rows.iter().zip(logits.chunks(base.weights.config.vocab)) {
            assert_close(got, &tiny::logits(&base, None, row));
        }
    }

    #[test]
    fn an_adapter_of_another_model_is_refused() {
        let base = tiny::base(5);
        let mut adapter = tiny::adapter(&base.weights.config, 6);
        adapter.layers.pop();
        let error = Adapter::new(&adapter, &base.weights.config).err().unwrap();
        assert_eq!(
            error.to_string(),
            "adapter: it has 1 layers, the base model 2"
        );
        let other = LlamaConfig {
            hidden: 18,
            ..base.weights.config.clone()
        };
        let adapter = tiny::adapter(&other, 6);
        let error = Adapter::new(&adapter, &base.weights.config)
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with("adapter: layer 0: `q_proj` has factors [3, 18]"),
            "{error}"
        );
    }
}
