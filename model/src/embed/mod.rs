//! [`SentenceEncoder`]: texts to vectors, by a BERT encoder (Devlin et al. 2018) with mean pooling
//! (Reimers & Gurevych 2019, "Sentence-BERT").
//!
//! Knows no task. Texts are laid end to end, so nothing is spent on padding; each thread takes
//! some of them. Invariant: a text's vector does not depend on the other texts of the call, up to
//! rounding, and has length 1.

mod layer;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::kernels::rows::layer_norm;
use crate::kernels::vector::sum_of_squares;
use layer::{Layer, Scratch};

/// BERT's epsilon.
const EPS: f32 = 1e-12;
/// Tokens of a text that count; the rest is cut off. What MiniLM-L6-v2 was trained with.
const LONGEST: usize = 128;
/// Texts that a thread takes at once.
const CHUNK: usize = 32;
/// Width of MiniLM's vectors and of its heads: what a model that does not say is taken to be.
const MINILM: usize = 384;
const HEAD: usize = 32;

/// A loaded sentence encoder.
pub struct SentenceEncoder {
    tokenizer: tokenizers::Tokenizer,
    /// `[vocabulary, width]`, the type of a first sentence added.
    words: Vec<f32>,
    /// `[positions, width]`.
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    width: usize,
}

/// Scale and shift of a layer norm.
struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Norm {
    fn apply(&self, x: &mut [f32]) {
        layer_norm(x, &self.weight, &self.bias, EPS);
    }
}

impl SentenceEncoder {
    /// Loads `weights` (safetensors, in the layout of `transformers`' BERT) and `tokenizer`
    /// (`tokenizer.json`). The number of heads is taken from `config` (`config.json`); only
    /// vectors of MiniLM's width do without it.
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::Format`] naming the file and what it lacks.
    pub fn load(
        weights: &Path,
        tokenizer: &Path,
        config: Option<&Path>,
    ) -> Result<Self, ModelError> {
        let file = File::open(weights)?;
        let mut reader = tokenizers::Tokenizer::from_file(tokenizer)
            .map_err(|e| ModelError::format(tokenizer, e))?;
        reader.with_padding(None);
        // Only fails for a stride beside a length.
        let cut = reader.with_truncation(Some(tokenizers::TruncationParams {
            max_length: LONGEST,
            ..Default::default()
        }));
        cut.map_err(|e| ModelError::format(tokenizer, e))?;
        let (mut words, width) = file.matrix("embeddings.word_embeddings.weight")?;
        let types = file.values("embeddings.token_type_embeddings.weight", None)?;
        let first = types.get(..width);
        let first = first.ok_or_else(|| file.lacks("embeddings.token_type_embeddings.weight"))?;
        for row in words.chunks_exact_mut(width) {
            row.iter_mut().zip(first).for_each(|(v, t)| *v += t);
        }
        let last = reader.get_vocab(true).into_values().max();
        if last.is_some_and(|last| last as usize >= words.len() / width) {
            let reason = "the tokenizer has more tokens than the weights; it is another model's";
            return Err(ModelError::format(tokenizer, reason));
        }
        let (positions, _) = file.matrix("embeddings.position_embeddings.weight")?;
        if positions.len() / width < LONGEST {
            return Err(ModelError::format(
                weights,
                format!("it has positions for fewer than {LONGEST} tokens"),
            ));
        }
        let heads = match config {
            Some(config) => heads(config)?,
            None if width == MINILM => width / HEAD,
            None => {
                let reason = format!(
                    "its vectors are {width} long and nothing says how many heads that makes; \
                     give its `config.json`"
                );
                return Err(ModelError::format(weights, reason));
            }
        };
        if heads == 0 || !width.is_multiple_of(heads) {
            let reason = format!("{heads} heads do not divide a width of {width}");
            return Err(ModelError::format(weights, reason));
        }
        let mut layers = Vec::new();
        while file.has(&format!(
            "encoder.layer.{}.output.dense.weight",
            layers.len()
        )) {
            layers.push(Layer::load(&file, layers.len(), width, heads)?);
        }
        if layers.is_empty() {
            return Err(file.lacks("encoder.layer.0.output.dense.weight"));
        }
        Ok(Self {
            tokenizer: reader,
            norm: file.norm("embeddings.LayerNorm", width)?,
            words,
            positions,
            layers,
            width,
        })
    }

    /// Length of the vectors.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One vector per text, in order: the mean over its tokens (128 at most), scaled to length 1.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when a text cannot be tokenised.
    pub fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ModelError> {
        let tokens = texts.par_iter().map(|text| self.tokens(text));
        let tokens: Vec<Vec<u32>> = tokens.collect::<Result<_, _>>()?;
        let chunks = tokens.par_chunks(CHUNK);
        Ok(chunks.flat_map_iter(|chunk| self.forward(chunk)).collect())
    }

    /// The tokens of a text with those beside it, cut to 128.
    pub(crate) fn tokens(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode_fast(text, true);
        let encoding =
            encoding.map_err(|e| ModelError::Tokenizer(format!("cannot encode: {e}")))?;
        let tokens = encoding.get_ids().to_vec();
        // What is put before and after a text has its own ids in `tokenizer.json`.
        let rows = self.words.len() / self.width;
        match tokens.iter().find(|token| **token as usize >= rows) {
            None => Ok(tokens),
            Some(token) => Err(ModelError::Tokenizer(format!(
                "`tokenizer.json` puts the token {token} beside each text, and the weights have \
                 {rows}; it is another model's"
            ))),
        }
    }

    fn forward(&self, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let width = self.width;
        let mut x = Vec::with_capacity(texts.iter().map(Vec::len).sum::<usize>() * width);
        for text in texts {
            for (position, token) in text.iter().enumerate() {
                let word = &self.words[*token as usize * width..][..width];
                let place = &self.positions[position * width..][..width];
                x.extend(word.iter().zip(place).map(|(w, p)| w + p));
            }
        }
        self.norm.apply(&mut x);
        let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
        let mut scratch = Scratch::default();
        for layer in &self.layers {
            layer.apply(&mut x, &lengths, &mut scratch);
        }
        let mut rows = x.chunks_exact(width);
        let pooled = lengths.iter().map(|length| {
            let mut mean = vec![0.0; width];
            for row in rows.by_ref().take(*length) {
                mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
            }
            let norm = (sum_of_squares(&mean).sqrt() as f32).max(f32::MIN_POSITIVE);
            mean.iter_mut().for_each(|v| *v /= norm);
            mean
        });
        pooled.collect()
    }
}

fn heads(config: &Path) -> Result<usize, ModelError> {
    let text = std::fs::read_to_string(config).map_err(ModelError::io(config))?;
    let config_json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| ModelError::format(config, e))?;
    config_json["num_attention_heads"]
        .as_u64()
        .and_then(|heads| usize::try_from(heads).ok())
        .ok_or_else(|| ModelError::format(config, "it has no `num_attention_heads`"))
}

/// The tensors of a file, under the names that BERT gives them.
struct File<'a> {
    path: &'a Path,
    tensors: HashMap<String, Tensor>,
}

impl<'a> File<'a> {
    fn open(path: &'a Path) -> Result<Self, ModelError> {
        // candle's error would not say which file is missing.
        std::fs::metadata(path).map_err(ModelError::io(path))?;
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)
            .map_err(|e| ModelError::format(path, e))?;
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| match name.strip_prefix("bert.") {
                Some(plain) => (plain.to_owned(), tensor),
                None => (name, tensor),
            })
            .collect();
        Ok(Self { path, tensors })
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn lacks(&self, name: &str) -> ModelError {
        ModelError::format(
            self.path,
            format!("the tensor `{name}` is missing or misshapen"),
        )
    }

    /// The values of a tensor; `size` is how many there must be.
    fn values(&self, name: &str, size: Option<usize>) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.lacks(name))?;
        let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        match size {
            Some(size) if size != values.len() => Err(self.lacks(name)),
            _ => Ok(values),
        }
    }

    /// A matrix and its number of columns.
    fn matrix(&self, name: &str) -> Result<(Vec<f32>, usize), ModelError> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.lacks(name))?;
        let (_, columns) = tensor.dims2().map_err(|_| self.lacks(name))?;
        if columns == 0 {
            return Err(self.lacks(name));
        }
        Ok((self.values(name, None)?, columns))
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, ModelError> {
        Ok(Norm {
            weight: self.values(&format!("{name}.weight"), Some(width))?,
            bias: self.values(&format!("{name}.bias"), Some(width))?,
        })
    }
}
