//! The adapted model once more for tests, slowly, in double precision with candle operations.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::softmax;

use super::row::TrainRow;
use crate::config::Activation;
use crate::lora::LoraAdapter;
use crate::weights::LlamaWeights;

/// Cross entropy of every target token of `row`.
pub(super) fn losses(
    weights: &LlamaWeights,
    adapter: &LoraAdapter,
    row: &TrainRow,
) -> Result<Vec<f64>> {
    let c = &weights.config;
    let tokens: Vec<u32> = row.tokens().collect();
    let n = tokens.len();
    let double = |t: &Tensor| t.to_dtype(DType::F64);
    let norm = |x: &Tensor, w: &Tensor| {
        let square = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(square + c.norm_eps)?.sqrt()?)?
            .broadcast_mul(&double(w)?)
    };
    let ids = Tensor::new(tokens, &Device::Cpu)?;
    let mut x = double(&weights.embed)?.index_select(&ids, 0)?;
    let layers = weights.layers.iter().zip(&adapter.layers);
    for (index, (layer, lora)) in layers.enumerate() {
        let linear = |x: &Tensor, w: &Tensor, name: &str| {
            let pair = &lora[name];
            let delta = double(&pair.b)?.matmul(&double(&pair.a)?)?;
            let w = (double(w)? + (delta * adapter.scale())?)?;
            x.matmul(&w.t()?)
        };
        let h = norm(&x, &layer.attn_norm)?;
        let heads = |name: &str, w: &Tensor, bias: Option<&Tensor>, weight: Option<&Tensor>| {
            let mut y = linear(&h, w, name)?;
            if let Some(bias) = bias {
                y = y.broadcast_add(&double(bias)?)?;
            }
            let heads = y.dim(1)? / c.head_dim;
            let mut y = y.reshape((n, heads, c.head_dim))?;
            if let Some(weight) = weight {
                y = norm(&y, weight)?;
            }
            y.transpose(0, 1)?.contiguous()
        };
        let (bias, norms) = (layer.bias.as_ref(), layer.head_norms.as_ref());
        let (q, k, v) = (
            heads("q_proj", &layer.q, bias.map(|b| &b.q), norms.map(|n| &n.q))?,
            heads("k_proj", &layer.k, bias.map(|b| &b.k), norms.map(|n| &n.k))?,
            heads("v_proj", &layer.v, bias.map(|b| &b.v), None)?,
        );
        let local = c.local.as_ref().filter(|local| local.layers[index]);
        let (theta, window) = local.map_or((c.rope_theta, n), |l| (l.rope_theta, l.window));
        let (q, k) = (rotate(&q, theta)?, rotate(&k, theta)?);
        let mut outs = Vec::new();
        for head in 0..c.heads {
            let kv = head / (c.heads / c.kv_heads);
            let scores = q.get(head)?.matmul(&k.get(kv)?.t()?)?;
            let scores = ((scores / (c.head_dim as f64).sqrt())? + mask(n, window)?)?;
            outs.push(softmax(&scores, D::Minus1)?.matmul(&v.get(kv)?)?);
        }
        let post = |y: Tensor, weight: Option<&Tensor>| match weight {
            Some(weight) => norm(&y, weight),
            None => Ok(y),
        };
        let norms = layer.post_norms.as_ref();
        let attended = linear(&Tensor::cat(&outs, 1)?, &layer.o, "o_proj")?;
        x = (&x + post(attended, norms.map(|n| &n.attn))?)?;
        let h = norm(&x, &layer.ffn_norm)?;
        let gate = linear(&h, &layer.gate, "gate_proj")?;
        let gate = match c.parts.activation {
            Activation::Silu => gate.silu()?,
            // Candle's is the tanh approximation.
            Activation::GeluTanh => gate.gelu()?,
        };
        let h = (gate * linear(&h, &layer.up, "up_proj")?)?;
        let fed = linear(&h, &layer.down, "down_proj")?;
        x = (&x + post(fed, norms.map(|n| &n.ffn))?)?;
    }
    let logits = norm(&x, &weights.norm)?.matmul(&double(&weights.head)?.t()?)?;
    let p = softmax(&logits, D::Minus1)?.to_vec2::<f64>()?;
    let first = row.prompt.len() - 1;
    let targets = row.target.iter().enumerate();
    Ok(targets
        .map(|(i, token)| -p[first + i][*token as usize].ln())
        .collect())
}

fn mask(n: usize, window: usize) -> Result<Tensor> {
    let hidden = |row: usize, column: usize| column > row || column + window <= row;
    let values = (0..n * n).map(|i| if hidden(i / n, i % n) { -1e30 } else { 0.0 });
    Tensor::from_iter(values, &Device::Cpu)?.reshape((n, n))
}

/// Rotates dimension `i` with `i + dim / 2`.
fn rotate(x: &Tensor, theta: f64) -> Result<Tensor> {
    let (_, n, dim) = x.dims3()?;
    let angles = (0..n * dim).map(|i| {
        let (position, pair) = (i / dim, i % dim % (dim / 2));
        position as f64 * theta.powf(-2.0 * pair as f64 / dim as f64)
    });
    let angles = Tensor::from_iter(angles, &Device::Cpu)?.reshape((n, dim))?;
    let (low, high) = (x.narrow(2, 0, dim / 2)?, x.narrow(2, dim / 2, dim / 2)?);
    let turned = Tensor::cat(&[&high.neg()?, &low], 2)?;
    x.broadcast_mul(&angles.cos()?)? + turned.broadcast_mul(&angles.sin()?)?
}
