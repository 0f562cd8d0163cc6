//! The base model's linear layers as inference reads them: dense f32, or rounded to 8 bits.
//!
//! Knows no forward pass. Invariant: norms and embeddings are always dense.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::error::ModelError;
use crate::kernels::View;
use crate::kernels::int8::{self, Int8Matrix};
use crate::kernels::matmul::{Into, Threads};
use crate::kernels::rows::linear;
use crate::lora::Module;
use crate::weights::{LayerWeights, LlamaWeights};

/// What generation computes its linear layers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// 8-bit weights and 16-bit inputs, with a scale for each 32 of them: some times faster than
    /// f32, and next to exact for weights that come from a file of at most 8 bits. f32 where the
    /// processor has no instructions for it or a layer's width is no multiple of 32.
    #[default]
    Int8,
    /// What the reference implementations compute.
    F32,
}

/// The matrices that were rounded.
#[derive(Default)]
pub(crate) struct Int8Weights {
    layers: Vec<[Option<Int8Matrix>; 7]>,
    head: Option<Int8Matrix>,
}

/// One linear layer.
pub(super) enum Matrix<'a> {
    Dense(View<'a>, usize),
    Int8(&'a Int8Matrix),
}

impl std::fmt::Debug for Int8Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Int8Weights({} layers)", self.layers.len())
    }
}

impl Int8Weights {
    /// Rounds every matrix that can be; `None` where that would not be faster.
    pub(crate) fn new(weights: &LlamaWeights) -> Result<Option<Self>, ModelError> {
        if !int8::is_fast() {
            return Ok(None);
        }
        let config = &weights.config;
        let layers = weights.layers.par_iter().map(|layer| {
            let mut matrices = [const { None }; 7];
            for (matrix, module) in matrices.iter_mut().zip(Module::ALL) {
                *matrix = Int8Matrix::new(&View::new(dense(layer, module))?, module.input(config));
            }
            Ok(matrices)
        });
        Ok(Some(Self {
            layers: layers.collect::<Result<_, ModelError>>()?,
            head: Int8Matrix::new(&View::new(&weights.head)?, config.hidden),
        }))
    }
}

impl Int8Weights {
    /// Rounds a layer's matrix; whether it could be.
    pub(crate) fn take(
        &mut self,
        layer: usize,
        module: Module,
        matrix: &Tensor,
    ) -> Result<bool, ModelError> {
        let (_, inputs) = matrix.dims2()?;
        let matrix = Int8Matrix::new(&View::new(matrix)?, inputs);
        let layers = self.layers.len().max(layer + 1);
        self.layers.resize_with(layers, || [const { None }; 7]);
        let taken = &mut self.layers[layer][module as usize];
        *taken = matrix;
        Ok(taken.is_some())
    }

    /// Rounds the output head; whether it could be.
    pub(crate) fn take_head(&mut self, head: &Tensor) -> Result<bool, ModelError> {
        let (_, inputs) = head.dims2()?;
        self.head = Int8Matrix::new(&View::new(head)?, inputs);
        Ok(self.head.is_some())
    }

    /// The output head, where it was rounded.
    pub(super) fn head(&self) -> Option<&Int8Matrix> {
        self.head.as_ref()
    }
}

impl<'a> Matrix<'a> {
    /// A layer's matrix, rounded where `int8` has it.
    pub(super) fn of_layer(
        weights: &'a LlamaWeights,
        int8: Option<&'a Int8Weights>,
        layer: usize,
        module: Module,
    ) -> Result<Self, ModelError> {
        match int8.and_then(|int8| int8.layers[layer][module as usize].as_ref()) {
            Some(matrix) => Ok(Self::Int8(matrix)),
            None => {
                let view = View::new(dense(&weights.layers[layer], module))?;
                Ok(Self::Dense(view, module.input(&weights.config)))
            }
        }
    }

    /// The output head.
    pub(super) fn head(
        weights: &'a LlamaWeights,
        int8: Option<&'a Int8Weights>,
    ) -> Result<Self, ModelError> {
        match int8.and_then(|int8| int8.head.as_ref()) {
            Some(matrix) => Ok(Self::Int8(matrix)),
            None => Ok(Self::Dense(
                View::new(&weights.head)?,
                weights.config.hidden,
            )),
        }
    }

    /// Bytes of its weights.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Dense(w, _) => w.len() * size_of::<f32>(),
            Self::Int8(matrix) => matrix.bytes(),
        }
    }

    /// `out = x · wᵀ` or `out += x · wᵀ`.
    pub(super) fn times(&self, x: &[f32], out: &mut [f32], into: Into, threads: Threads) {
        match self {
            Self::Dense(w, inputs) => linear(x, w, *inputs, out, into, threads),
            Self::Int8(matrix) => matrix.linear(x, out, into, threads),
        }
    }
}

fn dense(layer: &LayerWeights, module: Module) -> &Tensor {
    match module {
        Module::Q => &layer.q,
        Module::K => &layer.k,
        Module::V => &layer.v,
        Module::O => &layer.o,
        Module::Gate => &layer.gate,
        Module::Up => &layer.up,
        Module::Down => &layer.down,
    }
}
