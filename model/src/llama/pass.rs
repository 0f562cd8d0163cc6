//! One chunk of runs through all layers.

use super::attention::attend;
use super::delta::LayerDelta;
use super::{Llama, Run};
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::kernels::View;
use crate::kernels::matmul::{Into, Threads};
use crate::kernels::rows::{linear, rotate, silu_mul};
use crate::kernels::vector::rms_norm_row;
use crate::weights::LayerWeights;

/// Activations of a chunk, reused by every layer. `m` is the number of tokens.
struct Activations {
    /// The residual stream, `[m, hidden]`.
    x: Vec<f32>,
    /// `x` normed, `[m, hidden]`.
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
    /// Rotations of each token's position, `[m, head_dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
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
        let none = LayerDelta::default();
        for (index, layer) in weights.layers.iter().enumerate() {
            let delta = self.deltas.get(index).unwrap_or(&none);
            project(config, layer, delta, &mut state, threads)?;
            mix(config, index, &mut runs, &mut state, threads);
            finish(config, layer, delta, &mut state, threads)?;
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
        let (mut x, mut cos, mut sin) = (Vec::new(), Vec::new(), Vec::new());
        for run in runs {
            let before: usize = run.past.iter().map(|past| past.len()).sum();
            for (offset, token) in run.tokens.iter().enumerate() {
                x.extend_from_slice(&embed[*token as usize * c.hidden..][..c.hidden]);
                let position = (before + run.own.len() + offset) as f64;
                cos.extend(self.frequencies.iter().map(|f| (position * f).cos() as f32));
                sin.extend(self.frequencies.iter().map(|f| (position * f).sin() as f32));
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
            cos,
            sin,
        })
    }
}

fn norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        rms_norm_row(out, x, weight, eps as f32);
    }
}

/// Queries, keys and values, rotated; queries carry the scale of the scores.
fn project(
    c: &LlamaConfig,
    layer: &LayerWeights,
    delta: &LayerDelta,
    state: &mut Activations,
    threads: Threads,
) -> Result<(), ModelError> {
    let Activations {
        x,
        h,
        q,
        k,
        v,
        inner,
        ..
    } = state;
    norm(x, &View::new(&layer.attn_norm)?, c.norm_eps, h);
    linear(
        h,
        &View::new(&layer.q)?,
        c.hidden,
        q,
        Into::Replace,
        threads,
    );
    linear(
        h,
        &View::new(&layer.k)?,
        c.hidden,
        k,
        Into::Replace,
        threads,
    );
    linear(
        h,
        &View::new(&layer.v)?,
        c.hidden,
        v,
        Into::Replace,
        threads,
    );
    delta.qkv.add(h, [&mut *q, &mut *k, v], inner, threads);
    let scale = 1.0 / (c.head_dim as f32).sqrt();
    let half = c.head_dim / 2;
    let turns = state
        .cos
        .chunks_exact(half)
        .zip(state.sin.chunks_exact(half));
    let tokens = q
        .chunks_exact_mut(c.q_width())
        .zip(k.chunks_exact_mut(c.kv_width()));
    for ((q, k), (cos, sin)) in tokens.zip(turns) {
        rotate(q, cos, sin, scale);
        rotate(k, cos, sin, 1.0);
    }
    Ok(())
}

/// Attention, run by run.
fn mix(
    c: &LlamaConfig,
    layer: usize,
    runs: &mut [Run<'_>],
    state: &mut Activations,
    threads: Threads,
) {
    let mut start = 0;
    for run in runs {
        let rows = start..start + run.tokens.len();
        start = rows.end;
        let kv = rows.start * c.kv_width()..rows.end * c.kv_width();
        run.own.append(layer, &state.k[kv.clone()], &state.v[kv]);
        let mut stretches: Vec<_> = run.past.iter().map(|past| past.layer(layer)).collect();
        stretches.push(run.own.layer(layer));
        let rows = rows.start * c.q_width()..rows.end * c.q_width();
        let (queries, out) = (&state.q[rows.clone()], &mut state.mixed[rows]);
        attend(c, queries, &stretches, out, &mut state.scores, threads);
    }
}

/// The output projection and the feed-forward layer, both added to the residual stream.
fn finish(
    c: &LlamaConfig,
    layer: &LayerWeights,
    delta: &LayerDelta,
    state: &mut Activations,
    threads: Threads,
) -> Result<(), ModelError> {
    let Activations {
        x,
        h,
        mixed,
        gate,
        up,
        inner,
        ..
    } = state;
    linear(
        mixed,
        &View::new(&layer.o)?,
        c.q_width(),
        x,
        Into::Add,
        threads,
    );
    delta.o.add(mixed, [&mut *x], inner, threads);
    norm(x, &View::new(&layer.ffn_norm)?, c.norm_eps, h);
    linear(
        h,
        &View::new(&layer.gate)?,
        c.hidden,
        gate,
        Into::Replace,
        threads,
    );
    linear(
        h,
        &View::new(&layer.up)?,
        c.hidden,
        up,
        Into::Replace,
        threads,
    );
    delta.gate_up.add(h, [&mut *gate, &mut *up], inner, threads);
    silu_mul(gate, up);
    linear(gate, &View::new(&layer.down)?, c.ffn, x, Into::Add, threads);
    delta.down.add(gate, [x], inner, threads);
    Ok(())
}
