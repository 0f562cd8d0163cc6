//! Keys and values of tokens that were fed, per layer.

/// Keys (rotated) and values of a stretch of tokens.
///
/// A sequence may be several stretches one after the other: a shared prompt start, the row's own
/// tokens, a branch of a choice. Invariant: outside of a pass every layer holds `len` tokens.
#[derive(Debug, Default)]
pub(crate) struct KvCache {
    len: usize,
    layers: Vec<LayerCache>,
    /// Where a GPU keeps them; `layers` is empty then.
    #[cfg(feature = "cuda")]
    pub(super) on_gpu: Option<super::on_gpu::GpuCache>,
}

/// One layer's part: both `[len, kv_width]`.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerCache {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens; it grows when more come.
    pub(super) fn new(layers: usize, kv_width: usize, capacity: usize) -> Self {
        let layer = || LayerCache {
            keys: Vec::with_capacity(capacity * kv_width),
            values: Vec::with_capacity(capacity * kv_width),
        };
        Self {
            layers: (0..layers).map(|_| layer()).collect(),
            ..Self::default()
        }
    }

    /// Bytes of what it holds in main memory.
    pub(crate) fn bytes(&self) -> usize {
        let values = |layer: &LayerCache| layer.keys.len() + layer.values.len();
        self.layers.iter().map(values).sum::<usize>() * size_of::<f32>()
    }

    /// Tokens held.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first `tokens` tokens and those after them, as two stretches. None where the keys and
    /// values are not here.
    pub(crate) fn split(&self, tokens: usize) -> Option<(Self, Self)> {
        if self.layers.is_empty() {
            return None;
        }
        let cut = |layer: &LayerCache| {
            let at = layer.keys.len() / self.len.max(1) * tokens;
            let (keys, later_keys) = layer.keys.split_at(at);
            let (values, later_values) = layer.values.split_at(at);
            let part = |keys: &[f32], values: &[f32]| LayerCache {
                keys: keys.to_vec(),
                values: values.to_vec(),
            };
            (part(keys, values), part(later_keys, later_values))
        };
        let (first, second): (Vec<_>, Vec<_>) = self.layers.iter().map(cut).unzip();
        let stretch = |len, layers| Self {
            len,
            layers,
            #[cfg(feature = "cuda")]
            on_gpu: None,
        };
        Some((stretch(tokens, first), stretch(self.len - tokens, second)))
    }

    pub(super) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    /// Appends new tokens' keys and values to one layer; [`KvCache::grow`] follows the last.
    pub(super) fn append(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        self.layers[layer].keys.extend_from_slice(keys);
        self.layers[layer].values.extend_from_slice(values);
    }

    /// Counts `tokens` that every layer has by now.
    pub(super) fn grow(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
