//! The base model's weights as plain slices, borrowed from their tensors without a copy.
//!
//! Knows no computation. Invariant: every slice has exactly the size that the config says.

use candle_core::{Error, Tensor};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::kernels::View;
use crate::weights::LlamaWeights;

/// One layer. Matrices are `[out, in]`, in the order of `Module::ALL`.
pub(super) struct FrozenLayer<'a> {
    pub(super) attn_norm: View<'a>,
    pub(super) ffn_norm: View<'a>,
    pub(super) modules: [View<'a>; 7],
    /// Biases of queries, keys and values.
    pub(super) bias: Option<[View<'a>; 3]>,
    /// Norms of each head's queries and keys.
    pub(super) head_norms: Option<[View<'a>; 2]>,
    /// Norms of what attention and feed-forward layer add to the residual stream.
    pub(super) post_norms: Option<[View<'a>; 2]>,
}

/// The whole model.
pub(super) struct Frozen<'a> {
    pub(super) config: &'a LlamaConfig,
    pub(super) embed: View<'a>,
    pub(super) layers: Vec<FrozenLayer<'a>>,
    pub(super) norm: View<'a>,
    pub(super) head: View<'a>,
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
                view(tensor, size, &format!("layer {index} {name}"))
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
                bias: match &w.bias {
                    Some(bias) => Some([
                        get(&bias.q, q, "q bias")?,
                        get(&bias.k, kv, "k bias")?,
                        get(&bias.v, kv, "v bias")?,
                    ]),
                    None => None,
                },
                head_norms: match &w.head_norms {
                    Some(norms) => Some([
                        get(&norms.q, c.head_dim, "q norm")?,
                        get(&norms.k, c.head_dim, "k norm")?,
                    ]),
                    None => None,
                },
                post_norms: match &w.post_norms {
                    Some(norms) => Some([
                        get(&norms.attn, c.hidden, "norm after attention")?,
                        get(&norms.ffn, c.hidden, "norm after the feed-forward layer")?,
                    ]),
                    None => None,
                },
            })
        });
        Ok(Self {
            config: c,
            embed: view(&weights.embed, c.vocab * c.hidden, "embed")?,
            layers: layers.collect::<Result<_, ModelError>>()?,
            norm: view(&weights.norm, c.hidden, "norm")?,
            head: view(&weights.head, c.vocab * c.hidden, "head")?,
        })
    }
}

fn view<'a>(tensor: &'a Tensor, size: usize, what: &str) -> Result<View<'a>, ModelError> {
    let refuse = |why: String| ModelError::Tensor(Error::msg(format!("{what}: {why}")));
    let view = View::new(tensor).map_err(|e| refuse(e.to_string()))?;
    if view.len() != size {
        let len = view.len();
        return Err(refuse(format!(
            "has {len} values, the model's config says {size}"
        )));
    }
    Ok(view)
}
