//! One layer of the encoder: attention over a text's own tokens, then the feed-forward part.

use super::{File, Norm};
use crate::error::ModelError;
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::rows::{add_bias, gelu, linear};
use crate::kernels::vector::softmax_row;

/// `y = x · weightᵀ + bias`.
struct Linear {
    weight: Vec<f32>,
    bias: Vec<f32>,
    inputs: usize,
}

impl Linear {
    fn load(file: &File<'_>, name: &str, inputs: usize) -> Result<Self, ModelError> {
        let (weight, columns) = file.matrix(&format!("{name}.weight"))?;
        if columns != inputs {
            return Err(file.lacks(&format!("{name}.weight")));
        }
        let outputs = weight.len() / inputs;
        Ok(Self {
            bias: file.values(&format!("{name}.bias"), Some(outputs))?,
            weight,
            inputs,
        })
    }

    fn outputs(&self) -> usize {
        self.bias.len()
    }

    fn apply(&self, x: &[f32], out: &mut Vec<f32>) {
        out.resize(x.len() / self.inputs * self.outputs(), 0.0);
        linear(
            x,
            &self.weight,
            self.inputs,
            out,
            Into::Replace,
            Threads::One,
        );
        add_bias(out, &self.bias);
    }
}

pub(super) struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    mix: Linear,
    mix_norm: Norm,
    up: Linear,
    down: Linear,
    norm: Norm,
    heads: usize,
}

/// Activations that the layers share.
#[derive(Default)]
pub(super) struct Scratch {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    mixed: Vec<f32>,
    out: Vec<f32>,
    inner: Vec<f32>,
    scores: Vec<f32>,
}

impl Layer {
    pub(super) fn load(
        file: &File<'_>,
        index: usize,
        width: usize,
        heads: usize,
    ) -> Result<Self, ModelError> {
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        let linear = |part: &str, inputs| Linear::load(file, &name(part), inputs);
        let up = linear("intermediate.dense", width)?;
        let layer = Self {
            query: linear("attention.self.query", width)?,
            key: linear("attention.self.key", width)?,
            value: linear("attention.self.value", width)?,
            mix: linear("attention.output.dense", width)?,
            mix_norm: file.norm(&name("attention.output.LayerNorm"), width)?,
            down: linear("output.dense", up.outputs())?,
            up,
            norm: file.norm(&name("output.LayerNorm"), width)?,
            heads,
        };
        let square = [
            (&layer.query, "attention.self.query"),
            (&layer.key, "attention.self.key"),
            (&layer.value, "attention.self.value"),
            (&layer.mix, "attention.output.dense"),
            (&layer.down, "output.dense"),
        ];
        match square.iter().find(|(part, _)| part.outputs() != width) {
            Some((_, part)) => Err(file.lacks(&format!("{}.weight", name(part)))),
            None => Ok(layer),
        }
    }

    /// `x` holds the tokens of texts of these lengths, one row each.
    pub(super) fn apply(&self, x: &mut [f32], lengths: &[usize], scratch: &mut Scratch) {
        let s = scratch;
        self.query.apply(x, &mut s.query);
        self.key.apply(x, &mut s.key);
        self.value.apply(x, &mut s.value);
        s.mixed.resize(x.len(), 0.0);
        let width = self.query.inputs;
        let mut start = 0;
        for length in lengths.iter().filter(|length| **length > 0) {
            let rows = start * width..(start + length) * width;
            start += length;
            let (query, key) = (&s.query[rows.clone()], &s.key[rows.clone()]);
            let value = &s.value[rows.clone()];
            let mixed = &mut s.mixed[rows];
            self.attend(*length, query, key, value, mixed, &mut s.scores);
        }
        self.mix.apply(&s.mixed, &mut s.out);
        crate::kernels::vector::add(x, &s.out);
        self.mix_norm.apply(x);
        self.up.apply(x, &mut s.inner);
        gelu(&mut s.inner);
        self.down.apply(&s.inner, &mut s.out);
        crate::kernels::vector::add(x, &s.out);
        self.norm.apply(x);
    }

    /// Every token of one text looks at all of them.
    fn attend(
        &self,
        n: usize,
        query: &[f32],
        key: &[f32],
        value: &[f32],
        mixed: &mut [f32],
        scores: &mut Vec<f32>,
    ) {
        let width = self.query.inputs;
        let size = width / self.heads;
        let scale = 1.0 / (size as f32).sqrt();
        scores.resize(n * n, 0.0);
        for from in (0..width).step_by(size) {
            let part = |of| Mat::strided(of, n, size, width);
            let all = MatMut::new(scores, n, n);
            let (query, key) = (part(&query[from..]), part(&key[from..]));
            matmul(all, Into::Replace, scale, query, key.t(), Threads::One);
            for row in scores.chunks_exact_mut(n) {
                softmax_row(row, 1.0);
            }
            let out = MatMut::strided(&mut mixed[from..], n, size, width);
            let scores = Mat::new(scores, n, n);
            matmul(
                out,
                Into::Replace,
                1.0,
                scores,
                part(&value[from..]),
                Threads::One,
            );
        }
    }
}
