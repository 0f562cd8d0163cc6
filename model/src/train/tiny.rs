//! Tiny random models for tests.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::row::TrainRow;
use crate::architecture::{self, Architecture, tiny_local};
use crate::config::{LayerParts, LlamaConfig};
use crate::lora::{LoraAdapter, LoraConfig, LoraPair, Module};
use crate::weights::{HeadNorms, LayerWeights, LlamaWeights, PostNorms, QkvBias};

pub(crate) fn config() -> LlamaConfig {
    LlamaConfig {
        hidden: 12,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 20,
        vocab: 31,
        context: 64,
        rope_theta: 100.0,
        rope_scaling: None,
        norm_eps: 1e-5,
        tied_head: false,
        parts: LayerParts::LLAMA,
        local: None,
    }
}

fn tensor(rng: &mut ChaCha8Rng, rows: usize, columns: usize, size: f32) -> Tensor {
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| (2.0 * rng.random::<f32>() - 1.0) * size)
        .collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("the sizes fit")
}

pub(crate) fn weights(seed: u64) -> LlamaWeights {
    weights_of(architecture::ALL[0], seed)
}

/// A model of another architecture than Llama.
pub(crate) fn weights_of(architecture: &Architecture, seed: u64) -> LlamaWeights {
    let c = LlamaConfig {
        parts: architecture.parts,
        local: tiny_local(architecture, config().layers),
        ..config()
    };
    weights_with(c, seed)
}

/// A model of these sizes.
pub(crate) fn weights_with(c: LlamaConfig, seed: u64) -> LlamaWeights {
    let parts = c.parts;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut linear =
        |out: usize, input: usize| tensor(&mut rng, out, input, 1.5 / (input as f32).sqrt());
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let layers = (0..c.layers).map(|_| LayerWeights {
        attn_norm: (linear(1, c.hidden).flatten_all().expect("flat") + 1.0).expect("f32"),
        q: linear(q, c.hidden),
        k: linear(kv, c.hidden),
        v: linear(kv, c.hidden),
        o: linear(c.hidden, q),
        ffn_norm: (linear(1, c.hidden).flatten_all().expect("flat") + 1.0).expect("f32"),
        gate: linear(c.ffn, c.hidden),
        up: linear(c.ffn, c.hidden),
        down: linear(c.hidden, c.ffn),
        bias: parts.qkv_bias.then(|| QkvBias {
            q: linear(1, q).flatten_all().expect("flat"),
            k: linear(1, kv).flatten_all().expect("flat"),
            v: linear(1, kv).flatten_all().expect("flat"),
        }),
        head_norms: parts.head_norms.then(|| HeadNorms {
            q: (linear(1, c.head_dim).flatten_all().expect("flat") + 1.0).expect("f32"),
            k: (linear(1, c.head_dim).flatten_all().expect("flat") + 1.0).expect("f32"),
        }),
        post_norms: parts.post_norms.then(|| PostNorms {
            attn: (linear(1, c.hidden).flatten_all().expect("flat") + 1.0).expect("f32"),
            ffn: (linear(1, c.hidden).flatten_all().expect("flat") + 1.0).expect("f32"),
        }),
    });
    let layers = layers.collect();
    LlamaWeights {
        embed: linear(c.vocab, c.hidden),
        layers,
        norm: (linear(1, c.hidden).flatten_all().expect("flat") + 1.0).expect("f32"),
        head: (linear(c.vocab, c.hidden) * 2.0).expect("f32"),
        config: c,
    }
}

/// All modules, at a low rank.
pub(crate) fn lora() -> LoraConfig {
    LoraConfig {
        rank: 3,
        alpha: 6.0,
        ..LoraConfig::default()
    }
}

/// An adapter whose `b` is not zero.
pub(crate) fn adapter(lora: &LoraConfig, model: &LlamaConfig, seed: u64) -> LoraAdapter {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let modules = lora.check().expect("a good config");
    let layers = (0..model.layers).map(|_| {
        let pair = |module: &Module| {
            let a = tensor(&mut rng, lora.rank, module.input(model), 0.5);
            let b = tensor(&mut rng, module.output(model), lora.rank, 0.3);
            (module.name().to_owned(), LoraPair { a, b })
        };
        modules.iter().map(pair).collect::<BTreeMap<_, _>>()
    });
    LoraAdapter {
        layers: layers.collect(),
        config: lora.clone(),
    }
}

/// Rows with a common start, of mixed lengths. The answer follows from the question.
pub(crate) fn rows(count: usize, seed: u64) -> Vec<TrainRow> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let row = |_| {
        let question: Vec<u32> = (0..rng.random_range(1..6))
            .map(|_| rng.random_range(8..30))
            .collect();
        let sort = question[0] % 3;
        TrainRow {
            prompt: [&[1, 2, 3, 4, 5, 6][..], &question, &[7]].concat(),
            target: [
                &[sort + 8, sort + 12][..],
                if sort == 0 { &[] } else { &[9] },
                &[0],
            ]
            .concat(),
            earlier: Vec::new(),
        }
    };
    (0..count).map(row).collect()
}
