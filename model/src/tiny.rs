//! Tiny random models for tests, and their forward pass once more, slowly and in f64.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::architecture::{self, Architecture, tiny_local};
use crate::base_model::BaseModel;
use crate::chat_template::{ChatMessage, ChatTemplate, TemplateArguments};
use crate::config::{Activation, LlamaConfig};
use crate::generate::GenerateRequest;
use crate::lora::{LoraAdapter, LoraConfig, LoraPair, Module};
use crate::tokenizer::tiny_tokenizer;
use crate::weights::{HeadNorms, LayerWeights, LlamaWeights, PostNorms, QkvBias};

fn tensor(rng: &mut ChaCha8Rng, shape: (usize, usize), size: f32) -> Tensor {
    let n = shape.0 * shape.1;
    let values: Vec<f32> = (0..n)
        .map(|_| (2.0 * rng.random::<f32>() - 1.0) * size)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("the sizes fit")
}

/// A Llama with grouped heads, an untied head and a byte tokenizer.
pub(crate) fn base(seed: u64) -> Arc<BaseModel> {
    base_of(architecture::ALL[0], seed)
}

/// The same of another architecture.
pub(crate) fn base_of(architecture: &Architecture, seed: u64) -> Arc<BaseModel> {
    let parts = architecture.parts;
    let tokenizer = tiny_tokenizer();
    let config = LlamaConfig {
        hidden: 16,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 20,
        vocab: tokenizer.vocab_size() + 3,
        context: 256,
        rope_theta: 100.0,
        rope_scaling: None,
        norm_eps: 1e-5,
        tied_head: false,
        parts,
        local: tiny_local(architecture, 2),
    };
    let c = config.clone();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut linear =
        |out: usize, input: usize| tensor(&mut rng, (out, input), 2.5 / (input as f32).sqrt());
    let ones = |t: Tensor| {
        t.flatten_all()
            .and_then(|t| t.affine(0.2, 1.0))
            .expect("f32")
    };
    let layers = (0..c.layers).map(|_| LayerWeights {
        attn_norm: ones(linear(1, c.hidden)),
        q: linear(c.q_width(), c.hidden),
        k: linear(c.kv_width(), c.hidden),
        v: linear(c.kv_width(), c.hidden),
        o: linear(c.hidden, c.q_width()),
        ffn_norm: ones(linear(1, c.hidden)),
        gate: linear(c.ffn, c.hidden),
        up: linear(c.ffn, c.hidden),
        down: linear(c.hidden, c.ffn),
        bias: parts.qkv_bias.then(|| QkvBias {
            q: linear(1, c.q_width()).flatten_all().expect("flat"),
            k: linear(1, c.kv_width()).flatten_all().expect("flat"),
            v: linear(1, c.kv_width()).flatten_all().expect("flat"),
        }),
        head_norms: parts.head_norms.then(|| HeadNorms {
            q: ones(linear(1, c.head_dim)),
            k: ones(linear(1, c.head_dim)),
        }),
        post_norms: parts.post_norms.then(|| PostNorms {
            attn: ones(linear(1, c.hidden)),
            ffn: ones(linear(1, c.hidden)),
        }),
    });
    let layers = layers.collect();
    let weights = LlamaWeights {
        embed: linear(c.vocab, c.hidden),
        layers,
        norm: ones(linear(1, c.hidden)),
        head: (linear(c.vocab, c.hidden) * 2.0).expect("f32"),
        config,
    };
    let chat = ChatTemplate::chatml().expect("ChatML parses");
    let id = format!("tiny-{seed}");
    Arc::new(BaseModel::new(weights, tokenizer, chat, &id))
}

/// An adapter on some of the modules, with a `b` that is not zero.
pub(crate) fn adapter(model: &LlamaConfig, seed: u64) -> LoraAdapter {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let modules = [Module::Q, Module::V, Module::O, Module::Gate, Module::Down];
    let config = LoraConfig {
        rank: 3,
        alpha: 6.0,
        dropout: 0.0,
        target_modules: modules.map(|m| m.name().to_owned()).to_vec(),
        invocation_tokens: None,
    };
    let layers = (0..model.layers).map(|_| {
        let pair = |module: Module| {
            let a = tensor(&mut rng, (3, module.input(model)), 0.5);
            let b = tensor(&mut rng, (module.output(model), 3), 0.3);
            (module.name().to_owned(), LoraPair { a, b })
        };
        modules.map(pair).into_iter().collect::<BTreeMap<_, _>>()
    });
    LoraAdapter {
        layers: layers.collect(),
        config,
    }
}

/// A greedy chat of one message.
pub(crate) fn request(text: &str, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        messages: vec![ChatMessage::new("user", text)],
        template_arguments: TemplateArguments::new(),
        max_tokens,
        temperature: 0.0,
        seed: None,
        stop: vec![],
        choices: None,
    }
}

/// `rows · wᵀ`, plus the adapter's share.
fn linear(x: &[Vec<f64>], w: &Tensor, pair: Option<&LoraPair>, scale: f64) -> Vec<Vec<f64>> {
    let w: Vec<Vec<f32>> = w.to_vec2().expect("a matrix");
    let times = |x: &[f64], w: &[Vec<f32>]| -> Vec<f64> {
        w.iter()
            .map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect()
    };
    let row = |x: &Vec<f64>| {
        let mut y = times(x, &w);
        if let Some(pair) = pair {
            let inner = times(x, &pair.a.to_vec2().expect("a matrix"));
            let delta = times(&inner, &pair.b.to_vec2().expect("a matrix"));
            y.iter_mut().zip(delta).for_each(|(y, d)| *y += scale * d);
        }
        y
    };
    x.iter().map(row).collect()
}

fn norm(x: &[Vec<f64>], w: &Tensor, eps: f64) -> Vec<Vec<f64>> {
    let w: Vec<f32> = w.to_vec1().expect("a vector");
    let row = |x: &Vec<f64>| {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        x.iter()
            .zip(&w)
            .map(|(v, w)| v / (mean + eps).sqrt() * f64::from(*w))
            .collect()
    };
    x.iter().map(row).collect()
}

/// The biases and the norms of the heads, where `layer` has them.
fn complete(layer: &LayerWeights, c: &LlamaConfig, qkv: [&mut Vec<Vec<f64>>; 3]) {
    let [q, k, v] = qkv;
    if let Some(bias) = &layer.bias {
        for (rows, bias) in [(&mut *q, &bias.q), (&mut *k, &bias.k), (v, &bias.v)] {
            let bias: Vec<f32> = bias.to_vec1().expect("a vector");
            for row in rows {
                let values = row.iter_mut().zip(&bias);
                values.for_each(|(value, bias)| *value += f64::from(*bias));
            }
        }
    }
    if let Some(norms) = &layer.head_norms {
        for (rows, weight) in [(q, &norms.q), (k, &norms.k)] {
            for row in rows {
                let heads: Vec<Vec<f64>> = row.chunks(c.head_dim).map(<[f64]>::to_vec).collect();
                *row = norm(&heads, weight, c.norm_eps).concat();
            }
        }
    }
}

/// `x += y`, `y` normed first where `layer` does so after this block.
fn add(x: &mut [Vec<f64>], y: Vec<Vec<f64>>, post: Option<&Tensor>, eps: f64) {
    let y = post.map_or(y.clone(), |weight| norm(&y, weight, eps));
    for (x, y) in x.iter_mut().flatten().zip(y.into_iter().flatten()) {
        *x += y;
    }
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + z.tanh())
        }
    }
}

fn rotate(x: &mut [Vec<f64>], config: &LlamaConfig, layer: usize) {
    let mut tables = config.frequency_tables();
    let frequencies = tables.swap_remove(config.frequency_table(layer));
    let half = frequencies.len();
    for (position, row) in x.iter_mut().enumerate() {
        for head in row.chunks_mut(2 * half) {
            for (i, f) in frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * f).sin_cos();
                let (a, b) = (head[i], head[i + half]);
                (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
}

/// Logits after the last of `tokens`.
pub(crate) fn logits(base: &BaseModel, adapter: Option<&LoraAdapter>, tokens: &[u32]) -> Vec<f64> {
    let (weights, c) = (&base.weights, &base.weights.config);
    let embed: Vec<Vec<f32>> = weights.embed.to_vec2().expect("a matrix");
    let row = |t: &u32| embed[*t as usize].iter().map(|v| f64::from(*v)).collect();
    let mut x: Vec<Vec<f64>> = tokens.iter().map(row).collect();
    for (index, layer) in weights.layers.iter().enumerate() {
        let linear = |x: &[Vec<f64>], w: &Tensor, module: Module| {
            let pair = adapter.and_then(|a| a.layers[index].get(module.name()));
            linear(x, w, pair, adapter.map_or(0.0, |a| a.scale()))
        };
        let h = norm(&x, &layer.attn_norm, c.norm_eps);
        let mut q = linear(&h, &layer.q, Module::Q);
        let mut k = linear(&h, &layer.k, Module::K);
        let mut v = linear(&h, &layer.v, Module::V);
        complete(layer, c, [&mut q, &mut k, &mut v]);
        rotate(&mut q, c, index);
        rotate(&mut k, c, index);
        let window = c.window(index).unwrap_or(usize::MAX);
        let mut mixed = vec![vec![0.0; c.q_width()]; tokens.len()];
        for t in 0..tokens.len() {
            for head in 0..c.heads {
                let from = head * c.head_dim;
                let kv = head / (c.heads / c.kv_heads) * c.head_dim;
                let score = |s: usize| {
                    let dot: f64 = (0..c.head_dim).map(|d| q[t][from + d] * k[s][kv + d]).sum();
                    (dot / (c.head_dim as f64).sqrt()).exp()
                };
                let first = (t + 1).saturating_sub(window);
                let scores: Vec<f64> = (first..=t).map(score).collect();
                let total: f64 = scores.iter().sum();
                for d in 0..c.head_dim {
                    let values = scores.iter().zip(&v[first..]);
                    let sum: f64 = values.map(|(p, v)| p * v[kv + d]).sum();
                    mixed[t][from + d] = sum / total;
                }
            }
        }
        let post = layer.post_norms.as_ref();
        let attended = linear(&mixed, &layer.o, Module::O);
        add(&mut x, attended, post.map(|p| &p.attn), c.norm_eps);
        let h = norm(&x, &layer.ffn_norm, c.norm_eps);
        let mut gate = linear(&h, &layer.gate, Module::Gate);
        let up = linear(&h, &layer.up, Module::Up);
        for (g, u) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
            *g = activate(c.parts.activation, *g) * u;
        }
        let fed = linear(&gate, &layer.down, Module::Down);
        add(&mut x, fed, post.map(|p| &p.ffn), c.norm_eps);
    }
    let last = norm(&x[tokens.len() - 1..], &weights.norm, c.norm_eps);
    linear(&last, &weights.head, None, 0.0).remove(0)
}
