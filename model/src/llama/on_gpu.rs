//! The pass of inference on a GPU, and what it keeps there.
//!
//! As `pass`, with all runs in one matrix and their keys and values on the device. Invariant: a
//! cache that was fed here is fed here only.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::delta::{Adapter, Group, LayerDelta};
use super::kv_cache::KvCache;
use super::{Llama, Run};
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gpu::{
    self, Attended, Buffer, Gpu, GpuLayer, GpuModel, Layer, Matrix, Norm, Plan, Sizes, View,
    segment_of,
};
use crate::lora::Module;

/// Tokens that go through the layers together at most.
const TOGETHER: usize = 4096;
/// Tokens that room is kept for from one pass to the next: every adapter has its own.
const KEPT: usize = 256;
/// Caches grow in steps of so many tokens at least, once they hold something.
const STEP: usize = 64;

/// A base model on a GPU, and room to compute in.
pub(super) struct OnGpu {
    model: Arc<GpuModel>,
    room: Mutex<Room>,
}

/// Keys and values of a stretch of tokens: `[layers, 2, capacity, kv_width]`.
#[derive(Debug)]
pub(super) struct GpuCache {
    values: Buffer<f32>,
    capacity: usize,
}

/// An adapter's factors.
#[derive(Debug)]
pub(super) struct GpuAdapter {
    /// Queries with keys and values, output, gate with up, down.
    layers: Vec<[GpuGroup; 4]>,
}

#[derive(Debug)]
struct GpuGroup {
    /// `[width, inputs]`.
    a: Buffer<f32>,
    inputs: usize,
    width: usize,
    members: Vec<Option<GpuMember>>,
}

#[derive(Debug)]
struct GpuMember {
    column: usize,
    rank: usize,
    /// `[outputs, rank]`, scaled.
    b: Buffer<f32>,
}

const QKV: usize = 0;
const OUT: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;

/// Buffers that every pass reuses. `m` is the number of tokens.
struct Room {
    /// The residual stream, and what is normed of it: `[m, hidden]`.
    x: Buffer<f32>,
    h: Buffer<f32>,
    /// `[m, heads · head_dim]`.
    q: Buffer<f32>,
    mixed: Buffer<f32>,
    /// `[m, kv_width]`.
    k: Buffer<f32>,
    v: Buffer<f32>,
    /// `[m, ffn]`.
    gate: Buffer<f32>,
    up: Buffer<f32>,
    /// A value of every head of every token.
    inverse: Buffer<f32>,
    log_sums: Buffer<f32>,
    /// Inner values of an adapter.
    inner: Buffer<f32>,
}

/// What a pass reads, on the device.
struct Tables {
    tokens: Buffer<u32>,
    /// Of every frequency table.
    turns: Vec<[Buffer<f32>; 2]>,
    slots: Buffer<u64>,
    plan: Plan,
    /// The last row of every run.
    last: Buffer<u32>,
}

/// The views of one pass.
struct Pass<'a> {
    on: &'a OnGpu,
    gpu: &'a Gpu,
    c: &'a LlamaConfig,
    m: usize,
    room: &'a Room,
    tables: &'a Tables,
    adapted: &'a [(Range<usize>, &'a GpuAdapter)],
}

/// Whether both compute on the same device with the same weights, or neither does on one.
pub(super) fn is_same(one: Option<&OnGpu>, other: Option<&OnGpu>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(&one.model, &other.model),
        (None, None) => true,
        _ => false,
    }
}

impl Llama {
    /// The same model on a GPU.
    pub(crate) fn moved_to(mut self, gpu: &Gpu) -> Result<Self, ModelError> {
        let model = self.base.on_gpu(gpu)?;
        if let Some(adapter) = &mut self.adapter {
            adapter.on_gpu = Some(GpuAdapter::new(gpu, adapter)?);
        }
        self.on_gpu = Some(OnGpu {
            room: Mutex::new(Room::new(gpu)?),
            model,
        });
        Ok(self)
    }
}

impl GpuAdapter {
    fn new(gpu: &Gpu, adapter: &Adapter) -> Result<Self, ModelError> {
        let group = |group: &Group| -> Result<GpuGroup, ModelError> {
            let members = group.members.iter().map(|member| {
                let Some(member) = member else {
                    return Ok(None);
                };
                Ok(Some(GpuMember {
                    column: member.column,
                    rank: member.rank,
                    b: gpu.copy_of(&member.b)?,
                }))
            });
            Ok(GpuGroup {
                a: gpu.copy_of(&group.a)?,
                inputs: group.inputs,
                width: group.width,
                members: members.collect::<Result<_, ModelError>>()?,
            })
        };
        let layer = |layer: &LayerDelta| -> Result<[GpuGroup; 4], ModelError> {
            Ok([
                group(&layer.qkv)?,
                group(&layer.o)?,
                group(&layer.gate_up)?,
                group(&layer.down)?,
            ])
        };
        let layers = adapter.layers().iter().map(layer);
        Ok(Self {
            layers: layers.collect::<Result<_, _>>()?,
        })
    }
}

impl Room {
    fn new(gpu: &Gpu) -> Result<Self, ModelError> {
        let none = || gpu.room(0);
        Ok(Self {
            x: none()?,
            h: none()?,
            q: none()?,
            mixed: none()?,
            k: none()?,
            v: none()?,
            gate: none()?,
            up: none()?,
            inverse: none()?,
            log_sums: none()?,
            inner: none()?,
        })
    }

    fn fit(&mut self, c: &LlamaConfig, m: usize, inner: usize) -> Result<(), ModelError> {
        self.x.fit(m * c.hidden)?;
        self.h.fit(m * c.hidden)?;
        self.q.fit(m * c.q_width())?;
        self.mixed.fit(m * c.q_width())?;
        self.k.fit(m * c.kv_width())?;
        self.v.fit(m * c.kv_width())?;
        self.gate.fit(m * c.ffn)?;
        self.up.fit(m * c.ffn)?;
        self.inverse.fit(m * c.heads)?;
        self.log_sums.fit(m * c.heads)?;
        self.inner.fit(m * inner)
    }
}

impl OnGpu {
    /// Feeds every run and returns the normed hidden state of each run's last token.
    pub(super) fn forward(
        &self,
        runs: Vec<Run<'_>>,
        frequencies: &[Vec<f64>],
    ) -> Result<Vec<f32>, ModelError> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let out = self.parts(runs, frequencies, &mut room);
        if room.x.len() > KEPT * self.model.config.hidden {
            *room = Room::new(&self.model.gpu)?;
        }
        out
    }

    /// The same, in passes of bounded sizes.
    fn parts(
        &self,
        runs: Vec<Run<'_>>,
        frequencies: &[Vec<f64>],
        room: &mut Room,
    ) -> Result<Vec<f32>, ModelError> {
        let mut out = Vec::new();
        let (mut part, mut tokens) = (Vec::new(), 0);
        for run in runs {
            if tokens > 0 && tokens + run.tokens.len() > TOGETHER {
                out.extend(self.pass(std::mem::take(&mut part), frequencies, room)?);
                tokens = 0;
            }
            tokens += run.tokens.len();
            part.push(run);
        }
        out.extend(self.pass(part, frequencies, room)?);
        Ok(out)
    }

    /// Logits over the whole vocabulary for `hidden`, `[rows, hidden]`.
    pub(super) fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        let (gpu, c) = (&self.model.gpu, &self.model.config);
        let rows = hidden.len() / c.hidden;
        let (hidden, logits) = (gpu.copy_of(hidden)?, gpu.room(rows * c.vocab)?);
        let head = Matrix::new(self.model.head(), c.vocab, c.hidden);
        let hidden = Matrix::new(hidden.all(), rows, c.hidden);
        let target = Matrix::new(logits.all(), rows, c.vocab);
        gpu.product(target, false, 1.0, hidden, head.t())?;
        logits.all().read(gpu)
    }

    fn pass(
        &self,
        mut runs: Vec<Run<'_>>,
        frequencies: &[Vec<f64>],
        room: &mut Room,
    ) -> Result<Vec<f32>, ModelError> {
        if runs.is_empty() {
            return Ok(Vec::new());
        }
        let (gpu, c) = (&self.model.gpu, &self.model.config);
        let tables = self.tables(&mut runs, frequencies)?;
        let adapted = adapted(&runs)?;
        let widths = adapted.iter().flat_map(|(_, adapter)| &adapter.layers);
        let inner = widths.flatten().map(|group| group.width).max().unwrap_or(0);
        let m = tables.tokens.len();
        room.fit(c, m, inner)?;
        let pass = Pass {
            on: self,
            gpu,
            c,
            m,
            room,
            tables: &tables,
            adapted: &adapted,
        };
        let out = pass.run(runs.len())?;
        for run in &mut runs {
            run.own.grow(run.tokens.len());
        }
        Ok(out)
    }

    /// What the pass reads; the runs' caches have room for their tokens afterwards.
    fn tables(&self, runs: &mut [Run<'_>], frequencies: &[Vec<f64>]) -> Result<Tables, ModelError> {
        let (gpu, c) = (&self.model.gpu, &self.model.config);
        let (mut tokens, mut slots, mut last) = (Vec::new(), Vec::new(), Vec::new());
        let mut turns = vec![[Vec::new(), Vec::new()]; frequencies.len()];
        let mut layout = Vec::with_capacity(runs.len());
        for run in runs {
            let before: usize = run.past.iter().map(|past| past.len()).sum();
            let (own, new) = (run.own.len(), run.tokens.len());
            for offset in 0..new {
                let position = (before + own + offset) as f64;
                for ([cos, sin], frequencies) in turns.iter_mut().zip(frequencies) {
                    cos.extend(frequencies.iter().map(|f| (position * f).cos() as f32));
                    sin.extend(frequencies.iter().map(|f| (position * f).sin() as f32));
                }
            }
            let mut segments = Vec::with_capacity(run.past.len() + 1);
            for past in &run.past {
                segments.extend(segment(past, c, 0, past.len())?);
            }
            self.grow(run.own, own + new)?;
            segments.extend(segment(run.own, c, 0, own + new)?);
            let places = (own..own + new).map(|at| segment(run.own, c, at, 1));
            for place in places {
                if let Some(place) = place? {
                    let values = (place.values - place.keys) / size_of::<f32>() as u64;
                    slots.extend([place.keys, place.layer as u64, values]);
                }
            }
            layout.push(gpu::Run {
                first: tokens.len(),
                rows: new,
                segments,
            });
            tokens.extend_from_slice(run.tokens);
            last.push(tokens.len() as u32 - 1);
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= c.vocab) {
            let text = format!("token {token} is not one of the model's {}", c.vocab);
            return Err(ModelError::Request(text));
        }
        let turns = turns.iter().map(|[cos, sin]| {
            let [cos, sin] = [gpu.copy_of(cos)?, gpu.copy_of(sin)?];
            Ok([cos, sin])
        });
        Ok(Tables {
            turns: turns.collect::<Result<_, ModelError>>()?,
            tokens: gpu.copy_of(&tokens)?,
            slots: gpu.copy_of(&slots)?,
            plan: Plan::new(gpu, Sizes::of(c), &layout)?,
            last: gpu.copy_of(&last)?,
        })
    }

    /// Makes room for `tokens` in a cache.
    fn grow(&self, cache: &mut KvCache, tokens: usize) -> Result<(), ModelError> {
        let (gpu, c) = (&self.model.gpu, &self.model.config);
        let held = cache.on_gpu.as_ref().map_or(0, |held| held.capacity);
        if tokens <= held {
            return Ok(());
        }
        // Many caches are filled once and read from then on.
        let capacity = match held {
            0 => tokens,
            _ => tokens.max(held + held / 2).next_multiple_of(STEP),
        };
        let width = c.kv_width();
        let values = gpu.room(2 * c.layers * capacity * width)?;
        if let Some(before) = &cache.on_gpu {
            let len = cache.len() * width;
            for part in 0..2 * c.layers {
                let from = before.values.at(part * held * width, len);
                let to = values.at(part * capacity * width, len);
                to.copy_from(gpu, from)?;
            }
        }
        cache.on_gpu = Some(GpuCache { values, capacity });
        Ok(())
    }
}

/// Some tokens of a cache; none where it holds nothing.
fn segment(
    cache: &KvCache,
    c: &LlamaConfig,
    start: usize,
    tokens: usize,
) -> Result<Option<gpu::Segment>, ModelError> {
    match &cache.on_gpu {
        _ if tokens == 0 => Ok(None),
        None => Err(ModelError::Device(
            "keys and values of the CPU were given to it".to_owned(),
        )),
        Some(held) => {
            let values = held.values.all();
            let segment = segment_of(values, c.kv_width(), held.capacity, start, tokens);
            Ok(Some(segment))
        }
    }
}

/// Neighbouring rows with one adapter.
fn adapted<'a>(runs: &[Run<'a>]) -> Result<Vec<(Range<usize>, &'a GpuAdapter)>, ModelError> {
    let mut found: Vec<(Range<usize>, &GpuAdapter)> = Vec::new();
    let mut start = 0;
    for run in runs {
        let rows = start..start + run.tokens.len();
        start = rows.end;
        let Some(adapter) = run.adapter else { continue };
        let adapter = adapter.on_gpu.as_ref();
        let adapter =
            adapter.ok_or_else(|| ModelError::Device("an adapter is not on it".to_owned()))?;
        match found.last_mut() {
            Some((before, other)) if before.end == rows.start && std::ptr::eq(*other, adapter) => {
                before.end = rows.end;
            }
            _ => found.push((rows, adapter)),
        }
    }
    Ok(found)
}

impl Pass<'_> {
    fn run(&self, runs: usize) -> Result<Vec<f32>, ModelError> {
        let (gpu, c, room) = (self.gpu, self.c, self.room);
        let model = &self.on.model;
        let x = self.rows(&room.x, c.hidden);
        gpu.gather(x, model.embed.all(), self.tables.tokens.all(), c.hidden)?;
        for (index, layer) in model.layers.iter().enumerate() {
            self.attend(index, layer)?;
            self.feed_forward(index, layer)?;
        }
        // The rows that were looked for, in the room that nobody needs any more.
        let last = room.h.at(0, runs * c.hidden);
        gpu.gather(last, x, self.tables.last.all(), c.hidden)?;
        self.norm(last, last, &model.norm)?;
        last.read(gpu)
    }

    fn rows<'b>(&self, buffer: &'b Buffer<f32>, width: usize) -> View<'b, f32> {
        buffer.at(0, self.m * width)
    }

    /// Norms rows as wide as `weight`.
    fn norm(
        &self,
        out: View<'_, f32>,
        x: View<'_, f32>,
        weight: &Buffer<f32>,
    ) -> Result<(), ModelError> {
        let norm = Norm {
            weight: weight.all(),
            inverse: self.room.inverse.at(0, x.len() / weight.len()),
        };
        self.gpu.rms_norm(out, x, norm, self.c.norm_eps)
    }

    fn attend(&self, index: usize, layer: &GpuLayer) -> Result<(), ModelError> {
        let (gpu, c, room, tables) = (self.gpu, self.c, self.room, self.tables);
        let (x, h) = (self.rows(&room.x, c.hidden), self.rows(&room.h, c.hidden));
        let (q, mixed) = (
            self.rows(&room.q, c.q_width()),
            self.rows(&room.mixed, c.q_width()),
        );
        let (k, v) = (
            self.rows(&room.k, c.kv_width()),
            self.rows(&room.v, c.kv_width()),
        );
        self.norm(h, x, &layer.attn_norm)?;
        self.linear(layer, Module::Q, h, q, false)?;
        self.linear(layer, Module::K, h, k, false)?;
        self.linear(layer, Module::V, h, v, false)?;
        self.adapt(index, QKV, h, &[q, k, v])?;
        if let Some(biases) = &layer.bias {
            for (rows, bias) in [q, k, v].into_iter().zip(biases) {
                gpu.add_bias(rows, bias.all())?;
            }
        }
        if let Some([of_q, of_k]) = &layer.head_norms {
            self.norm(q, q, of_q)?;
            self.norm(k, k, of_k)?;
        }
        let [cos, sin] = &tables.turns[c.frequency_table(index)];
        for rows in [q, k] {
            gpu.rotate(rows, [cos.all(), sin.all()], c.head_dim, false)?;
        }
        gpu.append(k, v, tables.slots.all(), index)?;
        let at = Layer {
            slot: index,
            window: c.window(index),
        };
        let values = Attended {
            q,
            out: mixed,
            log_sums: self.rows(&room.log_sums, c.heads),
        };
        gpu.attention(&tables.plan, at, values)?;
        let post = layer.post_norms.as_ref().map(|[attn, _]| attn);
        self.back(index, layer, (Module::O, OUT), mixed, post)
    }

    fn feed_forward(&self, index: usize, layer: &GpuLayer) -> Result<(), ModelError> {
        let (gpu, c, room) = (self.gpu, self.c, self.room);
        let (x, h) = (self.rows(&room.x, c.hidden), self.rows(&room.h, c.hidden));
        let (gate, up) = (self.rows(&room.gate, c.ffn), self.rows(&room.up, c.ffn));
        self.norm(h, x, &layer.ffn_norm)?;
        self.linear(layer, Module::Gate, h, gate, false)?;
        self.linear(layer, Module::Up, h, up, false)?;
        self.adapt(index, GATE_UP, h, &[gate, up])?;
        gpu.glu(c.parts.activation, gate, gate, up)?;
        let post = layer.post_norms.as_ref().map(|[_, ffn]| ffn);
        self.back(index, layer, (Module::Down, DOWN), gate, post)
    }

    /// A block's last product, added to the residual stream, where there is a norm through that.
    fn back(
        &self,
        index: usize,
        layer: &GpuLayer,
        (module, group): (Module, usize),
        from: View<'_, f32>,
        post: Option<&Buffer<f32>>,
    ) -> Result<(), ModelError> {
        let (x, h) = (
            self.rows(&self.room.x, self.c.hidden),
            self.rows(&self.room.h, self.c.hidden),
        );
        let Some(weight) = post else {
            self.linear(layer, module, from, x, true)?;
            return self.adapt(index, group, from, &[x]);
        };
        self.linear(layer, module, from, h, false)?;
        self.adapt(index, group, from, &[h])?;
        self.norm(h, h, weight)?;
        self.gpu.add(x, h)
    }

    fn linear(
        &self,
        layer: &GpuLayer,
        module: Module,
        x: View<'_, f32>,
        out: View<'_, f32>,
        add: bool,
    ) -> Result<(), ModelError> {
        let (inputs, outputs) = (module.input(self.c), module.output(self.c));
        let w = Matrix::new(layer.modules[module as usize].all(), outputs, inputs);
        let x = Matrix::new(x, self.m, inputs);
        let out = Matrix::new(out, self.m, outputs);
        self.gpu.product(out, add, 1.0, x, w.t())
    }

    /// Adds the adapters' shares to the outputs of a group.
    fn adapt(
        &self,
        index: usize,
        group: usize,
        x: View<'_, f32>,
        outs: &[View<'_, f32>],
    ) -> Result<(), ModelError> {
        for (rows, adapter) in self.adapted {
            let group = &adapter.layers[index][group];
            if group.width == 0 {
                continue;
            }
            let n = rows.len();
            let part = |view: View<'_, f32>, width: usize| {
                (rows.start * width, n * width, view.len() == self.m * width)
            };
            let inner = self.room.inner.at(0, n * group.width);
            let (start, len, fits) = part(x, group.inputs);
            assert!(fits, "an adapter's input");
            self.gpu.product(
                Matrix::new(inner, n, group.width),
                false,
                1.0,
                Matrix::new(x.at(start, len), n, group.inputs),
                Matrix::new(group.a.all(), group.width, group.inputs).t(),
            )?;
            for (member, out) in group.members.iter().zip(outs) {
                let Some(GpuMember { column, rank, b }) = member else {
                    continue;
                };
                let outputs = b.len() / rank;
                let (start, len, fits) = part(*out, outputs);
                assert!(fits, "an adapter's output");
                let from = inner.at(*column, inner.len() - column);
                self.gpu.product(
                    Matrix::new(out.at(start, len), n, outputs),
                    true,
                    1.0,
                    Matrix::strided(from, n, *rank, group.width),
                    Matrix::new(b.all(), outputs, *rank).t(),
                )?;
            }
        }
        Ok(())
    }
}
