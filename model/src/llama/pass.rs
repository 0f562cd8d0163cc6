//! One chunk of runs through all layers.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::attention::attend;
use super::delta::Adapter;
use super::matrices::Matrix;
use super::{Llama, Run};
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::kernels::View;
use crate::kernels::matmul::{Into, Threads};
use crate::kernels::rows::{add_bias, gate_mul, rms_norm, rotate};
use crate::kernels::vector::rms_norm_row;
use crate::lora::Module;
use crate::profile::{self, Operation};
use crate::weights::{LayerWeights, PostNorms};

/// Activations of a chunk, reused by every layer. `m` is the number of tokens.
struct Activations {
    /// The residual stream, `[m, hidden]`.
    x: Vec<f32>,
    /// `x` normed, or what a block makes before it is normed, `[m, hidden]`.
    h: Vec<f32>,
    /// `[m, heads * head_dim]`.
    q: Vec<f32>,
    /// `[m, kv_width]` each.
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention returns, as `q`.
    mixed: Vec<f32>,
    /// `[m, ffn]` each.
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Cosines and sines of each token's position, `[m, head_dim / 2]` each, by frequency table.
    turns: Vec<[Vec<f32>; 2]>,
    scores: Vec<f32>,
    inner: Vec<f32>,
}

impl Llama {
    /// Feeds `runs` and returns the normed hidden state of each run's last token.
    pub(super) fn pass(
        &self,
        mut runs: Vec<Run<'_>>,
        threads: Threads,
    ) -> Result<Vec<f32>, ModelError> {
        let weights = &self.base.weights;
        let config = &weights.config;
        let mut state = self.start(&runs)?;
        let adapted = adapted(&runs);
        for layer in 0..config.layers {
            self.project(layer, &adapted, &mut state, threads)?;
            mix(config, layer, &mut runs, &mut state, threads);
            self.finish(layer, &adapted, &mut state, threads)?;
        }
        for run in &mut runs {
            run.own.grow(run.tokens.len());
        }
        let norm = View::new(&weights.norm)?;
        let mut out = vec![0.0; runs.len() * config.hidden];
        let mut end = 0;
        for (run, out) in runs.iter().zip(out.chunks_exact_mut(config.hidden)) {
            end += run.tokens.len();
            let last = &state.x[(end - 1) * config.hidden..end * config.hidden];
            rms_norm_row(out, last, &norm, config.norm_eps as f32);
        }
        Ok(out)
    }

    /// Embeddings and rotations of every token.
    fn start(&self, runs: &[Run<'_>]) -> Result<Activations, ModelError> {
        let weights = &self.base.weights;
        let c = &weights.config;
        let embed = View::new(&weights.embed)?;
        let mut x = Vec::new();
        let mut turns = vec![[Vec::new(), Vec::new()]; self.frequencies.len()];
        for run in runs {
            let before: usize = run.past.iter().map(|past| past.len()).sum();
            for (offset, token) in run.tokens.iter().enumerate() {
                x.extend_from_slice(&embed[*token as usize * c.hidden..][..c.hidden]);
                let position = (before + run.own.len() + offset) as f64;
                for ([cos, sin], frequencies) in turns.iter_mut().zip(&self.frequencies) {
                    cos.extend(frequencies.iter().map(|f| (position * f).cos() as f32));
                    sin.extend(frequencies.iter().map(|f| (position * f).sin() as f32));
                }
            }
        }
        let m = x.len() / c.hidden;
        Ok(Activations {
            h: vec![0.0; x.len()],
            q: vec![0.0; m * c.q_width()],
            k: vec![0.0; m * c.kv_width()],
            v: vec![0.0; m * c.kv_width()],
            mixed: vec![0.0; m * c.q_width()],
            gate: vec![0.0; m * c.ffn],
            up: vec![0.0; m * c.ffn],
            scores: Vec::new(),
            inner: Vec::new(),
            x,
            turns,
        })
    }

    /// Queries, keys and values, rotated; queries carry the scale of the scores.
    fn project(
        &self,
        layer: usize,
        adapted: &[(Range<usize>, &Adapter)],
        state: &mut Activations,
        threads: Threads,
    ) -> Result<(), ModelError> {
        let weights = &self.base.weights;
        let c = &weights.config;
        let Activations {
            x,
            h,
            q,
            k,
            v,
            inner,
            ..
        } = state;
        norm(
            x,
            &View::new(&weights.layers[layer].attn_norm)?,
            c.norm_eps,
            h,
        );
        self.linear(layer, Module::Q, h, q, Into::Replace, threads)?;
        self.linear(layer, Module::K, h, k, Into::Replace, threads)?;
        self.linear(layer, Module::V, h, v, Into::Replace, threads)?;
        for (rows, adapter) in adapted {
            let h = &h[scaled(rows, c.hidden)];
            let q = &mut q[scaled(rows, c.q_width())];
            let (k, v) = (
                &mut k[scaled(rows, c.kv_width())],
                &mut v[scaled(rows, c.kv_width())],
            );
            adapter.layer(layer).qkv.add(h, [q, k, v], inner, threads);
        }
        complete(&weights.layers[layer], c.norm_eps, [q, k, v])?;
        let _counted = profile::scope(Operation::Attention);
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let half = c.head_dim / 2;
        let [cos, sin] = &state.turns[c.frequency_table(layer)];
        let turns = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        let tokens = q
            .chunks_exact_mut(c.q_width())
            .zip(k.chunks_exact_mut(c.kv_width()));
        for ((q, k), (cos, sin)) in tokens.zip(turns) {
            rotate(q, cos, sin, scale);
            rotate(k, cos, sin, 1.0);
        }
        Ok(())
    }

    /// The output projection and the feed-forward layer, both added to the residual stream.
    fn finish(
        &self,
        layer: usize,
        adapted: &[(Range<usize>, &Adapter)],
        state: &mut Activations,
        threads: Threads,
    ) -> Result<(), ModelError> {
        let weights = &self.base.weights;
        let c = &weights.config;
        let Activations {
            x,
            h,
            mixed,
            gate,
            up,
            inner,
            ..
        } = state;
        let post = weights.layers[layer].post_norms.as_ref();
        let (out, into) = way_back(post, x, h);
        self.linear(layer, Module::O, mixed, out, into, threads)?;
        for (rows, adapter) in adapted {
            let out = &mut out[scaled(rows, c.hidden)];
            let mixed = &mixed[scaled(rows, c.q_width())];
            adapter.layer(layer).o.add(mixed, [out], inner, threads);
        }
        come_back(post.map(|norms| &norms.attn), c.norm_eps, h, x)?;
        norm(
            x,
            &View::new(&weights.layers[layer].ffn_norm)?,
            c.norm_eps,
            h,
        );
        self.linear(layer, Module::Gate, h, gate, Into::Replace, threads)?;
        self.linear(layer, Module::Up, h, up, Into::Replace, threads)?;
        for (rows, adapter) in adapted {
            let h = &h[scaled(rows, c.hidden)];
            let outs = [&mut gate[scaled(rows, c.ffn)], &mut up[scaled(rows, c.ffn)]];
            adapter.layer(layer).gate_up.add(h, outs, inner, threads);
        }
        let counted = profile::scope(Operation::Elementwise);
        gate_mul(c.parts.activation, gate, up);
        drop(counted);
        let (out, into) = way_back(post, x, h);
        self.linear(layer, Module::Down, gate, out, into, threads)?;
        for (rows, adapter) in adapted {
            let out = &mut out[scaled(rows, c.hidden)];
            let gate = &gate[scaled(rows, c.ffn)];
            adapter.layer(layer).down.add(gate, [out], inner, threads);
        }
        come_back(post.map(|norms| &norms.ffn), c.norm_eps, h, x)
    }

    fn linear(
        &self,
        layer: usize,
        module: Module,
        x: &[f32],
        out: &mut [f32],
        into: Into,
        threads: Threads,
    ) -> Result<(), ModelError> {
        let _counted = profile::scope(Operation::Products);
        let matrix = Matrix::of_layer(&self.base.weights, self.int8()?, layer, module)?;
        matrix.times(x, out, into, threads);
        Ok(())
    }
}

/// Adds the biases to queries, keys and values, and norms the heads, where the layer does so.
fn complete(layer: &LayerWeights, eps: f64, [q, k, v]: [&mut [f32]; 3]) -> Result<(), ModelError> {
    let _counted = profile::scope(Operation::Elementwise);
    if let Some(bias) = &layer.bias {
        add_bias(q, &View::new(&bias.q)?);
        add_bias(k, &View::new(&bias.k)?);
        add_bias(v, &View::new(&bias.v)?);
    }
    if let Some(norms) = &layer.head_norms {
        rms_norm(q, &View::new(&norms.q)?, eps as f32);
        rms_norm(k, &View::new(&norms.k)?, eps as f32);
    }
    Ok(())
}

/// Where a block writes: to the residual stream `x`, or to `h` where a norm comes before that.
fn way_back<'a>(
    post: Option<&PostNorms>,
    x: &'a mut [f32],
    h: &'a mut [f32],
) -> (&'a mut [f32], Into) {
    match post {
        None => (x, Into::Add),
        Some(_) => (h, Into::Replace),
    }
}

/// Adds `h` to `x`, normed, where a norm comes before that.
fn come_back(
    post: Option<&Tensor>,
    eps: f64,
    h: &mut [f32],
    x: &mut [f32],
) -> Result<(), ModelError> {
    if let Some(weight) = post {
        let _counted = profile::scope(Operation::Elementwise);
        rms_norm(h, &View::new(weight)?, eps as f32);
        for (x, h) in x.iter_mut().zip(h) {
            *x += *h;
        }
    }
    Ok(())
}

/// Neighbouring rows with one adapter.
fn adapted<'a>(runs: &[Run<'a>]) -> Vec<(Range<usize>, &'a Adapter)> {
    let mut found: Vec<(Range<usize>, &Adapter)> = Vec::new();
    let mut start = 0;
    for run in runs {
        let rows = start..start + run.tokens.len();
        start = rows.end;
        let Some(adapter) = run.adapter else { continue };
        match found.last_mut() {
            Some((before, other)) if before.end == rows.start && std::ptr::eq(*other, adapter) => {
                before.end = rows.end;
            }
            _ => found.push((rows, adapter)),
        }
    }
    found
}

/// Rows as a range of values.
fn scaled(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

fn norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    let _counted = profile::scope(Operation::Elementwise);
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        rms_norm_row(out, x, weight, eps as f32);
    }
}

/// Attention, run by run: several runs at the same time, or the products of one on all threads.
fn mix(
    c: &LlamaConfig,
    layer: usize,
    runs: &mut [Run<'_>],
    state: &mut Activations,
    threads: Threads,
) {
    let _counted = profile::scope(Operation::Attention);
    let mut start = 0;
    for run in runs.iter_mut() {
        let rows = start..start + run.tokens.len();
        start = rows.end;
        let kv = rows.start * c.kv_width()..rows.end * c.kv_width();
        run.own.append(layer, &state.k[kv.clone()], &state.v[kv]);
    }
    let (mut queries, mut out) = (&state.q[..], &mut state.mixed[..]);
    let parts = runs.iter().map(|run| {
        let width = run.tokens.len() * c.q_width();
        let own = queries.split_off(..width).unwrap_or_default();
        let mixed = out.split_off_mut(..width).unwrap_or_default();
        let past = run.past.iter().map(|past| past.layer(layer));
        let stretches: Vec<_> = past.chain([run.own.layer(layer)]).collect();
        (own, stretches, mixed)
    });
    let parts: Vec<_> = parts.collect();
    let pool = rayon::current_num_threads();
    if threads == Threads::All && pool > 1 && parts.len() >= pool {
        let parts = parts.into_par_iter();
        parts.for_each_init(Vec::new, |scores, (queries, stretches, out)| {
            attend(c, layer, queries, &stretches, out, scores, Threads::One);
        });
        return;
    }
    for (queries, stretches, out) in parts {
        let scores = &mut state.scores;
        attend(c, layer, queries, &stretches, out, scores, threads);
    }
}
