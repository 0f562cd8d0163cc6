//! [`Breakdown`]: where the time of a pass goes, and those of reading a prompt and of decoding.
//!
//! Knows no training. Invariant: the parts of a breakdown sum to its seconds.

use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::REQUESTS;
use crate::base_model::BaseModel;
use crate::device::Device;
use crate::error::ModelError;
use crate::llama::{KvCache, Llama, Precision, Run};
use crate::lora::{LoraAdapter, LoraConfig};
use crate::profile::{self, Operation, Spent};

/// Tokens of the prompt.
const PROMPT: usize = 512;
/// Steps of decoding over which the mean is taken.
const DECODED: usize = 16;

/// Where the time of a pass goes. What otherwise goes side by side goes one after the other while
/// it is measured, so the whole may take longer than elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Breakdown {
    /// Of what.
    pub name: String,
    /// Seconds of all parts.
    pub seconds: f64,
    /// By operation, in the order of [`Operation::ALL`].
    pub parts: Vec<Part>,
}

/// What one operation takes of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    /// Which.
    pub operation: Operation,
    /// Seconds.
    pub seconds: f64,
}

impl Breakdown {
    /// The mean of `count` passes that took `spent` together.
    pub(super) fn of(name: String, spent: &Spent, count: u32) -> Self {
        let all: Duration = spent.iter().sum();
        let seconds = |time: &Duration| time.as_secs_f64() / f64::from(count);
        let part = |(operation, time): (Operation, &Duration)| Part {
            operation,
            seconds: seconds(time),
        };
        Self {
            name,
            seconds: seconds(&all),
            parts: Operation::ALL.into_iter().zip(spent).map(part).collect(),
        }
    }
}

/// Reading a prompt, and decoding a token for 16 requests that have it in common; with an adapter.
pub(super) fn answering(
    base: &Arc<BaseModel>,
    precision: Precision,
) -> Result<[Breakdown; 2], ModelError> {
    let config = &base.weights.config;
    let adapter = LoraAdapter::init(&LoraConfig::default(), config, 3)?;
    let llama = Llama::on(Arc::clone(base), Some(&adapter), precision, Device::Cpu)?;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let most = config.vocab as u32;
    let tokens: Vec<u32> = (0..PROMPT).map(|_| rng.random_range(0..most)).collect();
    let read = || -> Result<KvCache, ModelError> {
        let mut own = llama.cache(tokens.len());
        llama.forward(vec![Run {
            tokens: &tokens,
            past: Vec::new(),
            own: &mut own,
            adapter: llama.adapter(),
        }])?;
        Ok(own)
    };
    read()?;
    profile::start();
    let start = read();
    let reading = profile::stop();
    let start = start?;
    let mut rows: Vec<_> = tokens.iter().take(REQUESTS).copied().collect();
    let mut caches: Vec<_> = rows.iter().map(|_| llama.cache(DECODED + 1)).collect();
    let mut step = || decode(&llama, &start, &mut rows, &mut caches);
    step()?;
    profile::start();
    let decoded: Result<(), ModelError> = (0..DECODED).try_for_each(|_| step());
    let decoding = profile::stop();
    decoded?;
    let precision = match precision {
        Precision::Int8 => "8 bits",
        Precision::F32 => "f32",
    };
    Ok([
        Breakdown::of(
            format!("prompt of {PROMPT} tokens, {precision}"),
            &reading,
            1,
        ),
        Breakdown::of(
            format!("decoding a token of {REQUESTS} requests, {precision}"),
            &decoding,
            DECODED as u32,
        ),
    ])
}

/// Feeds the last token of every row and puts the likeliest next one in its place.
fn decode(
    llama: &Llama,
    start: &KvCache,
    rows: &mut [u32],
    caches: &mut [KvCache],
) -> Result<(), ModelError> {
    let runs = rows.iter().zip(caches).map(|(token, own)| Run {
        tokens: std::slice::from_ref(token),
        past: vec![start],
        own,
        adapter: llama.adapter(),
    });
    let hidden = llama.forward(runs.collect())?;
    let logits = llama.logits(&hidden)?;
    let vocab = llama.base().weights.config.vocab;
    for (token, logits) in rows.iter_mut().zip(logits.chunks_exact(vocab)) {
        let likeliest = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        *token = likeliest.map_or(0, |at| at as u32);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tiny;

    #[test]
    fn a_pass_is_told_apart_and_its_parts_are_all_of_it() {
        let found = answering(&tiny::base(1), Precision::F32).unwrap();
        let parts = |found: &Breakdown, wanted: Operation| {
            let part = found.parts.iter().find(|part| part.operation == wanted);
            part.unwrap().seconds
        };
        for breakdown in &found {
            let sum: f64 = breakdown.parts.iter().map(|part| part.seconds).sum();
            assert!((sum - breakdown.seconds).abs() < 1e-9, "{}", breakdown.name);
            for operation in [
                Operation::Products,
                Operation::Lora,
                Operation::Attention,
                Operation::Elementwise,
            ] {
                let seconds = parts(breakdown, operation);
                assert!(seconds > 0.0, "{} {operation:?}", breakdown.name);
            }
            assert_eq!(parts(breakdown, Operation::Optimizer), 0.0);
        }
        // Only decoding looks at the head.
        let [prompt, decoding] = &found;
        assert_eq!(parts(prompt, Operation::Head), 0.0);
        assert!(parts(decoding, Operation::Head) > 0.0);
    }
}
