//! Keys and values that were computed before a pass, by the base model alone: what comes before an
//! activated adapter's invocation. They get no gradient, since nothing trained went into them.

use std::sync::Arc;

use crate::kernels::matmul::Mat;

/// Keys and values of some rows of tokens.
#[derive(Debug, Default)]
pub(super) struct Stretch {
    tokens: usize,
    /// Rotated keys and values of each layer, `[kv_heads, tokens, head_dim]`.
    layers: Vec<[Vec<f32>; 2]>,
    /// Where a GPU keeps them: `[layers, 2, tokens, kv_heads · head_dim]`; `layers` is empty then.
    #[cfg(feature = "cuda")]
    pub(super) on_gpu: Option<crate::gpu::Buffer<f32>>,
}

/// Some neighbouring tokens of a stretch.
#[derive(Debug, Clone)]
pub(super) struct Past {
    stretch: Arc<Stretch>,
    start: usize,
    len: usize,
}

impl Stretch {
    pub(super) fn new(tokens: usize) -> Self {
        Self {
            tokens,
            ..Self::default()
        }
    }

    /// Adds the next layer.
    pub(super) fn push(&mut self, keys: &[f32], values: &[f32]) {
        self.layers.push([keys.to_vec(), values.to_vec()]);
    }
}

impl Past {
    /// `len` tokens from `start` on.
    pub(super) fn new(stretch: &Arc<Stretch>, start: usize, len: usize) -> Self {
        let stretch = Arc::clone(stretch);
        Self {
            stretch,
            start,
            len,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where a GPU keeps them, rows of `width` values.
    #[cfg(feature = "cuda")]
    pub(super) fn segment(&self, width: usize) -> Option<crate::gpu::Segment> {
        let values = self.stretch.on_gpu.as_ref()?.all();
        let all = self.stretch.tokens;
        let segment = crate::gpu::segment_of(values, width, all, self.start, self.len);
        Some(segment)
    }

    /// The keys (0) or values (1) of one head, `[len, dim]`.
    pub(super) fn head(&self, layer: usize, which: usize, head: usize, dim: usize) -> Mat<'_> {
        let values = &self.stretch.layers[layer][which];
        let at = (head * self.stretch.tokens + self.start) * dim;
        Mat::new(&values[at..], self.len, dim)
    }
}
