//! The base model's weights as plain slices, borrowed from their tensors without a copy.
//!
//! Knows no computation. Invariant: every slice has exactly the size that the config says.

use std::ops::{Deref, Range};

use candle_core::{DType, Storage, StorageRef, Tensor};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::weights::LlamaWeights;

/// A tensor's values; holds its read lock.
pub(super) struct Values<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    fn new(tensor: &'a Tensor, expected: usize, what: &str) -> Result<Self, ModelError> {
        let refuse =
            |why: &str| ModelError::Tensor(candle_core::Error::msg(format!("{what}: {why}")));
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(refuse("is not contiguous"));
        };
        if end - start != expected {
            return Err(refuse("has not the size that the model's config says"));
        }
        match &*storage {
            Storage::Cpu(_) if tensor.dtype() == DType::F32 => {}
            Storage::Cpu(_) => return Err(refuse("is not f32")),
            _ => return Err(refuse("is not in main memory, where training computes")),
        }
        Ok(Self {
            storage,
            range: start..end,
        })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(values) => match values.as_slice::<f32>() {
                Ok(values) => &values[self.range.clone()],
                Err(_) => &[],
            },
            _ => &[],
        }
    }
}

/// One layer. Matrices are `[out, in]`, in the order of `Module::ALL`.
pub(super) struct FrozenLayer<'a> {
    pub(super) attn_norm: Values<'a>,
    pub(super) ffn_norm: Values<'a>,
    pub(super) modules: [Values<'a>; 7],
}

/// The whole model.
pub(super) struct Frozen<'a> {
    pub(super) config: &'a LlamaConfig,
    pub(super) embed: Values<'a>,
    pub(super) layers: Vec<FrozenLayer<'a>>,
    pub(super) norm: Values<'a>,
    pub(super) head: Values<'a>,
}

impl<'a> Frozen<'a> {
    /// Borrows the weights.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] when a tensor is not dense f32 in main memory, or of another size.
    pub(super) fn new(weights: &'a LlamaWeights) -> Result<Self, ModelError> {
        let c = &weights.config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layers = weights.layers.iter().enumerate().map(|(index, w)| {
            let get = |tensor: &'a Tensor, size, name: &str| {
                Values::new(tensor, size, &format!("layer {index} {name}"))
            };
            Ok(FrozenLayer {
                attn_norm: get(&w.attn_norm, c.hidden, "attn_norm")?,
                ffn_norm: get(&w.ffn_norm, c.hidden, "ffn_norm")?,
                modules: [
                    get(&w.q, q * c.hidden, "q")?,
                    get(&w.k, kv * c.hidden, "k")?,
                    get(&w.v, kv * c.hidden, "v")?,
                    get(&w.o, c.hidden * q, "o")?,
                    get(&w.gate, c.ffn * c.hidden, "gate")?,
                    get(&w.up, c.ffn * c.hidden, "up")?,
                    get(&w.down, c.hidden * c.ffn, "down")?,
                ],
            })
        });
        Ok(Self {
            config: c,
            embed: Values::new(&weights.embed, c.vocab * c.hidden, "embed")?,
            layers: layers.collect::<Result<_, ModelError>>()?,
            norm: Values::new(&weights.norm, c.hidden, "norm")?,
            head: Values::new(&weights.head, c.vocab * c.hidden, "head")?,
        })
    }
}
